"""The faults of tests/torture.py: each is a function that tries it once and raises what it finds wrong."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
from attrs import define, field

from mlxlora import starter
from mlxlora.adapters.files import read_arrays
from mlxlora.data.shape_buckets import LIMIT
from mlxlora.errors import InputError
from mlxlora.reporting.history import SETTINGS
from mlxlora.utils.marker import MARKER
from mlxlora.utils.safetensors import read_checked, write_arrays
from tests.support.ranks import free_ports
from tests.support.warm import python
from tests.training.test_resume import reached, records, same_run

CHILD, REWARD = (Path(__file__).with_name(f"torture_{name}.py") for name in ("child", "reward"))
SHORT = ("--iters", 12, "--save-every", 3, "--steps-per-report", 1, "--steps-per-eval", 4, "--val-batches", 1)
SHORT += ("--answers", 0, "--batch-size", 2)
ONLINE = ("--group-size", 2, "--max-completion-length", 6)
TAUGHT = ("--model", starter.model_path(), "--teacher-model", starter.model_path(), "--num-layers", -1, "--learning-rate", 1e-3)
MODES: dict[str, tuple[Any, ...]] = {
    "sft": ("sft",),
    "sft --packing": ("sft", "--packing"),
    "sft --dropout": ("sft", "--dropout", 0.2, "--grad-accumulation-steps", 2),
    "sft --grad-checkpoint": ("sft", "--grad-checkpoint", "--dropout", 0.2, "--neftune-noise-alpha", 5),
    "sft --train-type dora": ("sft", "--train-type", "dora"),
    "sft --train-type full": ("sft", "--train-type", "full", "--num-layers", 1),
    "sft --quantize 4": ("sft", "--quantize", 4),
    "sft --qat 4": ("sft", "--qat", 4),
    "sft, PiSSA": ("sft", "--init-lora-weights", "pissa"),
    "sft, bfloat16 adapters": ("sft", "--adapter-dtype", "bfloat16", "--optimizer", "muon"),
    "sft --keep-best": ("sft", "--keep-best"),
    "dpo": ("dpo",),
    "dpo --reference-model-path": ("dpo", "--reference-model-path", starter.model_path()),
    "orpo": ("orpo",),
    "cpo": ("cpo",),
    "kto": ("kto",),
    "grpo": ("grpo", *ONLINE),
    "grpo --num-iterations 2": ("grpo", *ONLINE, "--num-iterations", 2),
    "grpo --reward-file": ("grpo", *ONLINE, "--reward-file", REWARD, "--rewards", "mine", "--reward-timeout", 5),
    "online-dpo": ("online-dpo", *ONLINE),
    "distill": ("distill", *TAUGHT, "--data", starter.data_path("sft")),
    "gkd": ("gkd", *TAUGHT, "--data", starter.data_path("grpo"), "--max-completion-length", 6),
    "sft, 2 ranks": ("sft",),
    "sft --fully-shard, 2 ranks": ("sft", "--train-type", "full", "--num-layers", -1, "--fully-shard"),
}
"""Every way of training, as the beginning of a command line."""

REWARDED = "grpo --reward-file"
RANKS = {mode: 2 for mode in MODES if mode.endswith("2 ranks")}


class Lost(Exception):
    """A run did not survive as promised."""


class Skipped(Exception):
    """This machine cannot have the fault."""


def check(holds: Any, problem: str) -> None:
    if not holds:
        raise Lost(problem)


@define
class Several:
    """The processes of one run, as `mlx.launch` has them: where one fails, the others are told to end.

    Attributes:
        processes: by rank.
        victim: who is killed.
    """

    processes: list[subprocess.Popen]
    victim: int

    def poll(self) -> int | None:
        """None while all of them run."""
        return next((code for code in (process.poll() for process in self.processes) if code is not None), None)

    def kill(self) -> None:
        self.processes[self.victim].kill()

    def communicate(self, timeout: float) -> tuple[None, str]:
        deadline, told = time.monotonic() + timeout, False
        while any(process.poll() is None for process in self.processes):
            if not told and any(process.poll() for process in self.processes):
                told = True
                _each(self.processes, subprocess.Popen.terminate)
            if time.monotonic() > deadline:
                _each(self.processes, subprocess.Popen.kill)
                raise subprocess.TimeoutExpired("ranks", timeout)
            time.sleep(0.005)
        return None, "".join(process.communicate()[1] or "" for process in self.processes)

    @property
    def returncode(self) -> int:
        """Of a rank that was killed, else of one that failed."""
        return min((process.returncode for process in self.processes), key=lambda code: (code >= 0, -abs(code)))


def _each(processes: list[subprocess.Popen], do: Callable[[subprocess.Popen], None]) -> None:
    for process in processes:
        do(process)  # nothing, where it has ended


@define
class Lab:
    """Where faults happen.

    Attributes:
        root: folder for everything.
        wholes: the uninterrupted runs, with their seconds and their number of file operations.
    """

    root: Path
    wholes: dict[str, tuple[Path, float, int]] = field(factory=dict)
    _lock: Any = field(factory=threading.RLock)
    _taken: int = 0

    def place(self) -> Path:
        """A folder of its own for one trial; it does not exist."""
        with self._lock:
            self._taken += 1
            return self.root / f"{self._taken:05d}"

    def whole(self, mode: str) -> tuple[Path, float, int]:
        """The uninterrupted run of a mode."""
        with self._lock:
            if mode not in self.wholes:
                folder, began = self.place() / "run", time.monotonic()
                folder.parent.mkdir()
                outcome = ended(self.start(mode, folder, {"folder": str(folder), "count": str(folder.with_name("count"))}))
                check(outcome == (0, ""), f"uninterrupted: {outcome}")
                count = int(folder.with_name("count").read_text(encoding="utf-8"))
                self.wholes[mode] = (folder, time.monotonic() - began, count)
            return self.wholes[mode]

    def start(self, mode: str, folder: Path, fault: dict[str, Any] | None = None, *more: Any, **popen: Any) -> Any:
        """A process that runs a mode in a folder, or one for each rank; `cache` may be a folder of its own for caches."""
        interpreter = sys.executable if "preexec_fn" in popen else python()
        line = [interpreter, str(CHILD), *map(str, (*MODES[mode], *SHORT, *more, "--adapter-path", folder))]
        environment = os.environ | {
            "TORTURE": json.dumps(fault or {}),
            "MLXLORA_CACHE": str(popen.pop("cache", self.root / "cache")),
            "STARTER": str(starter.data_path("sft").parent),
        }
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": self.root}
        if mode not in RANKS:
            return subprocess.Popen(line, env=environment, **(pipes | popen))
        every = [subprocess.Popen(line, env=environment | own, **(pipes | popen)) for own in self._ranks(RANKS[mode])]
        return Several(every, sum(folder.name.encode()) % RANKS[mode])

    def _ranks(self, count: int) -> Iterator[dict[str, str]]:
        """What the environment of each rank has; rank 0 alone writes, and has the fault."""
        hosts = self.place().with_suffix(".json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]), encoding="utf-8")
        for rank in range(count):
            yield {"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank), **({"TORTURE": "{}"} if rank else {})}

    def resumes(self, mode: str, folder: Path, *more: Any) -> None:
        """Goes on in a folder, and compares what comes of it with the uninterrupted run."""
        outcome = ended(self.start(mode, folder, None, *resuming(folder), *more))
        check(outcome == (0, ""), f"{mode}: resumed: {outcome}")
        same(folder, self.whole(mode)[0])


def resuming(folder: Path) -> tuple[str, ...]:
    """What goes on with a run: it begins with its options in a file, and before that there is nothing to go on with."""
    return ("--resume",) if (folder / SETTINGS).exists() else ()


def ended(process: subprocess.Popen | Several, seconds: float = 120) -> tuple[int, str]:
    """The exit code and standard error of a process."""
    try:
        _, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise Lost(f"still running after {seconds} s") from None
    return process.returncode, err or ""


def refused(outcome: tuple[int, str], *words: str, codes: tuple[int, ...] = (1, 2)) -> None:
    """Checks that a command ended with one line that says why."""
    code, err = outcome
    check(code in codes, f"exit code {code}: {err[-300:]}")
    check(err.startswith("mlxlora: error: ") and err.count("\n") == 1, f"not one line: {err[-600:]!r}")
    check(all(word in err for word in words), f"does not say {words}: {err}")


def same(ours: Path, theirs: Path) -> None:
    """The same adapters, metrics and samples, and nothing half written."""
    try:
        same_run(ours, theirs)
    except AssertionError as error:
        pairs = zip(records(ours), records(theirs), strict=False)
        first = next((f"{a} is not {b}" for a, b in pairs if a != b), str(error)[:300])
        raise Lost(f"not the uninterrupted run: {' '.join(first.split())}") from None
    samples = [folder / "samples.jsonl" for folder in (ours, theirs)]
    check(len({file.read_bytes() if file.exists() else b"" for file in samples}) == 1, f"{ours}: other samples")
    left = [path.name for path in ours.rglob(".*") if path.name != MARKER]
    check(not left, f"{ours}: left {left}")


def wait_for(folder: Path, step: int, process: subprocess.Popen | Several, seconds: float = 100) -> None:
    """Until a run has reported a step, or is over."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not reached(folder, step) and time.monotonic() < deadline:
        time.sleep(0.002)


