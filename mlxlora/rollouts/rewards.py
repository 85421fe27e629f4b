"""Reward functions, built-in or from a file: loading, calls in threads, checks, weighted sums."""

import ast
import asyncio
import difflib
import inspect
import math
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from types import ModuleType
from typing import Any

import numpy as np
from attrs import frozen

from ..config.given import name_of
from ..errors import InputError, RunError, described, listed, one_line, plain, quoted
from ..utils.user_code import line_in, run_file
from .reward_functions import BUILT_IN, Reward, text_of

_LARGEST = 1e15  # the standard deviation squares rewards, and larger squares overflow float32
_SYNONYMS = {"answer": "solution", "solution": "answer", "types": "type"}


@frozen
class NamedReward:
    """A reward function, its name in metrics and messages, and its weight in the sum."""

    name: str
    function: Reward
    weight: float = 1.0


_Request = ast.Call | ast.Name | NamedReward


def load_rewards(
    names: Sequence[str | Reward | NamedReward], file: str | None = None, weights: Sequence[float] | None = None
) -> tuple[NamedReward, ...]:
    """The rewards of --rewards, --reward-file and --reward-weights; names in the file take precedence over built-in ones.

    Args:
        names: `name` or `name(option=value)`, of which an entry may hold several, separated by commas; or functions.
        file: a Python file with reward functions; this call executes it.
        weights: one for each name; None: 1.

    Raises:
        InputError: an unknown name or option, a file that cannot be executed, or wrong weights.

    >>> [(reward.name, reward.weight) for reward in load_rewards(["accuracy,repetition(ngram_size=4)"], weights=[1, 0.5])]
    [('accuracy', 1.0), ('repetition', 0.5)]
    """
    requests = [request for entry in names for request in (_parsed(entry) if isinstance(entry, str) else [_passed(entry)])]
    if not requests:
        raise InputError(f"--rewards names no reward function; there are {', '.join(sorted(BUILT_IN))}")
    module = _executed(file) if file else None
    functions = [_resolved(request, module) for request in requests]
    weighted = zip(_labels(requests), functions, _checked_weights(weights, len(functions)), strict=True)
    return tuple(NamedReward(*fields) for fields in weighted)


_REGISTRY = "mlx_lm_lora.trainer.grpo_reward_functions"


def _executed(file: str) -> ModuleType:
    """The module of a file, with the functions that it registers as mlx-lm-lora's reward files do."""
    registered: dict[str, Reward] = {}
    module = run_file(file, "--reward-file", _registry(registered))
    theirs = getattr(sys.modules.get(_REGISTRY), "REWARD_REGISTRY", {})  # where mlx-lm-lora is installed
    registered |= {name: function for name, function in theirs.items() if function.__module__ == module.__name__}
    vars(module).update(registered)
    return module


def _registry(registered: dict[str, Reward]) -> dict[str, ModuleType]:
    """The module from which mlx-lm-lora's reward files import `register_reward_function`, and its packages."""

    def register_reward_function(name: str | None = None) -> Callable[[Reward], Reward]:
        def register(function: Reward) -> Reward:
            registered[name or function.__name__] = function
            return function

        return register

    package, trainer, _ = _REGISTRY.split(".")
    modules = {name: ModuleType(name) for name in (package, f"{package}.{trainer}", _REGISTRY)}
    vars(modules[_REGISTRY])["register_reward_function"] = register_reward_function
    return modules


