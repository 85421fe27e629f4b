"""Takes steps: pulls batches, updates the model, calls hooks. Everything that differs between methods is elsewhere."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
from attrs import define, field, frozen

from ..data.batching import MicroBatch
from ..data.pooled import pooled, results
from ..distributed.ranks import ALONE, Ranks
from ..errors import RunError, SharedError, listed, reason
from ..utils.device import out_of_memory, smaller
from ..utils.rng import random_key
from .interrupt import Abandoned, Interruptible
from .micro_batch import BatchDivider
from .progress import Progress
from .rounding import RunRounding
from .step import LazyResult, Step, StepResult

Hook = Callable[[Progress, Sequence[MicroBatch]], None]
"""(progress, batches of the last step): what a run does between steps."""

SKIPS = 5  # batches in a row whose steps are not finite: a run that skips as many does not recover


@frozen(eq=False)
class LoopOptions:
    """How the loop takes steps.

    Attributes:
        repeats: steps on each group of batches, such as several updates on one rollout; a run stops only after the last of them.
        divider: divides batches that do not fit into memory; None: every batch fits.
        rounding: what decides shapes and divisions, for the checkpoint; None: it is not saved.
        ranks: the processes that take the steps together, each with the micro-batches of its stream.
        ahead: begin the next step before the metrics of the last one are read, where no hook looks at the model between the two;
            the stream must not look at the model either. Several ranks do not begin ahead.
        skips: so many groups of batches in a row that are not finite end the run.
        warn: gets the rows of every skipped step.
        interrupt: holds signals back; None: one of its own. A caller that saves after the last step enters it first.
    """

    repeats: int = 1
    divider: BatchDivider | None = None
    rounding: RunRounding | None = None
    ranks: Ranks = ALONE
    ahead: bool = False
    skips: int = SKIPS
    warn: Callable[[str], object] = lambda _: None
    interrupt: Interruptible | None = None


def train(
    step: Step,
    stream: Iterator[tuple[MicroBatch, ...]],
    progress: Progress,
    total: int,
    hooks: Sequence[Hook],
    how: LoopOptions = LoopOptions(),
) -> None:
    """Takes steps until `total`, or until a hook sets `progress.stop`; each hook sees every finished step, in order.

    A step that is not finite changes nothing and counts as a step. Ctrl-C, SIGTERM or SIGHUP while a batch is made ends the run at
    once; during a step or its hooks it ends the run after them: `progress` is always the state after a whole step. A second Ctrl-C
    does not wait. Several ranks end after the same step. Hooks that a step of a resumed run still owes come first.

    Raises:
        RunError: the loss or the gradient was not finite `how.skips` times in a row, and weights and optimizer are those of before;
            or memory ran out, or another rank is gone.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGHUP.
        Abandoned: a second Ctrl-C before the step was over.
    """
    repeats, ranks = how.repeats, how.ranks
    steps = _Steps(step, progress, hooks, how)
    with how.interrupt or Interruptible(waits=ranks.size > 1) as interrupt:
        try:
            with interrupt.held():
                steps.catch_up()
            while steps.begun < total and not progress.stop:
                micros = steps.waited_for(stream)
                with interrupt.held():
                    own, asked = sum(micro.tokens for micro in micros), 0.0
                    for _ in range(min(repeats, total - steps.begun)):
                        tokens, asked = ranks.totals(own, interrupt.asked)  # before the step: other ranks that end do not begin it
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
    """A step whose metrics have not been read yet.

    Attributes:
        result: lazy arrays.
        micros: its micro-batches.
        parts: the same, divided to fit into memory.
        tokens: tokens that the model reads, of all ranks.
        key: the random state after the step.
    """

    result: LazyResult
    micros: Sequence[MicroBatch]
    parts: Sequence[MicroBatch]
    tokens: int
    key: mx.array


@define
class _Steps:
    """Steps in order: each is begun, then ended by reading its metrics and calling the hooks; at most one is open."""

    step: Step
    progress: Progress
    hooks: Sequence[Hook]
    how: LoopOptions
    _open: _Begun | None = None
    _since: float = field(factory=time.perf_counter)
    _waited: float = 0.0

    @property
    def begun(self) -> int:
        """Steps so far, with the open one."""
        return self.progress.step + (self._open is not None)

    def waited_for(self, stream: Iterator[tuple[MicroBatch, ...]]) -> tuple[MicroBatch, ...]:
        """The next batches."""
        start = time.perf_counter()
        micros = next(stream)
        self._waited += time.perf_counter() - start
        return micros

    def take(self, micros: Sequence[MicroBatch], tokens: int) -> None:
        """Begins a step and ends the one before; ends this one too if the next one depends on what it leaves."""
        parts = self.how.divider(micros) if self.how.divider else micros
        with _explained(parts):
            result = self.step.begin(*(p.batch for p in parts if not p.is_padding), idle=parts[0].batch)
        following = _Begun(result, micros, parts, tokens, random_key())
        self.end(whole=False)
        self._open = following
        if not self._may_wait():
            self.end()

    def end(self, *, whole: bool = True) -> None:
        """Ends the open step, if there is one; `whole`: no other has begun since."""
        if (done := self._open) is None:
            return
        with _explained(done.parts):
            result = self.step.ended(done.result, whole=whole)
        self._open = None
        if self.how.divider:
            self.how.divider.learn()
        if self.how.rounding:
            self.progress.rounding = self.how.rounding.after(done.micros)
        seconds = self._waited, time.perf_counter() - self._since - self._waited
        _advance(self.progress, result, seconds, done)
        if self.progress.skipped:
            rows = self.how.ranks.listed([row for micro in done.micros for row in micro.rows])
            _warn_of_skipped(result, self.progress, rows, self.how)
        self.progress.owed = [hook.name for hook in _named(self.hooks) if hook.due(self.progress.step)]
        for hook in self.hooks:
            hook(self.progress, done.micros)
            if isinstance(hook, Every):
                self._paid(hook.name)
        self._since, self._waited = time.perf_counter(), 0.0

    def catch_up(self) -> None:
        """Calls the hooks that the last step of a resumed run did not get to."""
        late = False
        for hook in _named(self.hooks):
            if hook.name in self.progress.owed or (late and self.progress.stop):
                late = True
                hook.hook(self.progress, ())
                self._paid(hook.name)

    def _paid(self, name: str) -> None:
        self.progress.owed = [other for other in self.progress.owed if other != name]

    def _may_wait(self) -> bool:
        """Whether the next step may begin first: no hook looks at this one, its memory is known, the last one was not skipped."""
        looking = any(not isinstance(hook, Every) or hook.looks(self.begun) for hook in self.hooks)
        measuring = self.how.divider is not None and self.how.divider.measuring
        ahead = self.how.ahead and self.how.ranks.size == 1
        return ahead and not looking and not self.progress.skipped and not measuring


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
        f"out of memory with {rows} rows of {length} tokens at once ({reason(error, 120)}). Try, in this order: "
        f"{', '.join(smaller())}"
    )


@frozen
class Every:
    """`hook` at every multiple of `steps` (0 = none), at the end, and where a run stops early.

    Attributes:
        beside: the hook looks neither at the model nor at metrics, so the next step may have begun.
        name: in a checkpoint, which says whether the hook still has to be called for its step; empty: it is not called later.
    """

    steps: int
    hook: Hook
    total: int
    beside: bool = False
    name: str = ""

    def __call__(self, progress: Progress, micros: Sequence[MicroBatch]) -> None:
        if progress.stop or self.due(progress.step):
            self.hook(progress, micros)

    def looks(self, step: int) -> bool:
        """Whether the hook looks at the model after this step."""
        return not self.beside and self.due(step)

    def due(self, step: int) -> bool:
        """Whether the hook is called after this step of a run that goes on."""
        return step == self.total or bool(self.steps and step % self.steps == 0)


def _named(hooks: Sequence[Hook]) -> Iterator[Every]:
    return (hook for hook in hooks if isinstance(hook, Every) and hook.name)


def _warn_of_skipped(result: StepResult, progress: Progress, rows: Sequence[str], how: LoopOptions) -> None:
    """Warns of a skipped step.

    Raises:
        SharedError: it is the last that may be skipped.
    """
    found = [f"{name} is {result.numbers[name]}" for name in ("loss", "grad_norm") if not math.isfinite(result.numbers[name])]
    problem = f"step {progress.step}: {(found or ['the updated weights are not finite'])[0]} (rows {listed(rows, 8)})"
    if progress.skipped % (how.skips * how.repeats):
        how.warn(f"{problem}: skipped, the weights stay as they were")
        return
    good = progress.step - progress.skipped
    remedy = "a lower --learning-rate or --max-grad-norm 1" if good else "other rows, a smaller --scale or another model"
    times = f", the {progress.skipped}th in a row" if progress.skipped > 1 else ""
    raise SharedError(f"{problem}{times}; the weights are those of step {good}. Try {remedy}")


def check_trained(progress: Progress) -> None:
    """Checks that a run changed the weights.

    Raises:
        SharedError: every step was skipped, because no loss or gradient was finite.
    """
    if progress.step and progress.skipped == progress.step:
        raise SharedError(
            f"every step was skipped ({progress.step} of {progress.step} were not finite), so the weights are as they were. Try "
            "other rows, a smaller --scale or --learning-rate, or another model"
        )


def _advance(progress: Progress, result: StepResult, seconds: tuple[float, float], done: _Begun) -> None:
    """Counts a step; the metrics of a skipped step count in no mean."""
    window, metrics = progress.window, result.metrics | pooled(micro.metrics for micro in done.micros)
    progress.latest = {**results(metrics), "learning_rate": result.learning_rate}
    if result.skipped:
        window.skipped += 1
    else:
        window.add(metrics)
    window.tokens += done.tokens
    window.learning_rate = result.learning_rate
    window.seconds_waited += seconds[0]
    window.seconds_stepped += seconds[1]
    progress.skipped = progress.skipped + 1 if result.skipped else 0
    progress.step += 1
    progress.tokens += done.tokens
    progress.key = done.key
