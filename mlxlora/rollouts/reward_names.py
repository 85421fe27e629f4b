"""Reward functions by name: what --rewards asks for, built in or in the file of --reward-file."""

import ast
import difflib
import inspect
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import InputError, plain, quoted
from ..utils.user_code import run_file
from .reward_functions import BUILT_IN, Reward

LARGEST_REWARD = 1e15
"""The standard deviation squares rewards, and larger squares overflow float32."""

Request = ast.Call | ast.Name
"""`name(option=value)` or `name`."""

_REGISTRY = "mlx_lm_lora.trainer.grpo_reward_functions"


def executed(file: str) -> ModuleType:
    """The module of a file, with the functions that it registers as mlx-lm-lora's reward files do; this call executes it.

    Raises:
        InputError: no such file, or it raises.
    """
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


def requests_in(text: str) -> list[Request]:
    """The requests of a text, which are separated by commas.

    Raises:
        InputError: the text is not a list of names and calls.

    >>> [called(request) for request in requests_in("accuracy,length(max_length=5)")]
    ['accuracy', 'length']
    """
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


def _with_raw_strings(request: Request, source: str) -> Request:
    """Strings as typed, with their backslashes, so that a regular expression needs no second escape."""
    for node in ast.walk(request):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = (ast.get_source_segment(source, node) or "").lstrip("rRuU")[1:-1]
    return request


def read_request(text: str) -> Request:
    """The inverse of `ast.unparse`: strings have escapes, other than in `requests_in`."""
    expression = ast.parse(text, mode="eval").body
    assert isinstance(expression, ast.Call | ast.Name)
    return expression


def called(request: Request) -> str:
    """The name in a request."""
    return ast.unparse(request.func if isinstance(request, ast.Call) else request)


def resolved(request: Request, module: ModuleType | None) -> Reward:
    """The function that a request names; those of the module take precedence over built-in ones.

    Raises:
        InputError: an unknown name or option.
    """
    name = called(request)
    if module is not None and hasattr(module, name):
        return _from_file(request, name, module)
    if name in BUILT_IN:
        return _made(request, name)
    own = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"] if module else []
    known = sorted({*BUILT_IN, *own})
    near = "".join(f" Did you mean {match}?" for match in difflib.get_close_matches(name, known, 1))
    place = f" in {module.__file__}" if module else ""
    raise InputError(f"no reward function {quoted(name)}{place}.{near} There are {', '.join(known)}")


def _made(request: Request, name: str) -> Reward:
    try:
        return BUILT_IN[name](**_options(request, name))
    except InputError as error:
        raise InputError(f"--rewards {plain(ast.unparse(request))}: {error}") from None


def _from_file(request: Request, name: str, module: ModuleType) -> Reward:
    if not callable(getattr(module, name)):
        kind = type(getattr(module, name)).__name__
        raise InputError(f"{module.__file__}: {name} is {kind}, not a function of (prompts, completions, ...)")
    if isinstance(request, ast.Call) and request.keywords:
        raise InputError(f"{module.__file__}: {name} takes no options in --rewards; set them in the file")
    return getattr(module, name)


def _options(request: Request, name: str) -> dict[str, Any]:
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
    return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool) and abs(value) <= LARGEST_REWARD