# --- killed -----------------------------------------------------------------------------------------


def killed(lab: Lab, folder: Path, rng: random.Random, mode: str) -> None:
    """SIGKILL at any moment of a run, or before any of its file operations; every fourth time the resumed run, too."""
    _, seconds, operations = lab.whole(mode)
    more: tuple[Any, ...] = ()
    for _ in range(rng.choice((1, 1, 1, 2))):
        while not _killed_once(lab, mode, folder, rng, seconds, operations, more):
            shutil.rmtree(folder, ignore_errors=True)  # it had ended before
            more = ()
        more = resuming(folder)
    lab.resumes(mode, folder)


def _killed_once(
    lab: Lab, mode: str, folder: Path, rng: random.Random, seconds: float, operations: int, more: tuple[Any, ...]
) -> bool:
    """Whether the process was killed before it ended."""
    if rng.random() < 0.5:
        fault = {"folder": str(folder), "at": rng.randrange(operations)}
        return ended(lab.start(mode, folder, fault, *more))[0] == -signal.SIGKILL
    process = lab.start(mode, folder, None, *more)
    if rng.random() < 0.8:
        wait_for(folder, -1, process)  # starting takes most of the time
        time.sleep(rng.uniform(0, 0.4))
    else:
        time.sleep(rng.uniform(0, seconds))
    process.kill()
    return ended(process)[0] == -signal.SIGKILL


