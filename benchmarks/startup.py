"""How long `mlxlora --help` takes, and `mlxlora sft` until its first step and until all is saved, against `mlx_lm.lora`.

Each is a process of its own, on MLX's default device. Both train the bundled starter on its bundled rows: 4 rows, one step,
LoRA on all layers, no validation. The first step is done when its loss is printed.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import yaml

from benchmarks.common import Cost, flags, parsed, ratios, tell
from mlxlora import starter

COLUMNS = {
    "case": "case",
    "ours": "mlxlora, s",
    "peer": "mlx-lm, s",
    "speed_ratio": "speed",
    "cpu_ratio": "CPU time",
    "ours_mb": "mlxlora, MB",
    "peer_mb": "mlx-lm, MB",
    "memory_ratio": "memory",
}
Command = Sequence[str]


def main() -> None:
    """Prints the table."""
    before = mx.default_device()
    options = parsed(flags(__doc__, repetitions=7))
    if mx.default_device() != before:
        raise SystemExit(f"--device {options.device}: other processes use MLX's default device, {before.type.name}")
    repetitions = 1 if options.quick else options.repetitions
    with tempfile.TemporaryDirectory() as folder:
        train = ours(folder), theirs(folder)
        cases = {
            "--help": (
                [sys.executable, "-m", "mlxlora_cli", "--help"],
                [sys.executable, "-m", "mlx_lm", "lora", "--help"],
                ("", ""),
            ),
            "sft, to its first step": (*train, ("train  loss", "▼")),  # what a line with a step's loss has
            "sft, one step, all saved": (*train, ("", "")),
        }
        chosen = {name: case for name, case in cases.items() if options.only in name}
        rows = [row(name, (our, their), until, repetitions) for name, (our, their, until) in chosen.items()]
    tell(rows, COLUMNS, options)


def row(name: str, commands: tuple[Command, Command], until: tuple[str, str], repetitions: int) -> dict[str, Any]:
    """Medians of both; they take turns, after one run each that fills the caches of disk and compiler."""
    seen: list[list[Cost]] = [[], []]
    for repetition in range(-1, repetitions):
        for side in (0, 1) if repetition % 2 else (1, 0):
            cost = timed(commands[side], until[side])
            if repetition >= 0:
                seen[side].append(cost)
    our, their = (Cost(*(median(values) for values in zip(*costs, strict=True))) for costs in seen)
    return {"case": name, "ours": round(our.wall, 2), "peer": round(their.wall, 2), **ratios(our, their)}


def timed(command: Command, until: str = "") -> Cost:
    """Of a process from its start to its end, or to the line with `until`; its memory is all that it held resident."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout
    there = [time.perf_counter() for line in process.stdout if until and until in line]
    _, status, used = os.wait4(process.pid, 0)
    process.stdout.close()
    if status:
        raise subprocess.CalledProcessError(os.waitstatus_to_exitcode(status), command)
    if until and not there:
        raise SystemExit(f"{command}: no line has {until!r}")
    held = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Cost((there[0] if until else time.perf_counter()) - began, used.ru_utime + used.ru_stime, held)


def ours(folder: str) -> Command:
    """One step of `mlxlora sft`."""
    model, data = str(starter.model_path()), str(starter.data_path("sft"))
    command = [sys.executable, "-m", "mlxlora_cli", "sft", "--model", model, "--data", data, "--mask-prompt", "--iters", "1"]
    return [
        *command,
        "--val-batches",
        "0",
        "--num-layers",
        "-1",
        "--steps-per-report",
        "1",
        "--overwrite",
        "--adapter-path",
        str(Path(folder, "ours")),
    ]


def theirs(folder: str) -> Command:
    """One step of `mlx_lm.lora`, with the same batch size and layers."""
    file = Path(folder, "theirs.yaml")
    settings = {"model": str(starter.model_path()), "data": str(starter.data_path("sft")), "train": True, "mask_prompt": True}
    settings |= {
        "iters": 1,
        "val_batches": 0,
        "num_layers": -1,
        "batch_size": 4,
        "steps_per_report": 1,
        "adapter_path": str(Path(folder, "theirs")),
    }
    file.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "mlx_lm", "lora", "--config", str(file)]


if __name__ == "__main__":
    main()
