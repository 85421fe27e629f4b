"""What several processes cost and could gain: steps measured on this machine, and the time that gradients would take on real links.

Measured: the bundled starter model, `mlxlora sft` with one global batch, over MLX's ring and the loopback device. Ranks of one
machine share its cores, so this shows what the sums cost; it is no claim of a speed-up.

Modelled: a ring sums n copies of B bytes in 2(n-1)/n·B/bandwidth + 2(n-1)·latency seconds, after a step of `--seconds`/n; the
latency is paid once more for the counts and the tokens. Nothing overlaps. Bandwidths are those on the box, times `--efficiency`.

    python -m benchmarks.scaling [--parameters 2293760] [--seconds 1.5] [--quick] [--json FILE]
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import markdown, write_json

Row = dict[str, Any]

LINKS = {"1 GbE": (1e9 / 8, 100e-6), "10 GbE": (10e9 / 8, 30e-6), "Thunderbolt 5": (80e9 / 8, 20e-6)}
"""Bytes a second and seconds of latency, one way."""
SMALL = 2  # sums of a few bytes before each step: tokens, and the counts of the objective's terms


def sum_seconds(size: float, ranks: int, bandwidth: float, latency: float) -> float:
    """Seconds in which a ring of ranks sums `size` bytes.

    >>> sum_seconds(1e9, 2, 1e9, 0.0)
    1.0
    """
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency


def modelled(size: float, seconds: float, ranks: int, link: str, efficiency: float) -> Row:
    """A row of the table of real links."""
    bandwidth, latency = LINKS[link]
    told = sum_seconds(size, ranks, efficiency * bandwidth, latency) + SMALL * 2 * (ranks - 1) * latency
    step = seconds / ranks + told
    return {"link": link, "ranks": ranks, "sum_ms": 1e3 * told, "step_s": step, "speedup": seconds / step}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def measured(ranks: int, steps: int, batch: int) -> Row:
    """Median seconds of a step of so many processes, from the rates that the run reports; the first steps compile."""
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
        options = f"sft --iters {steps} --batch-size {batch} --val-batches 0 --steps-per-report 1 --quiet --answers 0"
        command = [sys.executable, "-m", "mlxlora_cli", *options.split(), "--adapter-path", f"{folder}/run"]
        base = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        told = [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        processes = [subprocess.Popen(command, env=base | own, stdout=subprocess.DEVNULL) for own in told]
        if max(process.wait(600) for process in processes):
            sys.exit("a rank failed")
        rows = [json.loads(line) for line in (Path(folder) / "run/metrics.jsonl").read_text().splitlines()]
    tokens = [b["tokens"] - a["tokens"] for a, b in pairwise(rows)]
    seconds = [n / row["tokens_per_second"] for n, row in zip(tokens, rows[1:], strict=True)]
    return {"ranks": ranks, "step_s": median(seconds[len(seconds) // 3 :]), "loss": rows[-1]["loss"]}


def main() -> None:
    """Prints both tables, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parameters", type=float, default=2_293_760, help="trained numbers; default: LoRA rank 8 on q and v, 28 layers"
    )
    parser.add_argument("--bytes", type=int, default=4, help="of each number's gradient; default: 4 (float32)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a step of the whole batch on one machine")
    parser.add_argument("--efficiency", type=float, default=0.7, help="share of a link's bandwidth that a ring gets")
    parser.add_argument("--steps", type=int, default=60, help="of a measured run")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step of a measured run, over all ranks")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    chosen = parser.parse_args()
    size = chosen.parameters * chosen.bytes
    sizes, steps = ((1, 2), 12) if chosen.quick else ((1, 2, 4), chosen.steps)
    here = [measured(ranks, steps, chosen.batch) for ranks in sizes]
    there = [modelled(size, chosen.seconds, n, link, chosen.efficiency) for link in LINKS for n in (2, 4, 8)]
    print(f"\nMeasured: {os.cpu_count()} cores shared by all ranks, no speed-up claim\n\n{table(here)}")
    print(f"\nModelled: {size / 1e6:.4g} MB of gradients a step, {chosen.seconds:g} s a step alone\n\n{table(there)}")
    if chosen.json:
        write_json(chosen.json, [*here, *there])


def table(rows: list[Row]) -> str:
    """Markdown, numbers with three digits."""
    short = [{name: f"{value:.3g}" if isinstance(value, float) else value for name, value in row.items()} for row in rows]
    return markdown(short, {name: name.replace("_", " ") for name in rows[0]})


if __name__ == "__main__":
    main()
