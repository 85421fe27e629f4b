"""What the examples share: their two flags, greedy answers, and a line that says what was reached.

From a shell: `python examples/common.py RUN METRIC` prints a validation metric of a run, at its first and last step.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

OUTPUTS = Path("outputs")


def arguments(file: str, iters: int) -> tuple[int, Path]:
    """--iters and --output, a folder that is emptied first."""
    parser = argparse.ArgumentParser(description=f"Runs {Path(file).name}.")
    parser.add_argument("--iters", type=int, default=iters, help=f"optimizer steps of each run; default: {iters}")
    parser.add_argument("--output", type=Path, default=OUTPUTS / Path(file).stem, help="folder to write")
    args = parser.parse_args()
    shutil.rmtree(args.output, ignore_errors=True)
    args.output.mkdir(parents=True)
    return args.iters, args.output


def read_rows(path: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    """JSONL, one row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def answers(model: Path, prompts: Sequence[str], adapters: Path | None = None, max_tokens: int = 20) -> list[str]:
    """What a model makes of prompts, decoding greedily. mlx-lm does it: adapter folders are its own format."""
    from mlx_lm import batch_generate, load

    network, tokenizer = load(str(model), adapter_path=str(adapters) if adapters else None)[:2]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    tokens = [tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return [text.strip() for text in batch_generate(network, tokenizer, tokens, max_tokens=max_tokens).texts]


def share(given: Sequence[str], wanted: Sequence[str]) -> float:
    """How many answers are exactly what was wanted, of 1."""
    return sum(a == b for a, b in zip(given, wanted, strict=True)) / len(wanted)


def validations(run: Path, metric: str) -> tuple[float, float]:
    """A metric of the first and of the last validation of a run."""
    rows = [row for row in read_rows(run / "metrics.jsonl") if row["split"] == "valid"]
    return rows[0][metric], rows[-1][metric]


def measured(what: str, before: float, after: float) -> None:
    """The last lines of every example."""
    print(f"measured: {what}: {before:.4g} -> {after:.4g}")


if __name__ == "__main__":
    measured(sys.argv[2], *validations(Path(sys.argv[1]), sys.argv[2]))
