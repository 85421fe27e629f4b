"""The user's callbacks: functions and objects that a run calls, and that may stop it."""

import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..config.given import name_of
from ..errors import InputError, SharedError, described, one_line
from .reporter import Reporter, Values

EVENTS = ("on_start", "on_step", "on_evaluate", "on_sample", "on_checkpoint", "on_end")
"""What an object may have; a plain function is its `on_step`."""
_OF_MLX_LM = ("on_train_loss_report", "on_val_loss_report")
STOPPED = "callback "
"""Begins the reason of a stop that a callback asked for."""


class Callbacks(Reporter):
    """Calls every member at each event. One that returns False stops the run; one that raises ends it, after the step.

    Errors wait for `settle`, because in the middle of a step the state of the run could not be saved.

    Args:
        members: functions (step, metrics), objects with any of `EVENTS`, mlx-lm's callbacks, or reporters; or one alone.
        clock: current time in seconds, for the speeds that mlx-lm's callbacks get.

    Raises:
        InputError: a member is none of these.
    """

    def __init__(self, members: Any = (), clock: Callable[[], float] = time.monotonic) -> None:
        several = isinstance(members, (list, tuple, set))
        self._members, self._clock = [_checked(member) for member in (members if several else [members])], clock
        self._stop, self._failure, self._cause = "", "", None
        self._before, self._validated = (0, clock()), clock()
        self.results: Values = {}  # of a run that ended as it should, unrounded

    def __bool__(self) -> bool:
        return bool(self._members)

    @property
    def sees_steps(self) -> bool:
        """Whether a member looks at every step, so that the next one must not have begun."""
        return any(callable(_event(member, "on_step")) for member in self._members)

    def settle(self, of_rank0: Callable[[Any], Any]) -> str:
        """Why the run stops; empty if it goes on.

        Args:
            of_rank0: gives all ranks the value of rank 0, which alone has callbacks.

        Raises:
            SharedError: a callback raised an error; the message names both.
        """
        failure, stop = of_rank0([self._failure, self._stop])
        if failure:
            self._failure = ""
            raise SharedError(failure) from self._cause
        self._stop = ""
        return stop

    def step(self, step: int, metrics: Values) -> None:
        """After a step, with its metrics."""
        self._tell("on_step", step, metrics)

    def checkpoint(self, step: int, path: Path) -> None:
        """After a checkpoint was written."""
        self._tell("on_checkpoint", step, path)

    # --- a reporter -----------------------------------------------------------------------------

    def start(self, config: Values) -> None:
        self._before = (0, self._clock())
        self._tell("on_start", config)
        self._tell("start", config)

    def record(self, row: Values) -> None:
        self._tell("record", row)
        if row["split"] == "train":
            self._tell("on_train_loss_report", self._as_mlx_lm(row))
            return
        self._tell("on_evaluate", row["step"], row)
        if row["split"] == "valid":
            seconds = self._clock() - self._validated
            self._tell("on_val_loss_report", {"iteration": row["step"], "val_loss": row["loss"], "val_time": seconds})

    def samples(self, step: int, rows: Sequence[Values]) -> None:
        if rows:
            self._tell("on_sample", step, rows)
        self._tell("samples", step, rows)

    def overview(self, facts: Values) -> None:
        self._tell("overview", facts)

    def progress(self, step: int, total: int) -> None:
        self._validated = self._clock()
        self._tell("progress", step, total)

    def note(self, text: str, warning: bool = False) -> None:
        self._tell("note", text, warning)

    def example(self, tokens: Sequence[int], loss_mask: Sequence[bool], decode: Callable[[Sequence[int]], str]) -> None:
        self._tell("example", tokens, loss_mask, decode)

    def answers(self, rows: Sequence[Values]) -> None:
        self._tell("answers", rows)

    def finish(self, summary: Values) -> None:
        self._tell("on_end", self.results or summary)
        self._tell("finish", summary)

    # --------------------------------------------------------------------------------------------

    def _as_mlx_lm(self, row: Values) -> dict[str, Any]:
        (step, since), now = self._before, self._clock()
        self._before = (row["step"], now)
        return {
            "iteration": row["step"],
            "train_loss": row["loss"],
            "learning_rate": row["learning_rate"],
            "iterations_per_second": (row["step"] - step) / max(now - since, 1e-9),
            "tokens_per_second": row["tokens_per_second"],
            "trained_tokens": row["tokens"],
            "peak_memory": row["peak_memory_gb"],
        }

    def _tell(self, event: str, *values: Any) -> None:
        for member in self._members:
            function = _event(member, event)
            if function is None or self._failure:
                continue
            try:
                answer = function(*values)
            except Exception as error:
                self._cause, frames = error, traceback.extract_tb(error.__traceback__)
                place = f" ({frames[-1].filename}:{frames[-1].lineno})"
                self._failure = f"callback {_label(member, event)} raised {one_line(error)}{place}"
                continue
            if answer is False:
                self._stop = f"{STOPPED}{_label(member, event)} returned False"


def _checked(member: Any) -> Any:
    if isinstance(member, type):
        raise InputError(f"callbacks: {member.__name__} is a class; pass an object of it, {member.__name__}()")
    if _is_reporter(member) or callable(member) or any(hasattr(member, name) for name in (*EVENTS, *_OF_MLX_LM)):
        return member
    events = ", ".join((*EVENTS, *_OF_MLX_LM))
    raise InputError(f"callbacks: expected functions (step, metrics) or objects with any of {events}, got {described(member)}")


def _is_reporter(member: Any) -> bool:
    return Reporter in type(member).__mro__


def _event(member: Any, event: str) -> Callable[..., Any] | None:
    """What a member does at an event; None: nothing."""
    if _is_reporter(member):
        return getattr(member, event, None)
    if event == "on_step" and not any(hasattr(member, name) for name in (*EVENTS, *_OF_MLX_LM)):
        return member
    return getattr(member, event, None) if event in (*EVENTS, *_OF_MLX_LM) else None


def _label(member: Any, event: str) -> str:
    named = any(hasattr(member, name) for name in (event, *EVENTS))
    return f"{name_of(member)}.{event}" if named else name_of(member)
