"""Everything that can stop or spoil a run, many times: what was finished is kept, and the resumed run is the uninterrupted one.

    python -m tests.robustness.torture --points 200 --jobs 2 --seed 0 --report tests/robustness/TORTURE.md

The faults are in torture_faults.py; all train the bundled starter model. Those that need a file system of their own (Linux,
root) are skipped elsewhere, and the table says so.
"""

import argparse
import os
import platform
import random
import shlex
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path

from attrs import define, field

from tests.robustness import torture_faults
from tests.robustness.torture_exact import EXACT
from tests.robustness.torture_faults import GROWTH, LIMIT, MODES, Lab, Skipped, lab_notes
from tests.robustness.torture_hostile import PLANTED

OTHERS = torture_faults.OTHERS | PLANTED | EXACT
FAULTS = torture_faults.FAULTS | {name: trial for name, (trial, _) in (PLANTED | EXACT).items()}


def counts(points: int) -> dict[str, int]:
    """How often each fault is tried; `points` are those of kill -9, over all modes."""
    share, rest = divmod(points, len(MODES))
    kills = {f"kill -9: {mode}": share + (i < rest) for i, mode in enumerate(MODES)}
    return kills | {name: count for name, (_, count) in OTHERS.items()}


@define
class Tally:
    """What came of the trials of one fault."""

    tried: int = 0
    lost: int = 0
    skipped: str = ""
    problems: list[str] = field(factory=list)

    def row(self, name: str) -> str:
        """As a line of the table."""
        return f"| {name} | {self.tried} | {self.tried - self.lost} | {self.lost} | {self.skipped} |"


def attempt(lab: Lab, name: str, seed: int, tally: Tally) -> None:
    """One trial; what is lost stays on disk."""
    place = lab.place()
    try:
        FAULTS[name](lab, place, random.Random(seed))
    except Skipped as reason:
        tally.skipped = str(reason)
        return
    except Exception as error:
        tally.lost += 1
        tally.problems.append(f"{name}, seed {seed}: {type(error).__name__}: {error}")
        print(tally.problems[-1], flush=True)
    else:
        shutil.rmtree(place, ignore_errors=True)
    tally.tried += 1


def torture(numbers: dict[str, int], jobs: int, seed: int, root: Path) -> dict[str, Tally]:
    """Tries every fault so often."""
    lab, tallies = Lab(root), {name: Tally() for name in numbers}
    trials = [(name, seed * 1_000_000 + i) for name, count in numbers.items() for i in range(count)]
    long = [trial for trial in trials if trial[0].startswith("soak")]
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(attempt, lab, *trial, tallies[trial[0]]) for trial in long + [t for t in trials if t not in long]]
        for done, task in enumerate(tasks, 1):
            task.result()
            if done % 20 == 0:
                print(f"{done}/{len(tasks)}", flush=True)
    return tallies


HEADING = "| fault | tried | survived | lost | |\n| --- | ---: | ---: | ---: | --- |"


def report(tallies: dict[str, Tally], command: str, seconds: float) -> str:
    """The table, as tests/robustness/TORTURE.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "transformers"))
    whole = Tally(sum(t.tried for t in tallies.values()), sum(t.lost for t in tallies.values()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{cores} CPU cores, {platform.system()}, Python {platform.python_version()}, {versions}"
    lines = ["# Torture", "", f"{date.today()}, {machine}; {seconds / 60:.0f} minutes:", "", "```bash", command, "```", ""]
    lines += [
        "Every trial is a run of the bundled starter model: twelve steps, a checkpoint after every third. Survived: no traceback,",
        "one line and exit code 1 or 2 where the run had to end; when the fault is over, `--resume` ends with the adapters of the",
        "uninterrupted run bit for bit and with its metrics and samples (without times and memory); nothing half written is left.",
        "A kill comes at a random moment or before a random file operation; before the first checkpoint, the run starts again and",
        f"counts too. Memory in a soak is flat: the median of the last fifth is at most {GROWTH[0] - 1:.0%} + {GROWTH[1]:.0f} MB",
        f"above that of the second; at most {LIMIT} shapes are compiled.",
        "",
        HEADING,
        *(tally.row(name) for name, tally in tallies.items()),
        whole.row("all"),
        "",
        *(f"- {note}." for note in lab_notes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def updated(text: str, tallies: dict[str, Tally], command: str) -> str:
    """A report with the rows of some faults, which are new or were tried again."""
    lines = text.splitlines()
    known = {line.split("|")[1].strip(): line for line in lines if line.startswith("| ")}
    again = {name: tally.row(name) for name, tally in tallies.items()}
    rows = [(known | again)[name] for name in FAULTS if name in known | again]
    cells = [row.split("|") for row in rows]
    whole = Tally(sum(int(row[2]) for row in cells), sum(int(row[4]) for row in cells))
    start, end = lines.index(HEADING.splitlines()[1]) + 1, lines.index(known["all"])
    told = f"- Again or for the first time, {date.today()}, with its rows above: `{command}`."
    return "\n".join([*lines[:start], *rows, whole.row("all"), *lines[end + 1 :], told]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--points", type=int, default=200, help="kills, over all modes")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=[], help="faults whose names contain one of these")
    parser.add_argument("--times", type=int, help="so many trials of each")
    parser.add_argument("--report", type=Path, help="file for the table; with --only, its other rows stay")
    options = parser.parse_args()
    wanted = [name for name in FAULTS if not options.only or any(part in name for part in options.only)]
    numbers = {name: options.times or counts(options.points)[name] for name in wanted}
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torture-", ignore_cleanup_errors=True) as root:
        Path(root).chmod(0o755)
        tallies = torture(numbers, options.jobs, options.seed, Path(root))
    command = shlex.join(["python", "-m", "tests.robustness.torture", *sys.argv[1:]])
    text = report(tallies, command, time.monotonic() - began)
    if options.report and options.only and options.report.exists():
        text = updated(options.report.read_text(encoding="utf-8"), tallies, command)
    print(text)
    if options.report:
        options.report.write_text(text, encoding="utf-8")
    sys.exit(1 if any(tally.lost for tally in tallies.values()) else 0)


if __name__ == "__main__":
    main()
