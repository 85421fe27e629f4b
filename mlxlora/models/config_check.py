"""The one place where the configuration of a model is checked, before mlx-lm builds layers of its sizes."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, quoted
from ..utils.paths import within

MOST_BYTES = 1 << 24
"""Of a config.json."""

_DEEPEST = 4  # levels in which parts of a model, such as text_config, have their own sizes
_KIND = re.compile(r"[\w.-]{1,100}")


def check_model_config(file: Path, named: str) -> None:
    """Checks the sizes, numbers and token ids of a config.json; names that it does not know are left to mlx-lm.

    Args:
        file: the config.json; mlx-lm reports a missing one, or one that is no JSON.
        named: what a message calls the model.

    Raises:
        InputError: a value has another type or is out of bounds; the message names it.
    """
    check_values(_object(file, named), named, file.name)


def check_tokenizer_config(file: Path, named: str) -> None:
    """Checks the names of chat templates in a tokenizer_config.json: a saved tokenizer has a file of each name.

    Args:
        file: the tokenizer_config.json.
        named: what a message calls the model.

    Raises:
        InputError: a name would lead elsewhere, or is no text.
    """
    templates = _object(file, named).get("chat_template")
    entries = [entry.get("name") for entry in templates if isinstance(entry, dict)] if isinstance(templates, list) else []
    for name in [*entries, *(templates if isinstance(templates, dict) else ())]:
        if not isinstance(name, str) or not _KIND.fullmatch(name):
            raise InputError(f"{named}: a chat template in its {file.name} must have a name such as tool_use, got {quoted(name)}")


def _object(file: Path, named: str) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none."""
    try:
        size = file.stat().st_size
        if size > MOST_BYTES:
            raise InputError(f"{named}: {file.name} has {size:,} bytes, {MOST_BYTES:,} are the limit")
        found = json.loads(within(file).read_text(encoding="utf-8"))
    except InputError:
        raise
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def check_values(config: Mapping[str, Any], named: str, file: str = "config.json") -> None:
    """Checks the values of a configuration, see `check_model_config`.

    Raises:
        InputError: a value has another type or is out of bounds.
    """
    kind = config.get("model_type")
    if kind is not None and not (isinstance(kind, str) and _KIND.fullmatch(kind)):
        raise InputError(f"{named}: model_type in its {file} must be a name such as llama, got {quoted(kind)}")
    for name, value in _values(config):
        rule, holds = _RULES[name]
        parts = value if isinstance(value, list) and name not in _SINGLE else [value]
        if any(part is not None and not holds(part) for part in parts):
            raise InputError(f"{named}: {name} in its {file} must be {rule}, got {quoted(value)}")


def _values(config: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if name in _RULES:
            yield name, value
        if isinstance(value, dict) and depth < _DEEPEST:
            yield from _values(value, depth + 1)


def _whole(low: int, high: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high


def _number(low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    def holds(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high and math.isfinite(value)

    return f"a number from {low:g} to {high:g}", holds


_WIDTH, _DEPTH, _COUNT = _whole(1, 2**22), _whole(1, 4096), _whole(0, 2**16)
_VOCABULARY, _TOKEN, _PADDING = _whole(1, 2**24), _whole(0, 2**31 - 1), _whole(-1, 2**31 - 1)
_PART: tuple[str, Callable[[Any], bool]] = ("an object", lambda value: isinstance(value, dict))
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "moe_intermediate_size"), _whole(0, 2**22)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), _DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "head_dim"), _COUNT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), _COUNT),
    "vocab_size": _VOCABULARY,
    **dict.fromkeys(("eos_token_id", "bos_token_id"), _TOKEN),
    "pad_token_id": _PADDING,
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _number(1e-3, 1e30)),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), _number(0, 1)),
    "initializer_range": _number(0, 1e3),
    "text_config": _PART,
}
"""By name, wherever it stands in a configuration: the rule, and whether a value keeps it."""

_SINGLE = {"text_config", "rope_theta", "rope_local_base_freq", "vocab_size", "num_hidden_layers"}
"""Names whose value is no list of one for each layer."""
