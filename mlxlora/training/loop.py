"""Pull batches, take steps, call hooks. What is left out: everything that differs between methods."""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import mlx.core as mx
from attrs import define, field, frozen

from ..data.batching import MicroBatch
from ..distributed.ranks import ALONE, Ranks
from ..errors import RunError, SharedError
from ..objectives.objective import Metrics
from ..utils.device import out_of_memory, smaller
from ..utils.rng import random_key
from .checkpoint import Progress
from .micro_batch import BatchDivider
from .step import Step

Hook = Callable[[Progress, Sequence[MicroBatch]], None]
SKIPS = 5  # batches in a row whose steps are not finite: a run that skips as many does not recover


def train(
    step: Step,
    stream: Iterator[tuple[MicroBatch, ...]],
    progress: Progress,
    total: int,
    hooks: Sequence[Hook],
    *,
    repeats: int = 1,
    micro: BatchDivider | None = None,
    ranks: Ranks = ALONE,
    ahead: bool = False,
    skips: int = SKIPS,
    warn: Callable[[str], object] = lambda _: None,
) -> None:
    """Steps until `total`, or until a hook sets `progress.stop`; each hook sees every finished step, in order.

    Every group of batches is used for `repeats` steps (several updates on one rollout); a run only ever stops after
    the last of them. `micro` divides batches that would not fit into memory. `ranks` take the steps together, each with the
    pieces of its stream. A step that is not finite changes nothing and is counted; `warn` is told its rows, and `skips` batches of
    them in a row end the run. With `ahead` the next step is begun before the metrics of one are read, wherever no hook looks
    at the model between the two; the stream must not look at it either.

    Ctrl-C while a batch is made ends the run at once, during a step or its hooks after them: `progress` is always the
    state after a whole step. A second Ctrl-C does not wait. Several ranks end after the same step.

    Raises:
        RunError: the loss or the gradient was not finite `skips` times in a row; weights and optimiser are those of before. Or
            memory ran out, or another rank is gone.
        KeyboardInterrupt: Ctrl-C.
        Abandoned: a second one, before the step was over.
    """
    steps = _Steps(step, progress, hooks, micro, ranks, skips * repeats, warn, ahead and ranks.size == 1)
    with Interruptible(waits=ranks.size > 1) as interrupt:
        try:
            while steps.begun < total and not progress.stop:
                micros = steps.waited_for(stream)
                with interrupt.held():
                    own, asked = sum(p.tokens for p in micros), 0.0
                    for _ in range(min(repeats, total - steps.begun)):
                        tokens, asked = ranks.totals(own, interrupt.asked)  # before the step: where others end, it has not begun
                        steps.take(micros, round(tokens))
                    if ranks.size > 1 and asked:
                        raise KeyboardInterrupt
        except Abandoned:
            raise
        except BaseException:
            with interrupt.held():
                steps.end()
            raise


@frozen
class _Begun:
    """A step whose metrics are yet to be read.

    Attributes:
        metrics: lazy.
        pieces: the batches that it is of.
        parts: the same, divided as memory asks for.
        tokens: that the model reads.
        key: the random state after it.
    """

    metrics: Metrics
    micros: Sequence[MicroBatch]
    parts: Sequence[MicroBatch]
    tokens: int
    key: mx.array


@define
class _Steps:
    """Steps in order: each is begun, and ended by reading its metrics and calling the hooks; at most one waits for its end."""

    step: Step
    progress: Progress
    hooks: Sequence[Hook]
    micro: BatchDivider | None
    ranks: Ranks
    limit: int
    warn: Callable[[str], object]
    ahead: bool
    _open: _Begun | None = None
    _since: float = field(factory=time.perf_counter)
    _waited: float = 0.0

    @property
    def begun(self) -> int:
        """Steps so far, the one that is not ended included."""
        return self.progress.step + (self._open is not None)

    def waited_for(self, stream: Iterator[tuple[MicroBatch, ...]]) -> tuple[MicroBatch, ...]:
        """The next batches."""
        start = time.perf_counter()
        micros = next(stream)
        self._waited += time.perf_counter() - start
        return micros

    def take(self, micros: Sequence[MicroBatch], tokens: int) -> None:
        """Begins a step; ends the one before, and this one too if something has to be known before the next."""
        parts = self.micro(micros) if self.micro else micros
        with _explained(parts):
            metrics = self.step.begin(*(p.batch for p in parts if not p.is_padding), idle=parts[0].batch)
        following = _Begun(metrics, micros, parts, tokens, random_key())
        self.end(whole=False)
        self._open = following
        if not self._may_wait():
            self.end()

    def end(self, *, whole: bool = True) -> None:
        """Ends the step that is not ended, if there is one; `whole`: no other has been begun since."""
        if (done := self._open) is None:
            return
        with _explained(done.parts):
            metrics = self.step.ended(done.metrics, whole=whole)
        self._open = None
        if self.micro:
            self.micro.learn()
        seconds = {"seconds_waited": self._waited, "seconds_stepped": time.perf_counter() - self._since - self._waited}
        _advance(self.progress, metrics, seconds, done)
        if self.progress.skipped:
            rows = self.ranks.listed([row for micro in done.micros for row in micro.rows])
            _tell_skipped(metrics, self.progress, rows, self.limit, self.warn)
        for hook in self.hooks:
            hook(self.progress, done.micros)
        self._since, self._waited = time.perf_counter(), 0.0

    def _may_wait(self) -> bool:
        """Whether the next step may begin first: nobody looks at this one, memory was measured, and no step was skipped of late."""
        looking = any(not isinstance(hook, Every) or hook.looks(self.begun) for hook in self.hooks)
        return self.ahead and not looking and not self.progress.skipped and not (self.micro and self.micro.measuring)


