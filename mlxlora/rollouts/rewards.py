"""Reward functions, built-in or from a file: loading, calls in threads, checks, weighted sums."""

import ast
import inspect
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import numpy as np
from attrs import frozen

from ..config.given import name_of
from ..errors import InputError, RunError, described, listed, plain
from .reward_calls import answer_text, in_thread, told
from .reward_functions import BUILT_IN, PATTERNED, Reward, text_of
from .reward_names import LARGEST_REWARD, Request, called, requests_in, resolved
from .reward_process import RemoteReward, RewardProcess, RewardsEnded, pattern_process

_SYNONYMS = {"answer": "solution", "solution": "answer", "types": "type"}


@frozen
class NamedReward:
    """A reward function, its name in metrics and messages, and its weight in the sum."""

    name: str
    function: Reward
    weight: float = 1.0


_Entry = Request | NamedReward


def load_rewards(
    names: Sequence[str | Reward | NamedReward], file: str | None = None, weights: Sequence[float] | None = None
) -> tuple[NamedReward, ...]:
    """The rewards of --rewards, --reward-file and --reward-weights; names in the file take precedence over built-in ones.

    Args:
        names: `name` or `name(option=value)`, of which an entry may hold several, separated by commas; or functions.
        file: a Python file with reward functions; this call executes it, in a process of its own.
        weights: one for each name; None: 1.

    Raises:
        InputError: an unknown name or option, a file that cannot be executed, or wrong weights.

    >>> [(reward.name, reward.weight) for reward in load_rewards(["accuracy,repetition(ngram_size=4)"], weights=[1, 0.5])]
    [('accuracy', 1.0), ('repetition', 0.5)]
    """
    requests = [request for entry in names for request in (requests_in(entry) if isinstance(entry, str) else [_passed(entry)])]
    if not requests:
        raise InputError(f"--rewards names no reward function; there are {', '.join(sorted(BUILT_IN))}")
    process = RewardProcess(file) if file else None
    functions = [_function(request, process) for request in requests]
    labels = _labels(requests)
    weighted = zip(labels, functions, _checked_weights(weights, labels), strict=True)
    return tuple(NamedReward(*fields) for fields in weighted)


def _function(request: _Entry, process: RewardProcess | None) -> Reward:
    """What Python passes runs in this process, and built-in functions do; what a user wrote for the command line does not."""
    if isinstance(request, NamedReward):
        return request.function
    if process is None:
        function = resolved(request, None)
        parameters = tuple(inspect.signature(function).parameters.values())
        return RemoteReward(pattern_process(), request, parameters) if called(request) in PATTERNED else function
    return process.reward(request)


def _passed(entry: Reward | NamedReward) -> NamedReward:
    """A function that Python passes, with its name."""
    if isinstance(entry, NamedReward):
        return entry
    if not callable(entry):
        raise InputError(f"rewards: expected a name or a function (completions, ...) -> numbers, got {described(entry)}")
    name = name_of(entry)
    return NamedReward(name if name.isidentifier() else "reward", entry)


def _base(request: _Entry) -> str:
    if isinstance(request, NamedReward):
        return request.name
    return called(request)


def _labels(requests: Sequence[_Entry]) -> list[str]:
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


def _checked_weights(weights: Sequence[float] | None, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    if len(weights) != len(names):
        counts = f"{len(weights)} numbers for {len(names)} rewards ({plain(', '.join(names))})"
        raise InputError(f"--reward-weights has {counts}; give one per name in --rewards")
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
    """Calls each reward function in a thread of its own; coroutines are awaited there. What is late is stopped, with its process.

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
        RunError: a function takes longer than `timeout`, or ends its process.
    """
    base = {"prompts": list(prompts), "completions": list(completions), "completion_ids": list(completion_ids)}
    available = {**{key: list(column) for key, column in columns.items()}, **base}
    calls = [(reward, _arguments(reward, available, locations)) for reward in rewards]
    deadline = None if timeout is None else time.monotonic() + timeout
    answers = np.full((len(rewards), len(locations)), np.nan)
    with _ended_early(rewards):
        futures = [in_thread(reward.function, arguments) for reward, arguments in calls]
        for row, (reward, arguments), future in zip(answers, calls, futures, strict=True):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not wait([future], left).done:
                raise RunError(f"reward {reward.name} took longer than --reward-timeout {timeout:g} s on {_span(locations)}")
            if isinstance(error := future.exception(), RewardsEnded):
                raise error
            if error is not None:
                raise _raised(reward, error, _culprit(reward.function, arguments, locations, timeout)) from None
            row[:] = _checked(reward.name, future.result(), locations)
    return answers


@contextmanager
def _ended_early(rewards: Sequence[NamedReward]) -> Iterator[None]:
    """Ends the processes of rewards for which nothing waits any more, after a timeout or Ctrl-C: one may hold its interpreter."""
    try:
        yield
    except InputError:
        raise
    except BaseException:
        for reward in rewards:
            if isinstance(reward.function, RemoteReward):
                reward.function.process.stop()
        raise


def combine(matrix: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """[functions, S] -> [S]: Σ_k w_k r_k over the rewards that are not NaN; NaN where all are.

    Raises:
        InputError: the square of a sum would overflow float32.

    >>> combine(np.array([[1.0, np.nan, np.nan], [1.0, 1.0, np.nan]]), [1.0, 0.5])
    array([1.5, 0.5, nan])
    """
    total = np.nansum(np.asarray(weights, dtype=np.float64)[:, None] * matrix, axis=0)
    if (largest := np.abs(total).max(initial=0)) > LARGEST_REWARD:
        raise InputError(
            f"--reward-weights make a reward of {largest:g}; choose smaller ones: the sum may be at most {LARGEST_REWARD:g}"
        )
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


def _culprit(function: Reward, arguments: dict[str, Any], locations: Sequence[str], timeout: float | None) -> str:
    """The row that a function raises on, found by calls with one row, within `timeout` seconds; else the range of all rows."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    for row, location in enumerate(locations):
        alone = {key: value if value is None else value[row : row + 1] for key, value in arguments.items()}
        future = in_thread(function, alone)
        left = deadline - time.monotonic()
        if left <= 0 or not wait([future], None if left == math.inf else left).done:
            break
        if future.exception() is not None:
            return location
    return _span(locations)


def _raised(reward: NamedReward, error: BaseException, location: str) -> InputError:
    return InputError(f"{location}: reward {reward.name} raised {told(reward.function, error)}")


def _span(locations: Sequence[str]) -> str:
    rows = list(dict.fromkeys(locations))
    return rows[0] if len(rows) == 1 else f"{rows[0]} to {rows[-1]}" if rows else "no rows"


def _checked(name: str, values: Any, locations: Sequence[str]) -> list[float]:
    if not isinstance(values, list | tuple):
        raise InputError(
            f"{_span(locations)}: reward {name} answered {answer_text(values)}; return a list with one number per completion"
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
    if not abs(number) <= LARGEST_REWARD:
        raise InputError(
            f"{location}: reward {name} answered {answer_text(value)}; return a finite number, or None where it does not apply"
        )
    return number
