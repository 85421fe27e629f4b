"""The other end of reward_process.py: executes a file of rewards, and calls its functions."""

import inspect
import os
import pickle
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO

from ..errors import InputError, one_line
from .reward_calls import RewardRaised, Unsent, answer_of, answer_text, told
from .reward_names import executed, resolved

_SENT = (bool, int, float, str, type(None))


def serve(file: str) -> None:
    """Answers requests of standard input on standard output, each in a thread, until the input ends.

    Args:
        file: a Python file with reward functions; empty: built-in ones.
    """
    inbox, outbox = _pipes()
    writing = threading.Lock()
    module, problem = _module(file)

    def answer(number: int, payload: bytes) -> None:
        found, error = None, problem
        try:
            found = None if problem else _answer(module, payload)
        except (InputError, RewardRaised) as caught:
            error = caught
        except Exception as caught:  # what was sent cannot be read here
            error = RewardRaised(one_line(caught))
        with writing:
            pickle.dump((number, error, found), outbox)
            outbox.flush()

    while True:
        try:
            request = pickle.load(inbox)
        except EOFError:
            return
        threading.Thread(target=answer, args=request, daemon=True).start()


def _pipes() -> tuple[BinaryIO, BinaryIO]:
    """Copies of standard input and output; what rewards read is empty, and what they print goes to standard error."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return inbox, outbox


def _module(file: str) -> tuple[ModuleType | None, InputError | None]:
    try:
        return (executed(file) if file else None), None
    except InputError as error:
        return None, error


def _answer(module: ModuleType | None, payload: bytes) -> Any:
    request, arguments = pickle.loads(payload)
    function = resolved(request, module)
    if arguments is None:
        return _parameters(function)
    try:
        answer = answer_of(function, arguments)
    except BaseException as error:  # also of sys.exit() in a reward
        raise RewardRaised(told(function, error)) from None
    return [_sent(value) for value in answer] if isinstance(answer, list) else _sent(answer)


def _parameters(function: Callable[..., Any]) -> list[tuple[str, int, bool]]:
    """Name, kind and whether there is a default; all columns for a function that is written in C."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return [("columns", int(inspect.Parameter.VAR_KEYWORD), False)]
    return [(one.name, int(one.kind), one.default is not one.empty) for one in found]


def _sent(value: Any) -> Any:
    """A number as it is; anything else as a number if it is one, or as text."""
    if type(value) in _SENT:
        return value
    try:
        return Unsent(answer_text(value)) if isinstance(value, bytes | str) else float(value)
    except Exception:  # its class may raise anything
        return Unsent(answer_text(value))
