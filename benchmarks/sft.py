"""Speed and memory of a supervised step, against that of mlx-lm's trainer.

    python -m benchmarks.sft [--device gpu] [--quick] [--rows FILE.jsonl] [--json FILE]

Both train the same llama-shaped model (random float32 weights, LoRA of rank 8 on every linear layer, Adam) on the same
rows in one process, compiled, and take turns. Theirs is the compiled step of `mlx_lm.tuner.trainer.train` with its
`default_loss`, on the batches of its `iterate_batches`; ours is `make_step`, on our batches.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from attrs import evolve, frozen  # noqa: E402
from mlx_lm.tuner.datasets import CacheDataset  # noqa: E402
from mlx_lm.tuner.trainer import default_loss, iterate_batches  # noqa: E402

from benchmarks.common import flags, interleaved, limited, parsed, qwen3_600m, ratios, run, small_llama  # noqa: E402
from mlxlora import AdapterOptions, make_step, objectives, prepare  # noqa: E402
from mlxlora.data.batching import Order, collate  # noqa: E402
from mlxlora.data.tokenize import Example  # noqa: E402
from mlxlora.models.grad_checkpoint import checkpointed  # noqa: E402

COLUMNS = {
    "case": "case",
    "ours": "ours, tokens/s",
    "peer": "mlx-lm, tokens/s",
    "speed_ratio": "speed",
    "cpu_ratio": "CPU time",
    "ours_mb": "ours, MB",
    "peer_mb": "mlx-lm, MB",
    "memory_ratio": "memory",
    "ours_error": "ours, loss error",
    "peer_error": "mlx-lm, loss error",
}
Lengths = Sequence[tuple[int, int]]


@frozen
class Case:
    """A model and its rows.

    Attributes:
        name: what the table says.
        hidden: hidden size of the model.
        vocabulary: tokens it knows.
        lengths: (tokens, scored tokens at the end) of every row.
        batch_size: rows in a batch.
        base: makes the model; None: the small llama of these sizes.
        limit: GB above the weights that ours may hold, with gradient checkpointing; 0 = neither.
        alone: the peer cannot do it.
    """

    name: str
    hidden: int
    vocabulary: int
    lengths: Lengths
    batch_size: int = 4
    base: Callable[[], nn.Module] | None = None
    limit: float = 0.0
    alone: bool = False


def cases(lengths: Lengths) -> list[Case]:
    """Rows of one length, all or 30 % of it scored, and the given mix of lengths."""
    fixed = [(256, 256, 4096), (256, 512, 32768), (512, 256, 32768), (512, 512, 4096)]
    found = [
        Case(f"D={hidden} T={length} V={vocabulary}, {share:.0%} scored", hidden, vocabulary, [(length, int(share * length))] * 4)
        for hidden, length, vocabulary in fixed
        for share in (1.0, 0.3)
    ]
    for vocabulary in (4096, 32768):
        found.append(Case(f"D=256 V={vocabulary}, mixed lengths, completions", 256, vocabulary, lengths))
        found.append(Case(f"D=256 V={vocabulary}, mixed lengths, all scored", 256, vocabulary, [(n, n) for n, _ in lengths]))
    return found


def gpu_cases() -> list[Case]:
    """Qwen3-0.6B's shape, bfloat16; six batches, because the first one after a pause allocates memory."""
    named = "Qwen3-0.6B shape, {} x {}, {:.0%} scored"
    cells = [(rows, length, share) for rows, length in ((8, 2048), (4, 1024)) for share in (1.0, 0.3)]
    found = [Case(named.format(*c), 1024, 151936, [(c[1], int(c[2] * c[1]))] * 6 * c[0], c[0], qwen3_600m) for c in cells]
    leaner = evolve(found[0], name=found[0].name + ", ours with checkpointing and 6 GB", limit=6.0)
    name, rows = "Qwen3-0.6B shape, 1 x 32768, checkpointing and 4 GB", [(32768, 32768)]
    long = Case(name, 1024, 151936, rows, 1, qwen3_600m, 4.0, alone=True)
    return [*found, leaner, long]


def quick_cases() -> list[Case]:
    """The same in seconds, to see that it runs: its numbers mean nothing."""
    return [
        Case("quick, D=64 T=64 V=512, 30% scored", 64, 512, [(64, 19)] * 4),
        Case("quick, D=64 V=512, mixed lengths", 64, 512, mixed_lengths(8)),
    ]


def mixed_lengths(rows: int, loss_mask: float = 0.6) -> Lengths:
    """Log-normal lengths of 20 to 512 tokens, median 150, as short question-answer rows have."""
    lengths = np.exp(np.random.default_rng(0).normal(np.log(150), 0.45, rows)).clip(20, 512).astype(int)
    return [(int(n), int(loss_mask * n)) for n in lengths]


