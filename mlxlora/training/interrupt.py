"""Ctrl-C that waits for the end of a step, so that what is saved is always the state after a whole step."""

import signal
from types import FrameType

from attrs import define


class Abandoned(KeyboardInterrupt):
    """A second Ctrl-C, during a step: the state in memory may be half of a step, so it must not be saved."""


@define
class Interruptible:
    """Holds Ctrl-C back while `held`; outside the main thread Python's default stays.

    Attributes:
        waits: hold it back everywhere, because other ranks have to be told first.
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
        """Whether a Ctrl-C was held back."""
        return self._asked

    def held(self) -> "_Held":
        """A context that holds Ctrl-C back; without an error it raises it at its end."""
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
