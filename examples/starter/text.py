"""The starter's text: worded sums and differences of numbers below 50, all from one seed.

    python examples/starter/text.py mlxlora/starter/data                 # the bundled data sets
    python examples/starter/text.py --pretraining 200000 pretraining     # rows to train the starter's model on

A tenth of the problems is held out: no wording of them occurs in pretraining or in a training split.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

SEED = 0
LIMIT = 50
NAMES = ("tom", "ann", "ben", "eva", "sam", "mia")
THINGS = ("apples", "books", "coins", "eggs")


class Problem(NamedTuple):
    """a plus or minus b."""

    a: int
    sign: str
    b: int

    @property
    def answer(self) -> int:
        return self.a + self.b if self.sign == "plus" else self.a - self.b


class Wording(NamedTuple):
    """A question, the sentences that answer it, and how often pretraining answers with the bare number instead."""

    question: str
    sentences: tuple[str, ...]
    bare: float


SENTENCES = ("it is {c}.", "the answer is {c}.", "i think it is {c}.")
WORDINGS = {
    "plus": (
        Wording("what is {a} plus {b}?", SENTENCES, 0.6),
        Wording("add {a} and {b}.", ("you get {c}.", *SENTENCES), 0.2),
        Wording("{name} has {a} {things} and gets {b} more. how many?", ("{name} has {c} {things}.", "{c} {things}."), 0.2),
    ),
    "minus": (
        Wording("what is {a} minus {b}?", SENTENCES, 0.6),
        Wording("take {b} from {a}.", ("you get {c}.", *SENTENCES), 0.2),
        Wording("{name} has {a} {things} and loses {b}. how many?", ("{name} has {c} {things}.", "{c} {things}."), 0.2),
    ),
}
STATEMENTS = {
    "plus": ("{a} plus {b} is {c}.", "if you add {a} and {b} you get {c}.", "{c} is {a} plus {b}."),
    "minus": ("{a} minus {b} is {c}.", "if you take {b} from {a} you get {c}.", "{c} is {a} minus {b}."),
}
CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>"


def splits(seed: int = SEED) -> tuple[list[Problem], list[Problem]]:
    """All problems, shuffled: nine tenths to train on, one tenth held out."""
    sums = [Problem(a, "plus", b) for a in range(LIMIT) for b in range(LIMIT)]
    differences = [Problem(a, "minus", b) for a in range(LIMIT) for b in range(a + 1)]
    problems = sums + differences
    random.Random(seed).shuffle(problems)
    return problems[len(problems) // 10 :], problems[: len(problems) // 10]


def ask(problem: Problem, rng: random.Random) -> tuple[str, str, str]:
    """A question in some wording, the bare answer, and a reply as pretraining gives it."""
    wording = rng.choice(WORDINGS[problem.sign])
    fill = _words(problem, rng)
    reply = "{c}" if rng.random() < wording.bare else rng.choice(wording.sentences)
    return wording.question.format(**fill), str(problem.answer), reply.format(**fill)


def _words(problem: Problem, rng: random.Random) -> dict[str, object]:
    return {"a": problem.a, "b": problem.b, "c": problem.answer, "name": rng.choice(NAMES), "things": rng.choice(THINGS)}


def pretraining_row(problem: Problem, rng: random.Random) -> dict:
    """Half chat, a quarter question and reply as plain text, a quarter statements."""
    question, _, reply = ask(problem, rng)
    kind = rng.random()
    if kind < 0.5:
        return {"text": CHAT.format(question=question, reply=reply)}
    if kind < 0.75:
        return {"text": f"{question} {reply}"}
    return {"text": rng.choice(STATEMENTS[problem.sign]).format(**_words(problem, rng))}


def sft_row(problem: Problem, rng: random.Random) -> dict:
    """The equation, a style that pretraining has never shown."""
    question, answer, _ = ask(problem, rng)
    equation = f"{problem.a} {'+' if problem.sign == 'plus' else '-'} {problem.b} = {answer}"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": equation}]}


def pair_row(problem: Problem, rng: random.Random) -> dict:
    """The bare answer against a wrong number or a wavering sentence."""
    question, answer, _ = ask(problem, rng)
    wrong = str(abs(problem.answer + rng.choice((-10, -2, -1, 1, 2, 10))))
    rejected = wrong if rng.random() < 0.5 else rng.choice(("i think it is {}.", "it is {} or {}.")).format(answer, wrong)
    return {"prompt": question, "chosen": answer, "rejected": rejected}


def grpo_row(problem: Problem, rng: random.Random) -> dict:
    """A question and the bare answer that earns the reward."""
    question, answer, _ = ask(problem, rng)
    return {"prompt": question, "answer": answer}


def pretraining_rows(count: int, seed: int = SEED) -> list[dict]:
    """Rows for `mlxlora sft` on text; problems recur in other wordings."""
    train, _ = splits(seed)
    rng = random.Random(f"pretraining {seed}")
    return [pretraining_row(rng.choice(train), rng) for _ in range(count)]


DATASETS: dict[str, tuple[Callable[[Problem, random.Random], dict], dict[str, int]]] = {
    "sft": (sft_row, {"train": 600, "valid": 100, "test": 100}),
    "pairs": (pair_row, {"train": 600, "valid": 100}),
    "grpo": (grpo_row, {"train": 1000, "valid": 128}),
}


def datasets(seed: int = SEED) -> dict[str, list[dict]]:
    """The bundled data sets by file name; within a set no problem occurs twice."""
    files = {}
    for name, (row, sizes) in DATASETS.items():
        rng = random.Random(f"{name} {seed}")
        train, held_out = (rng.sample(problems, len(problems)) for problems in splits(seed))
        for split, size in sizes.items():
            source = train if split == "train" else held_out
            files[f"{name}/{split}.jsonl"] = [row(source.pop(), rng) for _ in range(size)]
    return files


def write(path: Path, rows: Iterable[dict]) -> None:
    """JSONL, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the text of the bundled starter.")
    parser.add_argument("folder", type=Path, help="where the JSONL files go")
    parser.add_argument("--pretraining", type=int, metavar="ROWS", help="write train.jsonl with this many rows of text instead")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    files = {"train.jsonl": pretraining_rows(args.pretraining, args.seed)} if args.pretraining else datasets(args.seed)
    for name, rows in files.items():
        write(args.folder / name, rows)


if __name__ == "__main__":
    main()