def file_lengths(path: str, rows: int) -> Lengths:
    """Lengths of the rows of a JSONL file with question/answer or prompt/completion, at 4 bytes a token."""
    found = []
    with Path(path).open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            prompt, completion = (row.get(a) or row[b] for a, b in (("question", "prompt"), ("answer", "completion")))
            sizes = [max(len(text.encode()) // 4, 1) for text in (prompt, completion)]
            found.append((min(sum(sizes), 512) + 1, min(sizes[1], 511)))
            if len(found) == rows:
                return found
    raise SystemExit(f"{path}: {len(found)} rows, {rows} are needed")


# --- the two sides --------------------------------------------------------------------------------


def make_model(case: Case) -> nn.Module:
    """The same weights at every call."""
    if case.base:
        model = prepare(case.base(), AdapterOptions(num_layers=-1, rank=8))
    else:
        model = prepare(
            small_llama(hidden=case.hidden, layers=4, vocabulary=case.vocabulary), AdapterOptions(num_layers=-1, rank=8)
        )
        model.lm_head.weight *= 8  # else every token's loss is log V, and nothing could be seen of a wrong one
    mx.eval(model.parameters())
    return model.train()


def make_rows(case: Case) -> list[Example]:
    """Random tokens of the case's lengths."""
    rng = np.random.default_rng(0)
    return [
        Example(rng.integers(1, case.vocabulary, n).astype(np.int32), np.arange(n) >= max(n - loss_mask, 1), None, "random")
        for n, loss_mask in case.lengths
    ]


def our_epoch(case: Case, rows: Sequence[Example], *, wait: bool = False) -> tuple[Callable[[], None], float]:
    """(a pass over the rows, the loss of the first batch before any update); `wait`: a step begins when the one before is over."""
    order = Order(tuple(len(row.tokens) for row in rows), case.batch_size, seed=0)
    batches = [collate([rows[i] for i in batch]) for batch, _ in zip(order.batches(), range(order.per_epoch()), strict=False)]
    model = make_model(case)
    step = make_step(checkpointed(model) if case.limit else model, optim.Adam(learning_rate=1e-5), objectives.sft())

    def epoch() -> None:  # as the loop of a run does: a step begins before the one before is read
        begun = deque[Any]()
        for batch in batches:
            begun.append(step.begin(batch))
            while len(begun) > (0 if wait else 1):
                step.ended(begun.popleft(), whole=wait)
        if begun:
            step.ended(begun.pop())
        mx.eval(step.state)

    loss = step(collate(rows[: case.batch_size]))["loss"].item()
    return partial(limited, case.limit, epoch), loss


def their_epoch(case: Case, rows: Sequence[Example]) -> tuple[Callable[[], float], float]:
    """The same with mlx-lm's trainer: this is the step that its `train` compiles."""
    model, optimizer = make_model(case), optim.Adam(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, tokens), grad = loss_and_grad(model, batch, lengths)
        optimizer.update(model, grad)
        return loss, tokens

    def run(batches: Sequence[tuple[mx.array, mx.array]]) -> float:
        loss = mx.array(0.0)
        for batch in batches:
            loss, tokens = step(*batch)
            mx.eval(state, loss, tokens)
        return loss.item()  # type: ignore[return-value]

    first = run(list(their_batches(case, rows[: case.batch_size])))
    batches = list(their_batches(case, rows))
    return partial(run, batches), first


def their_batches(case: Case, rows: Sequence[Example]) -> Iterator[tuple[mx.array, mx.array]]:
    """mlx-lm's batches of one epoch, from its own data set class."""
    return iterate_batches(CacheDataset(_Rows(rows)), case.batch_size, max_seq_length=2048, seed=0)


class _Rows(list[Example]):
    """As mlx-lm's data sets are: raw rows, and how one becomes tokens and the offset of the first scored one."""

    def __getitem__(self, index: Any) -> Any:
        return {"row": super().__getitem__(index)}

    def process(self, raw: dict[str, Example]) -> tuple[list[int], int]:
        example = raw["row"]
        return example.tokens.tolist(), int(example.loss_mask.argmax())


def definition(case: Case, rows: Sequence[Example]) -> float:
    """Mean cross entropy of the scored tokens, each row by itself and without padding."""
    model, total, count = make_model(case), 0.0, 0
    for row in rows:
        at, tokens = np.flatnonzero(row.loss_mask), mx.array(row.tokens)
        logits = model(tokens[None, :-1])[0, mx.array(at - 1)]
        total += nn.losses.cross_entropy(logits, tokens[mx.array(at)], reduction="sum").item()
        count += len(at)
    return total / count  # type: ignore[return-value]


# --- the table --------------------------------------------------------------------------------------


def measure(case: Case, repetitions: int, *, wait: bool = False) -> dict[str, Any]:
    """One row of the table."""
    rows = make_rows(case)
    tokens = sum(len(row.tokens) for row in rows)
    ours, our_loss = our_epoch(case, rows, wait=wait)
    ours()  # compiles every shape
    if case.alone:
        (our,) = interleaved([ours], repetitions)
        known = {"case": case.name, "ours": round(tokens / our.wall), "ours_mb": round(our.peak / 1e6, 1)}
        return dict.fromkeys(COLUMNS, "") | known
    theirs, their_loss = their_epoch(case, rows)
    theirs()
    our, their = interleaved([ours, theirs], repetitions)
    exact = definition(case, rows[: case.batch_size])
    return {
        "case": case.name,
        "ours": round(tokens / our.wall),
        "peer": round(tokens / their.wall),
        **ratios(our, their),
        "ours_error": f"{abs(our_loss / exact - 1):.0e}",
        "peer_error": f"{abs(their_loss / exact - 1):.0e}",
    }


def main() -> None:
    parser = flags(__doc__, repetitions=7)
    parser.add_argument("--rows", metavar="FILE", help="JSONL whose rows give the mixed lengths; drawn at random if not given")
    parser.add_argument("--wait", action="store_true", help="ours waits for every step before it begins the next")
    options = parsed(parser)
    lengths = file_lengths(options.rows, 32) if options.rows else mixed_lengths(32)
    full = cases(lengths) if mx.default_device() == mx.Device(mx.cpu) else gpu_cases()
    run(quick_cases() if options.quick else full, partial(measure, wait=options.wait), COLUMNS, options)


if __name__ == "__main__":
    main()