def _parsed(text: str) -> list[ast.Call | ast.Name]:
    with warnings.catch_warnings(action="ignore"):  # "\d" in a regular expression
        try:
            expression = ast.parse(f"[{text}\n]", mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise _no_request(text) from None
    requests = expression.elts if isinstance(expression, ast.List) else [expression]
    for request in requests:
        named = request.func if isinstance(request, ast.Call) and not request.args else request
        if not isinstance(named, ast.Name):
            raise _no_request(text)
    return [_with_raw_strings(request, f"[{text}\n]") for request in requests]  # type: ignore[arg-type]


def _no_request(text: str) -> InputError:
    return InputError(f"--rewards {quoted(text)} is not understood; write name,name or name(option=value, option=value)")


def _with_raw_strings(request: ast.Call | ast.Name, source: str) -> ast.Call | ast.Name:
    """Strings as typed, with their backslashes, so that a regular expression needs no second escape."""
    for node in ast.walk(request):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = (ast.get_source_segment(source, node) or "").lstrip("rRuU")[1:-1]
    return request


def _passed(entry: Reward | NamedReward) -> NamedReward:
    """A function that Python passes, with its name."""
    if isinstance(entry, NamedReward):
        return entry
    if not callable(entry):
        raise InputError(f"rewards: expected a name or a function (completions, ...) -> numbers, got {described(entry)}")
    name = name_of(entry)
    return NamedReward(name if name.isidentifier() else "reward", entry)


def _base(request: _Request) -> str:
    if isinstance(request, NamedReward):
        return request.name
    return ast.unparse(request.func if isinstance(request, ast.Call) else request)


def _labels(requests: Sequence[_Request]) -> list[str]:
    """The name, with its options or its place where a name occurs several times; equal labels would share a metric."""
    often = Counter(map(_base, requests))
    labels = [
        _base(request)
        if often[_base(request)] == 1
        else f"{request.name}_{place}"
        if isinstance(request, NamedReward)
        else ast.unparse(request)
        for place, request in enumerate(requests, 1)
    ]
    for label, times in Counter(labels).items():
        if times > 1:
            raise InputError(f"--rewards names {plain(label)} {times} times; name it once and weigh it with --reward-weights")
    return labels


def _resolved(request: _Request, module: ModuleType | None) -> Reward:
    if isinstance(request, NamedReward):
        return request.function
    name = _base(request)
    if module is not None and hasattr(module, name):
        return _from_file(request, name, module)
    if name in BUILT_IN:
        return _made(request, name)
    own = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"] if module else []
    known = sorted({*BUILT_IN, *own})
    near = "".join(f" Did you mean {match}?" for match in difflib.get_close_matches(name, known, 1))
    place = f" in {module.__file__}" if module else ""
    raise InputError(f"no reward function {quoted(name)}{place}.{near} There are {', '.join(known)}")


def _made(request: ast.Call | ast.Name, name: str) -> Reward:
    try:
        return BUILT_IN[name](**_options(request, name))
    except InputError as error:
        raise InputError(f"--rewards {plain(ast.unparse(request))}: {error}") from None


def _from_file(request: ast.Call | ast.Name, name: str, module: ModuleType) -> Reward:
    if not callable(getattr(module, name)):
        kind = type(getattr(module, name)).__name__
        raise InputError(f"{module.__file__}: {name} is {kind}, not a function of (prompts, completions, ...)")
    if isinstance(request, ast.Call) and request.keywords:
        raise InputError(f"{module.__file__}: {name} takes no options in --rewards; set them in the file")
    return getattr(module, name)


def _options(request: ast.Call | ast.Name, name: str) -> dict[str, Any]:
    parameters = inspect.signature(BUILT_IN[name]).parameters
    takes = ", ".join(str(parameter) for parameter in parameters.values())
    options: dict[str, Any] = {}
    for keyword in request.keywords if isinstance(request, ast.Call) else ():
        key, value = keyword.arg or "", _literal(keyword.value)
        if key not in parameters or not _is_a(value, parameters[key].annotation):
            raise InputError(f"{plain(ast.unparse(keyword))} is not an option; it takes {takes}")
        options[key] = value
    missing = [key for key, parameter in parameters.items() if parameter.default is parameter.empty and key not in options]
    if missing:
        raise InputError(f"it needs {' and '.join(missing)}; write {name}({', '.join(f'{key}=...' for key in missing)})")
    return options


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return None


def _is_a(value: Any, kind: type) -> bool:
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise InputError(f"--reward-weights has {len(weights)} numbers for {count} rewards; give one per name in --rewards")
    for weight in weights:
        if not math.isfinite(weight):
            raise InputError(f"--reward-weights must be finite numbers, got {weight}")
    return [float(weight) for weight in weights]


def call_rewards(
    rewards: Sequence[NamedReward],
    *,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    columns: Mapping[str, Sequence[Any]],
    locations: Sequence[str],
    timeout: float | None = None,
) -> np.ndarray:
    """Calls each reward function in a thread of its own; coroutines are awaited there.

    Args:
        rewards: the functions.
        prompts: [S], one entry for each completion, as in all other sequences.
        completions: [S].
        completion_ids: [S] token ids.
        columns: further columns of the rows, [S] each.
        locations: [S] `file:line` of the rows.
        timeout: seconds for all functions together; None: no limit.

    Returns:
        [functions, S] float64, NaN for None.

    Raises:
        InputError: a function raises, or returns anything but S finite numbers or None; names function and row.
        RunError: a function takes longer than `timeout`.
    """
    base = {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
    available = {**{key: list(column) for key, column in columns.items()}, **base}
    calls = [(reward, _arguments(reward, available, locations)) for reward in rewards]
    deadline = None if timeout is None else time.monotonic() + timeout
    futures = [_in_thread(reward.function, arguments) for reward, arguments in calls]
    answers = np.full((len(rewards), len(locations)), np.nan)
    for row, (reward, arguments), future in zip(answers, calls, futures, strict=True):
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not wait([future], left).done:
            raise RunError(f"reward {reward.name} took longer than --reward-timeout {timeout:g} s on {_span(locations)}")
        if (error := future.exception()) is not None:
            raise _raised(reward, error, _culprit(reward.function, arguments, locations, timeout)) from None
        row[:] = _checked(reward.name, future.result(), locations)
    return answers


def combine(matrix: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """[functions, S] -> [S]: Σ_k w_k r_k over the rewards that are not NaN; NaN where all are.

    Raises:
        InputError: the square of a sum would overflow float32.

    >>> combine(np.array([[1.0, np.nan, np.nan], [1.0, 1.0, np.nan]]), [1.0, 0.5])
    array([1.5, 0.5, nan])
    """
    total = np.nansum(np.asarray(weights, dtype=np.float64)[:, None] * matrix, axis=0)
    if (largest := np.abs(total).max(initial=0)) > _LARGEST:
        raise InputError(f"--reward-weights make a reward of {largest:g}; choose smaller ones: the sum may be at most {_LARGEST:g}")
    return np.where(np.isnan(matrix).all(axis=0), np.nan, total)


def check_columns(rewards: Sequence[NamedReward], columns: Mapping[str, Any], location: str) -> None:
    """Raises an InputError if a row lacks a column that a reward function names."""
    base = {"prompts": [], "completions": [], "completion_ids": []}
    for reward in rewards:
        _arguments(reward, {**{name: [value] for name, value in columns.items()}, **base}, [location])


def _arguments(reward: NamedReward, available: Mapping[str, list[Any]], locations: Sequence[str]) -> dict[str, Any]:
    """All columns for a function with **kwargs, else those that it names."""
    try:
        parameters = inspect.signature(reward.function).parameters
    except ValueError:  # written in C
        return dict(available)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = dict(available) if takes_all else {key: value for key, value in available.items() if key in parameters}
    for name, parameter in parameters.items():
        if name not in given and _SYNONYMS.get(name) in available:
            given[name] = available[_SYNONYMS[name]]
        elif name not in given and parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            given |= _absent(reward, name, available, locations)
    return _as_text(given) if {"answer", "types"} <= parameters.keys() else given


def _absent(reward: NamedReward, name: str, available: Mapping[str, Any], locations: Sequence[str]) -> dict[str, None]:
    if name == "types":  # mlx-lm-lora's functions take None
        return {"types": None}
    columns = listed(sorted(available.keys() - {"prompts", "completions", "completion_ids"}), 50) or "none"
    raise InputError(f"{_span(locations)}: reward {reward.name} needs the column {name!r}; the rows have {columns}")


def _as_text(arguments: dict[str, Any]) -> dict[str, Any]:
    """mlx-lm-lora's functions (prompts, completions, answer, types) take strings only."""
    texts = {key: [text_of(value) for value in arguments[key]] for key in ("prompts", "completions") if key in arguments}
    return arguments | texts


def _in_thread(function: Callable[..., Any], arguments: dict[str, Any]) -> Future[Any]:
    """Runs a function in a daemon thread; a ThreadPoolExecutor has none, so that a reward that hangs would block the exit."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            own = {key: value if value is None else list(value) for key, value in arguments.items()}
            answer = function(**own)
            answer = asyncio.run(_awaited(answer)) if inspect.isawaitable(answer) else answer
            answer = answer.tolist() if hasattr(answer, "tolist") else answer  # arrays of numpy, mlx, torch
            future.set_result(list(answer) if isinstance(answer, list | tuple) else answer)  # a copy, of any list class
        except BaseException as error:  # also of sys.exit() in a reward
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


def _culprit(function: Reward, arguments: dict[str, Any], locations: Sequence[str], timeout: float | None) -> str:
    """The row that a function raises on, found by calls with one row, within `timeout` seconds; else the range of all rows."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    for row, location in enumerate(locations):
        alone = {key: value if value is None else value[row : row + 1] for key, value in arguments.items()}
        future = _in_thread(function, alone)
        left = deadline - time.monotonic()
        if left <= 0 or not wait([future], None if left == math.inf else left).done:
            break
        if future.exception() is not None:
            return location
    return _span(locations)


def _raised(reward: NamedReward, error: BaseException, location: str) -> InputError:
    code = getattr(inspect.unwrap(reward.function), "__code__", None)
    file = code.co_filename if code else ""
    line = line_in(error, file)
    return InputError(f"{location}: reward {reward.name} raised {one_line(error)}{f' ({file}:{line})' if line else ''}")


def _span(locations: Sequence[str]) -> str:
    rows = list(dict.fromkeys(locations))
    return rows[0] if len(rows) == 1 else f"{rows[0]} to {rows[-1]}" if rows else "no rows"


def _checked(name: str, values: Any, locations: Sequence[str]) -> list[float]:
    if not isinstance(values, list | tuple):
        raise InputError(
            f"{_span(locations)}: reward {name} answered {_shown(values)}; return a list with one number per completion"
        )
    if len(values) != len(locations):
        raise InputError(
            f"{_span(locations)}: reward {name} answered {len(values)} values for {len(locations)} completions; return one for each"
        )
    return [_checked_value(name, value, location) for value, location in zip(values, locations, strict=True)]


def _checked_value(name: str, value: Any, location: str) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except Exception:  # its class may raise anything
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise InputError(
            f"{location}: reward {name} answered {_shown(value)}; return a finite number, or None where it does not apply"
        )
    return number


def _shown(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception:  # its class may raise anything
        text = type(value).__name__
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:60]}..."