def interrupted(lab: Lab, folder: Path, rng: random.Random) -> None:
    """Ctrl-C at any file operation, and SIGKILL at one of the next, while the run saves what it has."""
    mode = any_mode(rng)
    first = rng.randrange(lab.whole(mode)[2])
    fault = {"folder": str(folder), "interrupt": first, "at": first + rng.randrange(1, 12)}
    code, err = ended(lab.start(mode, folder, fault))
    check(code in (-signal.SIGKILL, 130) and not err, f"exit code {code}: {err[-300:]}")
    lab.resumes(mode, folder)


# --- what cannot be written ---------------------------------------------------------------------------


@contextmanager
def filesystem(folder: Path, size: int) -> Iterator[Callable[[str], bool]]:
    """A file system of so many bytes at a folder; what is yielded changes its options."""

    def mount(*arguments: str) -> bool:
        if sys.platform != "linux" or os.geteuid():
            return False
        return not subprocess.run(["mount", *arguments], stderr=subprocess.DEVNULL, check=False).returncode

    folder.mkdir(parents=True)
    if not mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)):
        raise Skipped("needs root on Linux")
    try:
        yield lambda options: mount("-o", f"remount,{options}", str(folder))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def any_mode(rng: random.Random) -> str:
    return rng.choice(("sft", "sft --train-type full", "sft, PiSSA", "dpo", "grpo"))


def sizes(folder: Path) -> list[int]:
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]


def disk_full(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A disk that is too small for the run becomes full somewhere in it; there is room again when it is resumed."""
    mode = any_mode(rng)
    with filesystem(folder, rng.randrange(1 << 12, sum(sizes(lab.whole(mode)[0])))) as remount:
        refused(ended(lab.start(mode, folder / "run")), str(folder))
        check(remount("size=64m"), "no more room")
        lab.resumes(mode, folder / "run")


def _failing(lab: Lab, folder: Path, rng: random.Random, number: int) -> None:
    mode = any_mode(rng)
    fault = {"folder": str(folder), "at": rng.randrange(lab.whole(mode)[2]), "then": number}
    refused(ended(lab.start(mode, folder, fault)), str(folder))
    lab.resumes(mode, folder)


def quota(lab: Lab, folder: Path, rng: random.Random) -> None:
    """From any file operation on, all of them fail: the quota is used up."""
    _failing(lab, folder, rng, errno.EDQUOT)


def bad_disk(lab: Lab, folder: Path, rng: random.Random) -> None:
    """From any file operation on, all of them fail with an error of the device."""
    _failing(lab, folder, rng, errno.EIO)


def large_files(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A write ends in the middle of a file, which may not become as large as it has to be."""
    mode = any_mode(rng)
    limit = rng.randrange(100, max(sizes(lab.whole(mode)[0])))
    process = lab.start(mode, folder, preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)))
    refused(ended(process), str(folder))
    lab.resumes(mode, folder)


