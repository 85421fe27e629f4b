"""An objective of the user: named by a file, or passed in Python; a plain function becomes a term."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from ..batch import Batch
from ..config.given import name_of
from ..errors import InputError, described
from ..objectives.objective import Objective, term, token_mean
from ..objectives.quantity import Function, Quantity, needs_of
from ..utils.user_code import load_object


def user_objective(reference: str | Callable[..., Any] | None) -> Objective | None:
    """The objective that --objective file.py:name names, or that Python passes.

    It is an objective, a function without arguments that returns one, or a function (logps [N], batch) -> values [N], whose
    mean over the trained tokens is minimized.

    Raises:
        InputError: it is none of these, or the file does not have it.

    >>> [(scale, term.name) for scale, term in user_objective(lambda logps, batch: -logps).terms]
    [(1.0, 'objective')]
    """
    if reference is None:
        return None
    flag = f"--objective {reference}" if isinstance(reference, str) else "objective"
    found: Any = load_object(reference, "--objective") if isinstance(reference, str) else reference
    if callable(found) and not isinstance(found, Objective | Quantity) and not _required(found):
        found = found()
    if isinstance(found, Objective):
        return found
    if not callable(found) or (not isinstance(found, Quantity) and len(_required(found)) != 2):
        told = f"a function of ({', '.join(_required(found))})" if callable(found) else described(found)
        raise InputError(f"{flag}: expected an Objective or a function (logps, batch) -> values, got {told}")
    own = found if isinstance(found, Quantity) else Quantity(cast(Function, found))
    name = name_of(own.function)
    name = name if name.isidentifier() else "objective"
    return term(name, Quantity(_per_token(own, f"{flag}: {name}"), needs_of(own)), token_mean())


def _required(function: Callable[..., Any]) -> list[str]:
    """The arguments that a caller has to give by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.items()
    return [name for name, p in parameters if p.kind in kinds and p.default is p.empty]


def _per_token(function: Callable[..., Any], place: str) -> Callable[[mx.array, Batch], mx.array]:
    """The function, checked to return a value for each token."""

    def values(logps: mx.array, batch: Batch) -> mx.array:
        found = function(logps, batch)
        shape = getattr(found, "shape", None)
        if shape != logps.shape:
            remedy = "ml.term(name, function, ml.token_mean()) names another mean"
            raise InputError(f"{place} must return a value for each trained token, {logps.shape}, got {shape or found}; {remedy}")
        return found

    return values
