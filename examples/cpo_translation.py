"""CPO on translation, the task it was made for: German sentences with numbers into English.

German says "vierundsiebzig", four and seventy, for 74, and a weak translator keeps the order: 47. It is trained here on data
of which half has this mistake, as scraped data would; then CPO learns from pairs of a right translation and the one with the
mistake, without a reference model (Xu et al., 2024, https://arxiv.org/abs/2401.08417).

python examples/cpo_translation.py
"""

import random
from itertools import product
from pathlib import Path

from common import answers, arguments, measured, share, write_rows

import mlxlora as ml
from mlxlora import starter

TENS = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")
ONES = ("zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
SENTENCES = (
    ("eva hat {} bücher.", "eva has {} books."),
    ("tom isst {} eier.", "tom eats {} eggs."),
    ("ich sehe {} vögel.", "i see {} birds."),
    ("wir warten {} tage.", "we wait for {} days."),
    ("gib mir {} äpfel.", "give me {} apples."),
    ("es kostet {} cent.", "it costs {} cents."),
)
HELD_OUT = 50


def translations() -> list[dict]:
    """Every sentence with every number of two digits that differ: the right translation, and the one that keeps the order."""
    rows = []
    for (german, english), ten, one in product(SENTENCES, range(2, 10), range(2, 10)):
        if ten != one:
            source = german.format(f"{ONES[one - 2]}und{TENS[ten - 2]}")
            right, wrong = (english.format(number) for number in (f"{ten}{one}", f"{one}{ten}"))
            rows.append({"prompt": source, "chosen": right, "rejected": wrong})
    random.Random(0).shuffle(rows)
    return rows


def scraped(rows: list[dict]) -> list[dict]:
    """What a translator learns from first: half of it is wrong."""
    rng = random.Random(1)
    replies = [(row["prompt"], rng.choice((row["chosen"], row["rejected"]))) for row in rows]
    return [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]} for p, r in replies]


def translator(rows: list[dict], iters: int, output: Path) -> Path:
    """A model folder: the starter, all of whose weights have learnt to translate."""
    write_rows(output / "scraped.jsonl", scraped(rows))
    ml.sft(
        model=str(starter.model_path()),
        data=str(output / "scraped.jsonl"),
        train_type="full",
        num_layers=-1,
        mask_prompt=True,
        iters=iters,
        batch_size=16,
        learning_rate=3e-3,
        lr_schedule="cosine",
        steps_per_report=50,
        adapter_path=str(output / "sft"),
    )
    ml.fuse(ml.ModelOptions(model=str(starter.model_path())), output / "sft", output / "translator")
    return output / "translator"


if __name__ == "__main__":
    iters, output = arguments(__file__, 250)
    rows = translations()
    test, train = rows[:HELD_OUT], rows[HELD_OUT:]
    model = translator(train, iters, output)
    write_rows(output / "pairs" / "train.jsonl", train)
    write_rows(output / "pairs" / "valid.jsonl", test)
    ml.cpo(
        model=str(model),
        data=str(output / "pairs"),
        use_chat_template=True,
        beta=0.1,  # scale of the margin between the two log-probabilities
        alpha=1.0,  # weight of the right translation's likelihood
        num_layers=-1,
        scale=2.0,
        iters=iters // 3 or 1,
        batch_size=16,
        learning_rate=2e-3,
        lr_schedule="cosine",
        max_seq_length=64,
        steps_per_report=25,
        val_batches=-1,
        adapter_path=str(output / "cpo"),
    )
    sentences, right = [row["prompt"] for row in test], [row["chosen"] for row in test]
    before = share(answers(model, sentences, max_tokens=32), right)
    after = share(answers(model, sentences, output / "cpo", max_tokens=32), right)
    measured(f"right translations of {HELD_OUT} sentences that it never saw", before, after)