def becomes_read_only(lab: Lab, folder: Path, rng: random.Random) -> None:
    """The file system becomes read-only during the run."""
    mode = any_mode(rng)
    with filesystem(folder, 64 << 20) as remount:
        process = lab.start(mode, folder / "run")
        wait_for(folder / "run", rng.randrange(1, 6), process)
        process.send_signal(signal.SIGSTOP)  # twelve steps are soon over
        while not remount("ro"):  # a file is being written
            process.send_signal(signal.SIGCONT)
            time.sleep(0.001)
            process.send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGCONT)
        outcome = ended(process)
        if outcome[0]:
            refused(outcome, "--resume", codes=(1,))
        remount("rw")
        lab.resumes(mode, folder / "run")


def read_only(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A folder that cannot be written, or be made, is refused."""
    mode, place = any_mode(rng), folder / rng.choice(("run", "made/run"))
    with filesystem(folder, 64 << 20) as remount:
        (folder / "run").mkdir()
        check(remount("ro"), "not read-only")
        refused(ended(lab.start(mode, place)), str(place), codes=(2,))
        remount("rw")
        lab.resumes(mode, place)


def folder_removed(lab: Lab, folder: Path, rng: random.Random) -> None:
    """The run's folder is removed while it trains."""
    mode = any_mode(rng)
    process = lab.start(mode, folder)
    wait_for(folder, rng.randrange(1, 6), process)
    process.send_signal(signal.SIGSTOP)  # twelve steps are soon over
    shutil.rmtree(folder)
    process.send_signal(signal.SIGCONT)
    refused(ended(process), str(folder), codes=(1,))
    lab.resumes(mode, folder)


# --- what changes beside it -----------------------------------------------------------------------------


def data_vanishes(lab: Lab, folder: Path, rng: random.Random) -> None:
    """Rows are removed or cut during the run, which has read them; the resumed run says that it cannot."""
    folder.mkdir()
    data = shutil.copytree(starter.data_path("sft"), folder / "data")
    process = lab.start("sft", folder / "run", None, "--data", data, "--model", starter.model_path(), "--learning-rate", 1e-3)
    step = rng.randrange(1, 9)
    wait_for(folder / "run", step, process)
    file = data / "train.jsonl"
    content = file.read_bytes()
    file.unlink() if rng.random() < 0.5 else file.write_bytes(content[: rng.randrange(len(content) // 4) * 2 + 3].rstrip(b"\n}"))
    killed = rng.random() < 0.5
    if killed:
        process.kill()
    check(ended(process)[0] in ((0, -signal.SIGKILL) if killed else (0,)), "did not end")
    options = ("--data", data, "--model", starter.model_path(), "--learning-rate", 1e-3)
    refused(ended(lab.start("sft", folder / "run", None, *options, "--resume")), str(data), codes=(2,))
    file.write_bytes(content)
    again = folder / "again"
    for place, more in ((folder / "run", ("--resume",)), (again, ())):
        outcome = ended(lab.start("sft", place, None, *options, *more))
        check(outcome == (0, ""), f"with its rows again: {outcome}")
    same(folder / "run", again)


def clock_jumps(lab: Lab, folder: Path, rng: random.Random) -> None:
    """The clock jumps by an hour or ten years, back and forth, in a run that is killed and in the one that goes on."""
    mode = any_mode(rng)
    process = lab.start(mode, folder, {"clock": rng.randrange(1000)})
    wait_for(folder, rng.randrange(1, 12), process)
    process.kill()
    ended(process)
    outcome = ended(lab.start(mode, folder, {"clock": rng.randrange(1000)}, "--resume"))
    check(outcome == (0, ""), f"resumed: {outcome}")
    same(folder, lab.whole(mode)[0])


def two_runs(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A second run in a folder is refused and disturbs nothing; it may go on once the first one is killed."""
    mode = any_mode(rng)
    first = lab.start(mode, folder)
    while first.poll() is None and not (folder / "config.yaml").exists():
        time.sleep(0.002)
    first.send_signal(signal.SIGSTOP)
    for flag in rng.sample(("--resume", "--overwrite"), 2):
        refused(ended(lab.start(mode, folder, None, flag)), str(folder), "another run", codes=(2,))
    first.send_signal(signal.SIGCONT)
    if rng.random() < 0.5:
        first.kill()
        ended(first)
        lab.resumes(mode, folder)
        return
    outcome = ended(first)
    check(outcome == (0, ""), f"the first run: {outcome}")
    same(folder, lab.whole(mode)[0])


# --- what is damaged --------------------------------------------------------------------------------------


def damage(file: Path, rng: random.Random) -> str:
    """Damages a file as disks, copies and full file systems do; says how."""
    content = bytearray(file.read_bytes())
    how = rng.choice(("flipped", "flipped", "truncated", "half written", "emptied", "removed"))
    place = rng.randrange(len(content))
    if how == "flipped":
        content[place] ^= 1 << rng.randrange(8)
    elif how == "truncated":
        del content[place:]
    elif how == "half written":
        content[place:] = bytes(len(content) - place)  # its length, but not its contents
    file.unlink() if how == "removed" else file.write_bytes(b"" if how == "emptied" else content)
    return how


def checkpoint_damaged(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A file of the newest checkpoint is damaged: it is named and the one before is used; with all damaged, nothing is."""
    mode = any_mode(rng)
    shutil.copytree(lab.whole(mode)[0], folder)
    before, newest = sorted((folder / "checkpoints").iterdir())
    file = rng.choice(sorted(newest.iterdir()))
    original = file.read_bytes()
    how = damage(file, rng)
    while file.exists() and file.read_bytes() == original:  # zeros in place of zeros
        how = damage(file, rng)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as out:
        outcome = ended(lab.start(mode, folder, None, "--resume", stdout=out))
    check(outcome == (0, ""), f"{file.name} {how}: {outcome}")
    told = log.read_text(encoding="utf-8")
    check(f"{newest.name}: damaged checkpoint" in told and f"{before.name} after step" in told, f"{file} {how}: {told[:500]}")
    same(folder, lab.whole(mode)[0])
    for checkpoint in sorted((folder / "checkpoints").iterdir()):
        (checkpoint / "state.json").write_bytes(b'{"step": 3')
    refused(ended(lab.start(mode, folder, None, "--resume")), "damaged checkpoint", "no earlier one is good", codes=(2,))
    check((folder / "metrics.jsonl").exists(), "a refused run removed something")


def adapters_damaged(lab: Lab, folder: Path, rng: random.Random) -> None:
    """Adapters are damaged, 25 times: that is noticed and the file named, or no number differs."""
    folder.mkdir()
    good = lab.whole(any_mode(rng))[0] / "adapters.safetensors"
    wanted = read_arrays(good)
    for _ in range(25):
        file = shutil.copy(good, folder / "adapters.safetensors")
        how = damage(Path(file), rng)
        try:
            found = read_arrays(file)
        except InputError as error:
            check(str(file) in str(error) and "\n" not in str(error), f"{how}: {error}")
            continue
        equal = found.keys() == wanted.keys() and all(mx.array_equal(found[name], wanted[name]).item() for name in wanted)
        check(equal, f"{how}: not noticed")


def caches_damaged(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A cache is damaged, 25 times: that is noticed, or no number differs; and once in a run, which names it."""
    folder.mkdir()
    source = np.random.default_rng(rng.randrange(1 << 30))
    wanted = {"tokens": source.integers(0, 9, 500), "ends": source.integers(0, 9, 50).astype(np.int32)}
    for _ in range(25):
        file = folder / "cache.safetensors"
        write_arrays(file, wanted)
        how = damage(file, rng)
        try:
            found = read_checked(file)
        except (ValueError, OSError):
            continue
        check(found.keys() == wanted.keys() and all(np.array_equal(found[k], wanted[k]) for k in wanted), f"{how}: not noticed")


def cache_of_a_run_damaged(lab: Lab, folder: Path, rng: random.Random) -> None:
    """The cache of a reference's log-probabilities is damaged between two runs: the second names it and makes it anew."""
    whole = lab.whole("dpo")[0]
    folder.mkdir()
    check(ended(lab.start("dpo", folder / "first", cache=folder / "cache")) == (0, ""), "the first run")
    (file,) = (folder / "cache" / "reference").iterdir()
    file.write_bytes(file.read_bytes()[: -rng.randrange(1, 400)])
    with (folder / "log").open("w") as out:
        check(ended(lab.start("dpo", folder / "run", stdout=out, cache=folder / "cache")) == (0, ""), "the second run")
    told = (folder / "log").read_text(encoding="utf-8")
    check(f"the cache {file} is damaged" in told, told[:500])
    same(folder / "run", whole)


# --- long -------------------------------------------------------------------------------------------------


def soak_sft(lab: Lab, folder: Path, rng: random.Random) -> None:
    """5 000 steps over rows of random lengths."""
    folder.mkdir()
    rows = [{"text": "".join(rng.choices("0123456789+= ", k=rng.randint(3, 250)))} for _ in range(3000)]
    (folder / "train.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    options = ("--model", starter.model_path(), "--data", folder, "--iters", 5000, "--num-layers", -1, "--max-seq-length", 256)
    _soaked(lab, folder / "run", "sft", *options, "--val-batches", 0, "--save-every", 500, "--steps-per-report", 20)


def soak_grpo(lab: Lab, folder: Path, rng: random.Random) -> None:
    """300 steps of GRPO, whose completions have any length."""
    folder.mkdir()
    options = ("--iters", 300, "--group-size", 4, "--max-completion-length", 24, "--val-batches", 0, "--save-every", 50)
    _soaked(lab, folder / "run", "grpo", *options, "--steps-per-report", 5)


GROWTH = (1.05, 16.0)
"""Memory is flat where the median of the last fifth is at most this factor and so many MB above that of the second fifth."""


def _soaked(lab: Lab, run: Path, mode: str, *options: Any) -> None:
    with run.with_name("log").open("w") as out:
        process = lab.start(mode, run, None, *options, stdout=out)
        sizes = []
        while process.poll() is None:
            sizes += _resident(process.pid) if (run / "metrics.jsonl").exists() else []
            time.sleep(0.1)
        outcome = ended(process)
    check(outcome == (0, ""), f"{outcome}")
    fifth = max(len(sizes) // 5, 1)
    first, last = median(sizes[fifth : 2 * fifth] or sizes), median(sizes[-fifth:])
    page = (run / "report.html").read_text(encoding="utf-8")
    compiled = int(page.partition("<td>shapes compiled</td>")[2].partition("<td>")[2].partition("</td>")[0])
    lab_notes.append(f"{mode}: {first:.0f} MB in the second fifth, {last:.0f} MB in the last; {compiled} shapes compiled")
    check(last <= first * GROWTH[0] + GROWTH[1], f"memory grew from {first:.0f} to {last:.0f} MB")
    check(compiled <= LIMIT, f"{compiled} shapes compiled")


lab_notes: list[str] = []
"""What the soak measured, for the report."""


def _resident(pid: int) -> list[float]:
    """[MB in memory], where /proc tells; [] after the end."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return []
    return [int(line.split()[1]) / 1e3 for line in status.splitlines() if line.startswith("VmRSS")]


# --- all of them ------------------------------------------------------------------------------------------

Trial = Callable[[Lab, Path, random.Random], None]
OTHERS: dict[str, tuple[Trial, int]] = {
    "Ctrl-C, then kill -9": (interrupted, 20),
    "disk full": (disk_full, 20),
    "quota used up": (quota, 20),
    "errors of the disk": (bad_disk, 20),
    "a write that ends early": (large_files, 20),
    "read-only folder": (read_only, 2),
    "read-only in the middle": (becomes_read_only, 5),
    "run's folder removed": (folder_removed, 5),
    "rows removed or cut in the middle": (data_vanishes, 10),
    "clock jumps": (clock_jumps, 10),
    "two runs on one folder": (two_runs, 10),
    "damaged checkpoint": (checkpoint_damaged, 40),
    "damaged adapters (25 at a time)": (adapters_damaged, 20),
    "damaged caches (25 at a time)": (caches_damaged, 20),
    "damaged cache of a run": (cache_of_a_run_damaged, 4),
    "soak: 5 000 steps of sft": (soak_sft, 1),
    "soak: 300 steps of grpo": (soak_grpo, 1),
}
FAULTS: dict[str, Trial] = {f"kill -9: {mode}": partial(killed, mode=mode) for mode in MODES}
FAULTS |= {name: trial for name, (trial, _) in OTHERS.items()}
