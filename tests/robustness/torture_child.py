"""A process of `python -m tests.robustness.torture`: the command line with the fault that $TORTURE describes, as JSON.

    {"folder": "/tmp/run", "at": 7, "then": "kill"}

The seventh time that something in the folder is about to be written, renamed or removed, the process is killed; with a number
in place of `kill`, that and all later ones fail with this `errno`. At `"interrupt"` there is a Ctrl-C. `"count"` names a file for
how many there were, `"clock"` is the seed of a clock that jumps, `"validation"` the number of a validation that fails. `"reward"`
is for torture_reward.py.
"""

import atexit
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")


def watch(
    folder: str, at: int | None = None, then: int | str = "kill", interrupt: int | None = None, count: str | None = None
) -> None:
    """Counts what happens in the folder, and strikes."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not (event in _CHANGES or (event == "open" and (arguments[2] or 0) & _WRITING)):
            return
        if not isinstance(arguments[0], str | bytes | os.PathLike) or not os.fsdecode(arguments[0]).startswith(folder):
            return
        seen += 1
        if seen == interrupt:
            os.kill(os.getpid(), signal.SIGINT)
        if at is not None and seen > at:
            if then == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(then, os.strerror(int(then)), os.fsdecode(arguments[0]))

    sys.addaudithook(hook)
    if count:
        atexit.register(lambda: Path(count).write_text(str(seen), encoding="utf-8"))


def jump(seed: int) -> None:
    """The clock goes an hour or ten years back or forth whenever it is read, or stands still."""
    rng, real = random.Random(seed), time.time
    offsets = (0.0, -3600.0, 3600.0, -3.2e8, 3.2e8)
    time.time = lambda: real() + rng.choice(offsets)
    time.time_ns = lambda: int(time.time() * 1e9)


def fail_validation(at: int) -> None:
    """Makes this validation fail."""
    from mlxlora.errors import RunError
    from mlxlora.training.hooks import Validation

    measured, made = Validation._measured, []

    def measuring(self: Validation, *rest: Any) -> Any:
        made.append(1)
        if len(made) == at:
            raise RunError("no memory")
        return measured(self, *rest)

    Validation._measured = measuring


if __name__ == "__main__":
    fault = json.loads(os.environ.get("TORTURE", "{}"))
    fault.pop("reward", None)
    if "validation" in fault:
        fail_validation(fault.pop("validation"))
    if "clock" in fault:
        jump(fault.pop("clock"))
    if fault:
        watch(**fault)
    from mlxlora_cli import main

    from mlxlora import starter

    named = starter.data_path
    starter.data_path = lambda method: Path(os.environ["STARTER"]) / named(method).name
    main()