@contextmanager
def _explained(parts: Sequence[MicroBatch]) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            raise RunError(_advice(parts, error)) from error
        raise


def _advice(parts: Sequence[MicroBatch], error: BaseException) -> str:
    rows, length = max((p.batch.tokens.shape for p in parts), key=lambda shape: shape[0] * shape[1])
    return (
        f"out of memory with {rows} rows of {length} tokens at once ({' '.join(str(error).split())[:120]}). Try, in this order: "
        f"{', '.join(smaller())}"
    )


@frozen
class Every:
    """`hook` at every multiple of `steps` (0 = none), at the end, and where a run stops early.

    Attributes:
        beside: it looks neither at the model nor at metrics, so that the next step may have begun.
    """

    steps: int
    hook: Hook
    total: int
    beside: bool = False

    def __call__(self, progress: Progress, micros: Sequence[MicroBatch]) -> None:
        if progress.stop or self._due(progress.step):
            self.hook(progress, micros)

    def looks(self, step: int) -> bool:
        """Whether it has to see what this step leaves."""
        return not self.beside and self._due(step)

    def _due(self, step: int) -> bool:
        return step == self.total or bool(self.steps and step % self.steps == 0)


def _tell_skipped(
    metrics: dict[str, float], progress: Progress, rows: Sequence[str], limit: int, warn: Callable[[str], object]
) -> None:
    """Raises where as many steps as `limit` were skipped in a row."""
    found = [f"{name} is {metrics[name]}" for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    problem = f"step {progress.step}: {(found or ['the updated weights are not finite'])[0]} (rows {', '.join(rows[:8])}{more})"
    if progress.skipped % limit:
        warn(f"{problem}: skipped, the weights stay as they were")
        return
    good = progress.step - progress.skipped
    remedy = "a lower --learning-rate or --max-grad-norm 1" if good else "other rows, a smaller --scale or another model"
    times = f", the {progress.skipped}th in a row" if progress.skipped > 1 else ""
    raise SharedError(f"{problem}{times}; the weights are those of step {good}. Try {remedy}")


def _advance(progress: Progress, metrics: dict[str, float], seconds: dict[str, float], done: _Begun) -> None:
    """What a skipped step measured does not count among the means."""
    skipped, micros = metrics["skipped"], done.micros
    sourced = {name: sum(p.metrics[name] for p in micros) / len(micros) for name in micros[0].metrics}
    measured = {"skipped": skipped} if skipped else {**metrics, **sourced}
    seen = {**measured, **seconds, "window_tokens": done.tokens, "steps": 1 - skipped}
    progress.window = {name: progress.window.get(name, 0.0) + seen.get(name, 0.0) for name in {**progress.window, **seen}}
    progress.window["learning_rate"] = metrics["learning_rate"]
    progress.skipped = progress.skipped + 1 if skipped else 0
    progress.step += 1
    progress.tokens += done.tokens
    progress.key = done.key


def reported(progress: Progress) -> dict[str, float]:
    """The means of the steps since the last report, skipped ones counted; the window is empty after it."""
    window, progress.window = dict(progress.window), {}
    steps, tokens, rate, skipped = (window.pop(name, 0) for name in ("steps", "window_tokens", "learning_rate", "skipped"))
    waited, stepped = window.pop("seconds_waited"), window.pop("seconds_stepped")
    means = {"loss": math.nan, "grad_norm": math.nan} if not steps else {name: value / steps for name, value in window.items()}
    return {
        "loss": means.pop("loss"),
        "grad_norm": means.pop("grad_norm"),
        "learning_rate": rate,
        "tokens": progress.tokens,
        "tokens_per_second": tokens / (waited + stepped),
        "training_tokens_per_second": tokens / stepped,
        **({"skipped": int(skipped)} if skipped else {}),
        **means,
    }


class Abandoned(KeyboardInterrupt):
    """A second Ctrl-C, in the middle of a step: what is in memory may be half of one, so it must not be saved."""


@define
class Interruptible:
    """Ctrl-C, but not in the middle of what is held; outside the main thread the default stays.

    Attributes:
        waits: even outside of it: others have to be told first.
    """

    waits: bool = False
    _held: bool = False
    _asked: bool = False
    _before: object = None

    def __enter__(self) -> "Interruptible":
        try:
            self._before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # not the main thread
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)  # type: ignore[arg-type]

    def _handle(self, _: int, __: FrameType | None) -> None:
        if not self._held and not self.waits:
            raise KeyboardInterrupt
        if self._asked:
            raise Abandoned
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether there was one that is yet to have an effect."""
        return self._asked

    def held(self) -> "_Held":
        return _Held(self)


@define
class _Held:
    interrupt: Interruptible

    def __enter__(self) -> None:
        self.interrupt._held = True

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.interrupt._held = False
        if self.interrupt._asked and kind is None and not self.interrupt.waits:
            raise KeyboardInterrupt
