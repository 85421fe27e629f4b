"""A process for rewards that a user wrote, a file or a pattern: it can be ended even while one of them holds the interpreter."""

import ast
import inspect
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from itertools import count
from typing import Any

from attrs import define, field, frozen

from ..errors import InputError, RunError, described
from ..utils.child import Child
from .reward_calls import RewardRaised, Unsent
from .reward_names import Request

_PATIENCE = 1.0  # seconds that a process gets to end by itself
_SERVE = "import sys; sys.path[:] = {path!r}; from mlxlora.rollouts.reward_server import serve; serve({file!r})"


class RewardsEnded(RunError):
    """The process of the rewards is gone."""


@frozen(eq=False)
class RemoteReward:
    """A reward function that runs in a process of its own, and is called as if it ran here.

    Attributes:
        process: where it runs.
        request: its name, with options.
        parameters: of its signature.
    """

    process: "RewardProcess"
    request: Request
    parameters: tuple[inspect.Parameter, ...]

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.Signature(self.parameters)

    def __call__(self, **arguments: Any) -> Any:
        """What the function answers."""
        return self.process.ask(self.request, arguments)


@define(eq=False)
class RewardProcess:
    """Starts when first needed, and again after `stop`; ends with this process, or with the last reference to this object.

    Attributes:
        file: a Python file with reward functions, which only that process executes; empty: built-in ones.
    """

    file: str = ""
    _child: "_Child | None" = None
    _end: Callable[[], Any] | None = None
    _starting: threading.Lock = field(factory=threading.Lock)

    def reward(self, request: Request) -> RemoteReward:
        """The function that a request names.

        Raises:
            InputError: the file cannot be executed, or there is no such function.
        """
        return RemoteReward(self, request, tuple(_parameter(*one) for one in self.ask(request, None)))

    def ask(self, request: Request, arguments: dict[str, Any] | None) -> Any:
        """What the function answers; without arguments, its parameters.

        Raises:
            InputError: the file cannot be executed, or there is no such function.
            RewardsEnded: the process was stopped, or ended by itself.
        """
        with self._starting:
            child = self._child = self._child or self._start()
        return child.ask(ast.unparse(request), arguments)

    def stop(self) -> None:
        """Ends the process at once, whatever it does; calls that wait for it raise RewardsEnded."""
        child, self._child = self._child, None
        if child and self._end:
            child.child.kill()
            self._end()

    def _start(self) -> "_Child":
        process = Child.start(_SERVE.format(path=sys.path, file=self.file))
        child = _Child(process, f"--reward-file {self.file}" if self.file else "--rewards")
        self._end = weakref.finalize(self, child.end)
        threading.Thread(target=child.listen, daemon=True, name="mlxlora-rewards").start()
        return child


@cache
def pattern_process() -> RewardProcess:
    """The process of built-in rewards that match a user's regular expression."""
    return RewardProcess()


def _parameter(name: str, kind: int, optional: bool) -> inspect.Parameter:
    default = None if optional else inspect.Parameter.empty
    return inspect.Parameter(name, inspect._ParameterKind(kind), default=default)


def _listed(value: Any) -> Any:
    """Arrays of numpy, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{described(value)} cannot be sent to the process of the rewards")


def _received(value: Any) -> Any:
    return Unsent(value["text"]) if isinstance(value, dict) else value


@define(eq=False)
class _Child:
    """The running process, and the calls that wait for its answers."""

    child: Child
    name: str
    _waiting: dict[int, Future[dict[str, Any]]] = field(factory=dict)
    _numbers: Iterator[int] = field(factory=count)
    _writing: threading.Lock = field(factory=threading.Lock)
    _gone: bool = False

    @property
    def process(self) -> subprocess.Popen[bytes]:
        return self.child.process

    def ask(self, request: str, arguments: dict[str, Any] | None) -> Any:
        future: Future[dict[str, Any]] = Future()
        rest = json.dumps([request, arguments], default=_listed)[1:].encode()
        with self._writing:
            if self._gone:
                raise self._ended()
            number = next(self._numbers)
            self._waiting[number] = future
            with suppress(OSError):  # it has ended: `listen` says so
                self.process.stdin.write(b"[%d, %b\n" % (number, rest))  # type: ignore[union-attr]
                self.process.stdin.flush()  # type: ignore[union-attr]
        reply = future.result()
        if "refused" in reply:
            raise InputError(reply["refused"])
        if "raised" in reply:
            raise RewardRaised(reply["raised"])
        answer = reply["answer"]
        return list(map(_received, answer)) if isinstance(answer, list) else _received(answer)

    def listen(self) -> None:
        """Hands answers to the calls that wait for them, until the process ends."""
        with suppress(OSError, ValueError), self.process.stdout as answers:  # type: ignore[union-attr]
            for line in answers:
                number, reply = json.loads(line)
                self._waiting.pop(number).set_result(reply)
        self.process.wait()
        self.child.kill()  # what it started
        with self._writing:
            self._gone = True
        for future in self._waiting.values():
            future.set_exception(self._ended())

    def end(self) -> None:
        """Lets the process end, and ends it if it does not."""
        if self._writing.acquire(blocking=False):  # else it reads nothing
            with suppress(OSError, subprocess.TimeoutExpired):
                self.process.stdin.close()  # type: ignore[union-attr]
                self.process.wait(_PATIENCE)
            self._writing.release()
        self.child.kill()

    def _ended(self) -> RewardsEnded:
        return RewardsEnded(f"{self.name}: the process of the reward functions ended with exit code {self.process.returncode}")
