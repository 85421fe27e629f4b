"""What the benchmarks share: models, flags, tables, JSON, timing and memory."""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.models import llama, qwen3

from mlxlora.utils.device import package_version


class Cost(NamedTuple):
    """What one call takes.

    Attributes:
        wall: seconds.
        cpu: CPU seconds of the process, all threads.
        peak: bytes above what was active before.
    """

    wall: float
    cpu: float
    peak: int


def cost(call: Callable[[], Any]) -> Cost:
    """Runs `call`, which has to evaluate what it computes."""
    mx.synchronize()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    mx.synchronize()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, max(mx.get_peak_memory() - before, 0))


def limited(gigabytes: float, call: Callable[[], Any]) -> None:
    """`call` with so much memory above what is active now; 0 = as MLX has it."""
    before = mx.set_memory_limit(mx.get_active_memory() + int(gigabytes * 1e9)) if gigabytes else 0
    call()
    if gigabytes:
        mx.set_memory_limit(before)


def interleaved(calls: Sequence[Callable[[], Any]], repetitions: int, budget: float = math.inf) -> list[Cost]:
    """Medians over the repetitions; the calls take turns, in turned order, so that a busy machine slows all alike.

    Args:
        budget: seconds, after which no repetition is begun.
    """
    seen: list[list[Cost]] = [[] for _ in calls]
    began = time.perf_counter()
    for repetition in range(repetitions):
        if repetition and time.perf_counter() - began > budget:
            break
        order = range(len(calls)) if repetition % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            seen[index].append(cost(calls[index]))
    return [Cost(*(median(values) for values in zip(*costs, strict=True))) for costs in seen]


def ratios(our: Cost, their: Cost) -> dict[str, Any]:
    """The columns that compare two costs: theirs over ours in time, ours over theirs in CPU time and memory."""
    return {
        "speed_ratio": round(their.wall / our.wall, 2),
        "cpu_ratio": round(our.cpu / their.cpu, 2),
        "ours_mb": round(our.peak / 1e6, 1),
        "peer_mb": round(their.peak / 1e6, 1),
        "memory_ratio": round(our.peak / max(their.peak, 1), 2),
    }


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table; `columns` maps keys of the rows to headings.

    >>> print(markdown([{"a": 1, "b": "x"}], {"a": "A", "b": "B"}))
    | A | B |
    |---|---|
    | 1 | x |
    """
    cells = [[str(row[key]).replace("|", "\\|") for key in columns] for row in rows]
    lines = [list(columns.values()), *cells]
    table = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([table[0], "|" + "---|" * len(columns), *table[1:]])


def write_json(path: str | Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a list of objects."""
    Path(path).write_text(json.dumps(list(rows), indent=2) + "\n", encoding="utf-8")


# --- the last rows that were kept ---------------------------------------------------------------

KNOWN = Path(__file__).parent / "known"
COMPARED = {"ours_mb": "MB", "memory_ratio": "memory", "speed_ratio": "speed", "ours": "ours"}
"""Figures that are shown beside those kept, where the rows have them."""


def kept_file(device: str) -> Path:
    """Where the rows of the script that runs are kept, for a kind of device."""
    return KNOWN / f"{Path(sys.argv[0]).stem}-{device}.json"


def changes(rows: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> str:
    """A table of what was kept and what is now, for the cases that are in both; "" if there are none.

    >>> print(changes([{"case": "a", "ours_mb": 3}, {"case": "b", "ours_mb": 1}], [{"case": "a", "ours_mb": 2}]))
    | case | MB kept | MB now |
    |---|---|---|
    | a | 2 | 3 |
    """

    before = {_case(row): row for row in kept}
    both = [(_case(row), before[_case(row)], row) for row in rows if _case(row) in before]
    shown = [key for key in COMPARED if any(key in old and key in new for _, old, new in both)]
    if not shown:
        return ""
    columns = {"case": "case"} | {f"{key} {side}": f"{COMPARED[key]} {side}" for key in shown for side in ("kept", "now")}
    table = [
        {"case": case} | {f"{key} {side}": row.get(key, "") for key in shown for side, row in (("kept", old), ("now", new))}
        for case, old, new in both
    ]
    return markdown(table, columns)


def _case(row: dict[str, Any]) -> str:
    return str(next(iter(row.values())))


def setting(device: str) -> str:
    """Versions and device, in one line."""
    packages = ("mlx", "mlx-lm", "mlxlora")
    return ", ".join(
        [f"{name} {package_version(name) or '(not installed)'}" for name in packages]
        + [f"{platform.system()} {platform.machine()}", device]
    )


def small_llama(*, hidden: int, layers: int, vocabulary: int) -> llama.Model:
    """A llama with random weights, the same at every call; heads of 32, untied."""
    mx.random.seed(0)
    args = llama.ModelArgs(
        model_type="llama",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=hidden * 11 // 4,
        num_attention_heads=hidden // 32,
        rms_norm_eps=1e-5,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return llama.Model(args)


def qwen3_600m() -> qwen3.Model:
    """The shape of Qwen3-0.6B with random bfloat16 weights, the same at every call."""
    mx.random.seed(0)
    args = {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "vocab_size": 151936}
    args |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
    model = qwen3.Model(qwen3.ModelArgs.from_dict(args | {"max_position_embeddings": 40960, "tie_word_embeddings": True}))
    model.set_dtype(mx.bfloat16)
    return model


def flags(description: str | None, repetitions: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), help="MLX's default device if not given")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--repetitions", type=int, default=repetitions, help="of each side; the medians are shown")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    parser.add_argument("--keep", action="store_true", help="keep the rows in benchmarks/known, for later runs to compare with")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags given, with the device set."""
    options = parser.parse_args()
    if options.device:
        mx.set_default_device(getattr(mx, options.device))
    return options


def tell(rows: Sequence[dict[str, Any]], columns: dict[str, str], options: argparse.Namespace) -> None:
    """Prints the table and how it differs from the rows that were kept, and writes the rows where --json and --keep say."""
    device = mx.default_device().type.name
    print(f"\n{setting(device)}\n\n{markdown(rows, columns)}")
    file = kept_file(device)
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if table := changes(rows, kept):
        print(f"\nAgainst {file.name}:\n\n{table}")
    if options.json:
        write_json(options.json, rows)
    if options.keep:
        file.parent.mkdir(exist_ok=True)
        write_json(file, list(({_case(row): row for row in (*kept, *rows)}).values()))


def run(
    cases: Iterable[Any],
    measure: Callable[[Any, int], dict[str, Any]],
    columns: dict[str, str],
    options: argparse.Namespace,
    name: Callable[[Any], str] = lambda case: case.name,
) -> None:
    """Measures the cases that --only names, a line each as it is known, and tells the table."""
    found = []
    for case in (case for case in cases if options.only in name(case)):
        found.append(measure(case, 2 if options.quick else options.repetitions))
        print(" ".join(str(value) for value in found[-1].values()), flush=True)
    tell(found, columns, options)
