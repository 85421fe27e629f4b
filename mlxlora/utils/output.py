"""The edges through which text leaves the process: standard output, standard error, logs and warnings.

What came from outside (names, rows, files, messages of libraries) is shown, never obeyed, and what the terminal cannot show is
replaced, so that printing fails for no text.
"""

import json
import logging
import re
import sys
import warnings
from contextlib import suppress
from io import TextIOWrapper
from typing import IO, Any

from ..errors import RunError, printable

_LINE_ENDS = re.compile(r"\s*[\r\n]\s*")
_IN_JSON = re.compile(r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line_of(text: str) -> str:
    r"""A message on one line, so that a name in it cannot forge another one.

    >>> one_line_of("--data a\nwarning: b")
    '--data a warning: b'
    """
    return printable(_LINE_ENDS.sub(" ", text.strip()))


def showable(text: str, encoding: str | None) -> str:
    r"""Text with escapes for what an encoding lacks.

    >>> showable("5 € ▁", "latin-1")
    '5 \\u20ac \\u2581'
    """
    try:
        return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    except LookupError:  # an encoding that Python does not have
        return text.encode("ascii", "backslashreplace").decode("ascii")


def echo(text: str = "", *, err: bool = False, end: str = "\n") -> None:
    """Prints text, which may have several lines and come from outside, on standard output or standard error.

    Raises:
        RunError: standard output cannot be written, for example because the disk is full.
    """
    stream: IO[str] = sys.stderr if err else sys.stdout
    try:
        stream.write(showable(printable(text), getattr(stream, "encoding", None)) + end)
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        if not err:
            raise unwritable(error) from error


def echo_written(kind: str, place: object, more: str = "") -> None:
    """Prints what a command wrote and where, in the one way that all commands have, as in the table at the end of a run.

    >>> echo_written("fused", "a/b")
    fused   a/b
    >>> echo_written("merged", "c", "rank 8")
    merged  c (rank 8)
    """
    echo(f"{kind:<6}  {place}{more and f' ({more})'}")


def unwritable(error: OSError) -> RunError:
    """What to raise where standard output cannot be written; it is no fault of the output folder."""
    return RunError(f"standard output cannot be written ({error.strerror or error}); lead it elsewhere, or use --quiet")


def say(text: str) -> None:
    """Prints a message of one line on standard error."""
    echo(one_line_of(text), err=True)


def json_line(value: Any) -> str:
    r"""A value as JSON on one line, readable, with escapes for everything that a terminal would obey.

    >>> json_line({"a": "\x9b2Jé"})
    '{"a": "\\u009b2Jé"}'
    """
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, ensure_ascii=False))


def guard_streams() -> None:
    """Makes the process print anything: terminals get replacements, and logs and warnings of libraries lose their control codes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if logging.getLogRecordFactory() is not _record:
        logging.setLogRecordFactory(_record)
    warnings.showwarning = _show_warning


def _record(*arguments: Any, **named: Any) -> logging.LogRecord:
    record = logging.LogRecord(*arguments, **named)
    with suppress(TypeError, ValueError):  # a wrong call of logging, which it reports itself
        record.msg, record.args = printable(record.getMessage()), ()
    return record


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: str | None = None
) -> None:
    text = printable(warnings.formatwarning(message, category, filename, lineno, line))
    (file or sys.stderr).write(text)
