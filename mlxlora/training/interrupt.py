"""Ctrl-C, SIGTERM and SIGHUP that wait for the end of a step, so that what is saved is always the state after a whole step."""

import signal
from types import FrameType

from attrs import define, field

_STOPS = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class Abandoned(KeyboardInterrupt):
    """A second Ctrl-C, during a step: the state in memory may be half of a step, so it must not be saved."""


@define
class Interruptible:
    """Holds Ctrl-C, SIGTERM and SIGHUP back while `held`; outside the main thread Python's default stays.

    A closing terminal sends SIGHUP more than once, and a service manager may repeat SIGTERM: only the first one counts, and only a
    second Ctrl-C does not wait. A SIGHUP that is ignored, as under nohup, stays ignored. It may be entered within itself.

    Attributes:
        waits: hold signals back everywhere, because other ranks have to be told first; their watchdog handles SIGTERM.
    """

    waits: bool = False
    _held: bool = False
    _asked: bool = False
    _stopped: bool = False
    _depth: int = 0
    _before: dict[int, object] = field(factory=dict)

    def __enter__(self) -> "Interruptible":
        self._depth += 1
        if self._depth == 1:
            for number in self._numbers():
                try:
                    self._before[number] = signal.signal(number, self._handle)
                except ValueError:  # not the main thread
                    break
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._before.clear()

    def _numbers(self) -> list[signal.Signals]:
        return [number for name in _STOPS if (number := getattr(signal, name, None)) and self._handles(number)]

    def _handles(self, number: signal.Signals) -> bool:
        before = signal.getsignal(number)
        if before is None or (self.waits and number == signal.SIGTERM):  # None: not from Python, so it could not be put back
            return False
        return number == signal.SIGINT or before != signal.SIG_IGN

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGINT and (self._asked or self._stopped):
            return
        if not self._held and not self.waits:
            self._stopped = True
            raise KeyboardInterrupt
        if self._asked:
            raise Abandoned
        self._asked = True

    @property
    def asked(self) -> bool:
        """Whether a signal was held back."""
        return self._asked

    def held(self) -> "_Held":
        """A context that holds signals back; without an error it raises KeyboardInterrupt at its end."""
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
