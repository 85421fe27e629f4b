"""What a run was made of, as digests: rows, base weights, tokenizer. A checkpoint has them, and ranks compare them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import orjson
from mlx.utils import tree_flatten

from ..data.item_records import hashes_of
from ..data.sources import Split
from ..data.token_cache import tokenizer_identity
from ..data.tokenize import Example
from ..errors import InputError, listed, plain

_SAMPLE = 64  # numbers of each array
_UNSAID = ("location", "truncated", "ref_logps")  # where a row stands, and what is computed from it
_TEST = "test rows"  # a finished run may be tested on any
BASE_WEIGHTS, TOKENIZER = "base weights", "tokenizer"


@attrs.frozen
class RunOrigin:
    """What a run was made of.

    Attributes:
        options: those that a resumed run may not change.
        digests: of the rows of train and valid, the base weights and the tokenizer, by name.
    """

    options: Mapping[str, Any] = attrs.field(factory=dict)
    digests: Mapping[str, str] = attrs.field(factory=dict)

    def state(self) -> dict[str, Any]:
        """As JSON."""
        options = orjson.dumps(dict(self.options), default=str, option=orjson.OPT_NON_STR_KEYS)
        return {"options": orjson.loads(options), "digests": dict(self.digests)}


UNKNOWN_ORIGIN = RunOrigin()
"""Of a checkpoint that does not say it."""


def origin_of_state(state: Any) -> RunOrigin:
    """The inverse of `state`.

    Raises:
        ValueError: no run wrote it.
    """
    options, digests = (state.get(name, {}) if isinstance(state, dict) else None for name in ("options", "digests"))
    if not (isinstance(options, dict) and isinstance(digests, dict) and all(isinstance(found, str) for found in digests.values())):
        raise ValueError("origin must have options and digests")
    return RunOrigin(options, digests)


def check_origin(path: Path, before: RunOrigin, now: RunOrigin, *, allowed: bool) -> list[str]:
    """Compares a checkpoint with the run that continues from it.

    Args:
        path: of the checkpoint.
        before: its origin; an early version wrote none.
        now: of the run.
        allowed: rows, weights and tokenizer may differ.

    Returns:
        The names of what changed.

    Raises:
        InputError: it is a checkpoint of another run, or something changed that may not.
    """
    options = now.state()["options"]
    if other := [name for name, value in options.items() if before.options.get(name, value) != value]:
        differences = "; ".join(f"{name} was {plain(before.options[name])} and is {plain(options[name])}" for name in other)
        raise InputError(f"--resume: {path} is a checkpoint of another run ({differences}); move it to the folder of its run")
    known = {name: digest for name, digest in now.digests.items() if name != _TEST}
    changed = [name for name, digest in known.items() if before.digests.get(name, digest) != digest]
    if changed and not allowed:
        raise InputError(
            f"--resume: {listed(changed)} changed since {path} was written; put back what was there, start another run, or "
            "continue with others by --allow-changed"
        )
    return changed


# --- digests ----------------------------------------------------------------------------------


def digests_of(splits: Mapping[str, Split], tokenizer: Any) -> dict[str, str]:
    """Digests of the rows of each split as they are trained on, and of the tokenizer unless it is Python code."""
    found = {f"{name} rows": _rows_digest(split.items) for name, split in splits.items()}
    if (tokens := _tokenizer(tokenizer)) is not None:
        found[TOKENIZER] = _digest([tokens])
    return found


def weight_samples(model: nn.Module) -> dict[str, bytes]:
    """Some numbers of each parameter of a model, and its shape."""
    return samples_of(dict(tree_flatten(model.parameters())))  # type: ignore[arg-type]


def samples_of(arrays: Mapping[str, mx.array]) -> dict[str, bytes]:
    """Some numbers of each array, and its shape."""
    sizes = {name: max(array.size // _SAMPLE, 1) for name, array in arrays.items()}
    some = {name: array.reshape(-1)[:: sizes[name]][:_SAMPLE] for name, array in arrays.items() if array.size}
    mx.eval(some)
    return {name: _shape(array) + (_bits(some[name]) if name in some else b"") for name, array in arrays.items()}


def weight_shapes(model: nn.Module) -> dict[str, bytes]:
    """The shape of each parameter of a model: no parameter is read."""
    return {name: _shape(array) for name, array in tree_flatten(model.parameters())}  # type: ignore[misc]


def _shape(array: mx.array) -> bytes:
    return f"{array.dtype}{array.shape}".encode()


def base_digest(samples: Mapping[str, bytes], model: nn.Module) -> str:
    """A digest of the parameters that are not trained: trained ones come from the checkpoint.

    Args:
        samples: of the model before its adapters.
        model: with its adapters.
    """
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}  # type: ignore[misc]
    return _digest(part for name in sorted(samples.keys() - trained) for part in (name.encode(), samples[name]))


def _bits(array: mx.array) -> bytes:
    return np.array(mx.view(mx.contiguous(array), mx.uint8)).tobytes()


def _digest(parts: Iterator[bytes] | Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:32]


def _rows_digest(items: Sequence[Any]) -> str:
    """Of the records of items if they have them: the token cache knows their hashes."""
    hashes = hashes_of(items)
    return _digest(part for item in items for part in _parts(item)) if hashes is None else _digest([hashes])


def _parts(item: Any) -> Iterator[bytes]:
    if isinstance(item, Example):
        yield item.tokens.tobytes()
        yield item.loss_mask.tobytes()
        yield b"" if item.prompt is None else item.prompt.tobytes()
    elif isinstance(item, np.ndarray):
        yield item.tobytes()
    elif attrs.has(type(item)):
        for field in attrs.fields(type(item)):
            if field.name not in _UNSAID:
                yield from _parts(getattr(item, field.name))
    else:
        try:
            yield orjson.dumps(item, option=orjson.OPT_SORT_KEYS | orjson.OPT_SERIALIZE_NUMPY)
        except TypeError:  # a column that Python passed
            yield type(item).__name__.encode()


def _tokenizer(tokenizer: Any) -> bytes | None:
    """What decides the tokens of a text; the date that a template shows is in the rows."""
    try:
        known = tokenizer_identity(tokenizer)
    except AttributeError:  # no tokenizer of transformers
        return None
    if known is None:
        return None
    settings, rest = known.split(b"\n", 1)
    return orjson.dumps({**orjson.loads(settings), "today": None}, option=orjson.OPT_SORT_KEYS) + rest
