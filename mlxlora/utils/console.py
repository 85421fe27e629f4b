"""The console of rich through which tables, bars and styled lines are printed."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.segment import Segment

from ..errors import printable
from .output import showable, unwritable


class SafeConsole(Console):
    """A console that styles its own text and shows control characters of all text, wherever that came from."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        shown = (part if part.control else Segment(printable(part.text), part.style) for part in buffer)
        return showable(super()._render_buffer(shown), self.encoding)

    def _write_buffer(self) -> None:
        try:
            super()._write_buffer()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise unwritable(error) from error


def safe_console(**options: Any) -> Console:
    """A console on standard output, also in notebooks, that highlights nothing itself; `options` are those of rich's `Console`."""
    return SafeConsole(**{"highlight": False, "force_jupyter": False, **options})
