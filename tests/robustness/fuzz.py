"""Millions of broken inputs: each is accepted, or refused by one clear line; none crashes, hangs or leaves anything half written.

    python -m tests.robustness.fuzz --target all --cases 1000000 --seed 1

Cases are mutations of valid ones, by bytes and by JSON values, and every hundredth comes from a hypothesis strategy. What is
called is what a run calls: rows are read, understood and tokenised; YAML becomes options; adapter folders are put on a model,
merged and imported; safetensors are read; templates are rendered; what a reward answers is checked; paths, links, configurations
of models, numbers, the folders of foreign runs and checkpoints are checked; text is printed.
"""

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from attrs import define, field
from hypothesis import HealthCheck, Phase, given, settings

from mlxlora.errors import InputError, RunError
from mlxlora.utils.blas import load_fast_blas

load_fast_blas()  # before MLX is imported

from tests.robustness.fuzz_targets import TARGETS, Target  # noqa: E402

LIMIT = 10.0  # seconds for a case
GIGABYTES = 4  # beyond what the process has at the start
EVERY = 100  # of so many cases, one comes from hypothesis


class Hang(BaseException):
    """A case took too long."""


@define
class Tally:
    """What came of the cases of one target."""

    cases: int = 0
    accepted: int = 0
    refused: int = 0
    hangs: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    crashes: Counter[str] = field(factory=Counter)
    examples: dict[str, Any] = field(factory=dict)

    def row(self, name: str) -> str:
        """As a line of the table."""
        rate = self.cases / self.seconds if self.seconds else 0
        numbers = (self.cases, self.accepted, self.refused, sum(self.crashes.values()), self.hangs)
        return f"{name:12}" + "".join(f"{n:>12,}" for n in numbers) + f"{self.slowest * 1e3:>12,.0f}{rate:>10,.0f}"


HEADING = f"{'target':12}" + "".join(f"{name:>12}" for name in ("cases", "accepted", "refused", "crashes", "hangs", "slowest ms"))
HEADING += f"{'a second':>10}"


# --- one case -----------------------------------------------------------------------------------


def attempt(target: Target, folder: Path, case: Any, tally: Tally) -> str | None:
    """Runs a case and counts it; what is wrong with the product, or None."""
    before, began, problem = listing(folder), time.perf_counter(), None
    try:
        with alarm(LIMIT):
            target.call(folder, case)
        tally.accepted += 1
    except (InputError, RunError) as error:
        tally.refused += 1
        problem = fault(str(error), folder.parent if target.names else None)
    except Hang:
        tally.hangs += 1
        problem = "hang"
    except (Exception, SystemExit) as error:
        problem = signature(error)
    took = time.perf_counter() - began
    tally.cases, tally.slowest, tally.seconds = tally.cases + 1, max(tally.slowest, took), tally.seconds + took
    left = listing(folder) - before - target.outputs
    clean(folder)
    problem = problem or (f"left {', '.join(sorted(left))}" if left else None)
    if problem and problem != "hang":
        tally.crashes[problem] += 1
    if problem:
        tally.examples.setdefault(problem, case)
    return problem


def fault(message: str, folder: Path | None) -> str | None:
    """What is wrong with a message; None where it is clear."""
    if not message.strip() or "\n" in message or len(message) > 3000:
        return f"unclear message of {len(message)} characters: {message[:80]!r}"
    if folder and not any(name in message for name in (str(folder), "--", "no reward function")):
        return f"message names no file: {' '.join(message.split()[:6])}"
    return None


def signature(error: BaseException) -> str:
    """Kind of an error and the innermost line of the product that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/mlxlora/" in f.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:90]}"


def listing(folder: Path) -> frozenset[str]:
    return frozenset(os.listdir(folder))  # noqa: PTH208 - twice as fast


def clean(folder: Path) -> None:
    for entry in os.scandir(folder):
        shutil.rmtree(entry.path) if entry.is_dir() else Path(entry.path).unlink()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises `Hang` after so many seconds."""

    def ring(*_: Any) -> None:
        raise Hang

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def fuzz(name: str, cases: int, seed: int, folder: Path, stop: float = float("inf")) -> Tally:
    """So many cases of a target, fewer where the clock reaches `stop` (of time.monotonic)."""
    target, tally, rng = TARGETS[name](), Tally(), random.Random(f"{name} {seed}")
    with contextlib.suppress(InputError, RunError):
        target.call(folder, target.make(random.Random(name)))  # imports what the target needs, before a clock runs
    chunk = max(EVERY, 10 * EVERY if cases > 10**5 else EVERY)
    for start in range(0, cases, chunk):
        here = min(chunk, cases - start)
        drawn = here // EVERY
        for _ in range(here - drawn):
            attempt(target, folder, target.make(rng), tally)
        if drawn:
            from_hypothesis(target, folder, tally, drawn, rng.getrandbits(32))
        if time.monotonic() > stop:
            break
    return tally


def from_hypothesis(target: Target, folder: Path, tally: Tally, count: int, seed: int) -> None:
    """Cases of the target's strategy."""
    from hypothesis import seed as seeded

    @seeded(seed)
    @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(target.strategy)
    def run(case: Any) -> None:
        attempt(target, folder, case, tally)

    run()


# --- the script ---------------------------------------------------------------------------------


def main() -> int:
    """Prints the table; 1 if anything crashed, hung or left files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="of each target")
    parser.add_argument("--target", choices=(*TARGETS, "all"), default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop a target after this long")
    asked = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if Path("/proc").exists() else 0
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 10**9,) * 2)
    warnings.simplefilter("ignore")
    failed = False
    print(HEADING, flush=True)
    for name in TARGETS if asked.target == "all" else (asked.target,):
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as place:
            folder = Path(place, "work")
            folder.mkdir()
            tally = fuzz(name, asked.cases, asked.seed, folder, time.monotonic() + 60 * asked.minutes)
        print(tally.row(name), flush=True)
        failed = failed or bool(tally.examples)
        for problem, case in islice(tally.examples.items(), 20):
            print(f"    {tally.crashes[problem] or tally.hangs:,} x {problem}\n        {case!r:.300}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
