"""One call of a reward function: in a thread, awaited if it is a coroutine, its errors and answers as messages show them."""

import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

from ..errors import one_line
from ..utils.user_code import line_in


class RewardRaised(Exception):
    """An error of a reward function, as text: it cannot leave its process otherwise."""


class Unsent:
    """An answer that is no number, which cannot leave its process otherwise than as text."""

    def __init__(self, text: str) -> None:
        self.text = text


def answer_of(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a function with lists of its own; its answer is a list if it answered a tuple, an array or a list of any class."""
    own = {key: value if value is None else list(value) for key, value in arguments.items()}
    answer = function(**own)
    answer = _awaited(answer) if inspect.isawaitable(answer) else answer
    answer = answer.tolist() if hasattr(answer, "tolist") else answer  # arrays of numpy, mlx, torch
    return list(answer) if isinstance(answer, list | tuple) else answer


def _awaited(answer: Awaitable[Any]) -> Any:
    import asyncio  # slow, and few rewards need it

    async def awaited() -> Any:
        return await answer

    return asyncio.run(awaited())


def in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Future[Any]:
    """Runs a function in a daemon thread; a ThreadPoolExecutor has none, so that a reward that hangs would block the exit."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(answer_of(function, arguments))
        except BaseException as error:  # also of sys.exit() in a reward
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def told(function: Callable[..., Any], error: BaseException) -> str:
    """An error on one line, with the line of the function's file."""
    if isinstance(error, RewardRaised):
        return str(error)
    code = getattr(inspect.unwrap(function), "__code__", None)
    file = code.co_filename if code else ""
    line = line_in(error, file)
    return f"{one_line(error)}{f' ({file}:{line})' if line else ''}"


def answer_text(value: Any) -> str:
    """A wrong answer for a message: on one line, brief, whatever its class does.

    >>> answer_text([1.0, None])
    '[1.0, None]'
    """
    if isinstance(value, Unsent):
        return value.text
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its class may raise anything
        text = type(value).__name__
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:60]}..."
