"""The other end of reward_process.py: executes a file of rewards, and calls its functions."""

import inspect
import json
import os
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO

from ..errors import InputError
from .reward_calls import answer_of, answer_text, told
from .reward_names import executed, read_request, resolved

_SENT = (bool, int, float, str, type(None))


def serve(file: str) -> None:
    """Answers requests of standard input on standard output, each in a thread, until the input ends; both have a JSON a line.

    Args:
        file: a Python file with reward functions; empty: built-in ones.
    """
    inbox, outbox = _pipes()
    writing = threading.Lock()
    module, problem = _module(file)

    def answer(line: bytes) -> None:
        number, request, arguments = json.loads(line)
        reply = {"refused": problem} if problem else _reply(module, request, arguments)
        text = json.dumps([number, reply]).encode()
        with writing:
            outbox.write(text + b"\n")
            outbox.flush()

    for line in inbox:
        threading.Thread(target=answer, args=(line,), daemon=True).start()


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """Copies of standard input and output; what rewards read is empty, and what they print goes to standard error."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return inbox, outbox


def _module(file: str) -> tuple[ModuleType | None, str]:
    """The module of the file, or what is wrong with it."""
    try:
        return (executed(file) if file else None), ""
    except InputError as error:
        return None, str(error)


def _reply(module: ModuleType | None, request: str, arguments: dict[str, Any] | None) -> dict[str, Any]:
    """What the function answered, why there is no such function, or what it raised."""
    try:
        function = resolved(read_request(request), module)
        if arguments is None:
            return {"answer": _parameters(function)}
    except InputError as error:
        return {"refused": str(error)}
    try:
        answer = answer_of(function, arguments)
        return {"answer": [_sent(value) for value in answer] if isinstance(answer, list) else _sent(answer)}
    except BaseException as error:  # also of sys.exit() in a reward
        return {"raised": told(function, error)}


def _parameters(function: Callable[..., Any]) -> list[tuple[str, int, bool]]:
    """Name, kind and whether there is a default; all columns for a function that is written in C."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return [("columns", int(inspect.Parameter.VAR_KEYWORD), False)]
    return [(one.name, int(one.kind), one.default is not one.empty) for one in found]


def _sent(value: Any) -> Any:
    """A number as it is; anything else as a number if it is one, or as text."""
    if type(value) in _SENT and not (type(value) is int and value.bit_length() > 63):
        return value
    try:
        return {"text": answer_text(value)} if isinstance(value, bytes | str | int) else float(value)
    except Exception:  # its class may raise anything
        return {"text": answer_text(value)}
