"""Keeps token ids on disk, so that a data set is tokenized once, not once a run.

A file holds the items of one split. Its name is a digest of everything that they depend on: the rows, the tokenizer, the
options, our code and the versions of the packages that it calls. A change of any of these leads to another file name.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from ..utils.files import cache_folder
from ..utils.safetensors import NumpyArrays, read_checked, write_arrays
from . import tokenize
from .rows import Row
from .template_habits import template_args
from .tokenize import Counts, Example, Pair

WORTH_KEEPING = 1 << 20  # bytes of rows, which take about half a second to tokenize
FILES = 16  # the most recently used ones are kept

Made = tuple[list[Any], Counts]


def remembered(
    rows: Sequence[Row],
    make: Callable[[Sequence[Row]], Made],
    prepare: Callable[..., Any],
    tokenizer: Any,
    note: Callable[[str], Any],
) -> Made:
    """`make(rows)`, or the same items from the file of an earlier run, equal bit for bit.

    Args:
        rows: the rows of one split.
        make: turns rows into items and their counts.
        prepare: what `make` does to one row. Items are kept only if this is a `partial` of a function of `data.tokenize`.
        tokenizer: mlx-lm's TokenizerWrapper.
        note: takes one line about where the items came from, or about a damaged file.
    """
    path = token_file(rows, prepare, tokenizer)
    found = _trusted(path, rows, note) if path else None
    if found:
        return found
    made = make(rows)
    if path:
        _keep(path, made[0], rows, note)
    return made


def token_file(rows: Sequence[Row], prepare: Callable[..., Any], tokenizer: Any) -> Path | None:
    """The file for the items of these rows; None if there are few rows, or if their maker or tokenizer has no identity."""
    try:
        written = [orjson.dumps(row.fields) for row in rows]
    except TypeError:  # a hub data set can hold values that JSON cannot
        return None
    if sum(map(len, written)) < WORTH_KEEPING:
        return None
    maker = _prepare_identity(prepare)
    reader = tokenizer_identity(tokenizer)
    if maker is None or reader is None:
        return None
    digest = hashlib.sha256(b"\n".join([_code_identity(), maker, reader, *written])).hexdigest()
    return cache_folder("tokens") / f"{digest[:32]}.safetensors"


def tokenizer_identity(tokenizer: Any) -> bytes | None:
    """Everything that decides the tokens of a text or a conversation; None if Python code of the model takes part."""
    inner = tokenizer._tokenizer
    if not type(inner).__module__.startswith(("transformers.", "mlx_lm.")) or not getattr(inner, "is_fast", False):
        return None
    own = tokenizer._chat_template  # a Python template of mlx-lm
    template = inner.chat_template
    settings = {
        "class": type(inner).__qualname__,
        "template": template,
        "variables": template_args(tokenizer),
        "own template": getattr(own, "__module__", None) and f"{own.__module__}.{own.__qualname__}",
        "special": {name: str(token) for name, token in inner.special_tokens_map.items()},
        "ends": sorted(tokenizer.eos_token_ids),
        "behavior": {name: _plainly(value) for name, value in vars(inner).items() if name not in _NO_BEHAVIOR},
        "made with": {name: _plainly(value) for name, value in inner.init_kwargs.items() if name not in _NO_BEHAVIOR},
        "today": date.today().isoformat() if "strftime_now" in str(template) else None,  # the template of Llama 3 shows the date
    }
    return orjson.dumps(settings, option=orjson.OPT_SORT_KEYS) + b"\n" + inner.backend_tokenizer.to_str().encode()


_NO_BEHAVIOR = {
    "_tokenizer",
    "init_kwargs",
    "init_inputs",
    "name_or_path",
    "tokenizer_file",
    "vocab_file",
    "merges_file",
    "verbose",
}
_NO_BEHAVIOR |= {"chat_template_file", "deprecation_warnings", "files_loaded", "_in_target_context_manager", "_commit_hash"}
_NO_BEHAVIOR |= {"is_local", "local_files_only", "backend"}
"""What says where a tokenizer came from, or what it has told already."""


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _plainly(value: Any) -> str:
    """A setting of a tokenizer as text; equal settings have equal texts, also with sets and objects in them."""
    if isinstance(value, dict):
        return str(sorted((str(name), _plainly(item)) for name, item in value.items()))
    if isinstance(value, list | tuple):
        return str([_plainly(item) for item in value])
    return str(sorted(map(str, value))) if isinstance(value, set | frozenset) else _ADDRESS.sub("", repr(value))


def _prepare_identity(prepare: Callable[..., Any]) -> bytes | None:
    if not isinstance(prepare, partial) or prepare.args or prepare.func.__module__ != tokenize.__name__:
        return None
    return orjson.dumps([prepare.func.__qualname__, prepare.keywords], option=orjson.OPT_SORT_KEYS)


def _code_identity() -> bytes:
    """The code that tokenizes: the text of all modules of this folder, and the versions of packages."""
    ours = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    others = [f"{name} {version(name)}".encode() for name in ("transformers", "tokenizers", "mlx-lm", "jinja2")]
    return b"\n".join([*ours, *others])


# --- the file: all sequences in flat arrays, with a digest --------------------------------------


def _trusted(path: Path, rows: Sequence[Row], note: Callable[[str], Any]) -> Made | None:
    """The content of the file; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        items = _unpacked(read_checked(path), rows)
        path.touch()
    except (OSError, KeyError, ValueError) as error:
        note(f"tokens: the cache {path} is damaged ({error}); the rows are tokenized again")
        return None
    note(f"{len(rows)} rows were tokenized by an earlier run; their token ids come from {path}")
    return items, Counts(len(rows), sum(item.truncated for item in items), len(rows) - len(items))


def _keep(path: Path, items: Sequence[Any], rows: Sequence[Row], note: Callable[[str], Any]) -> None:
    """Writes the file and removes the least recently used ones; a run goes on if this fails."""
    try:
        write_arrays(path, _packed(items, {row.location: i for i, row in enumerate(rows)}))
        files = sorted(path.parent.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        for file in files[:-FILES]:
            file.unlink(missing_ok=True)
    except OSError as error:
        note(f"tokens: the cache {path} cannot be written ({error})")


def _packed(items: Sequence[Example | Pair], row_of: dict[str, int]) -> NumpyArrays:
    """Items as flat arrays, booleans packed into bits."""
    examples = [example for item in items for example in _sides(item)]
    prompts = [example.prompt for example in examples]
    scores = [item.preference_score if isinstance(item, Pair) else None for item in items]
    return {
        "rows": np.array([row_of[_sides(item)[0].location] for item in items], np.int64),
        "ends": np.cumsum([len(e.tokens) for e in examples]).astype(np.int64),
        "tokens": np.concatenate([e.tokens for e in examples]),
        "loss_mask": np.packbits(np.concatenate([e.loss_mask for e in examples])),
        "prompt": np.packbits(np.concatenate([e.loss_mask & False if e.prompt is None else e.prompt for e in examples])),
        "has_prompt": np.array([prompt is not None for prompt in prompts], np.uint8),
        "truncated": np.array([e.truncated for e in examples], np.uint8),
        "scores": np.array([np.nan if score is None else score for score in scores], np.float64),
    }


def _unpacked(arrays: NumpyArrays, rows: Sequence[Row]) -> list[Any]:
    """The items, whose sequences are views of the flat arrays."""
    numbers, ends = arrays["rows"].tolist(), arrays["ends"].tolist()
    sides = len(ends) // len(numbers)
    locations = [rows[number].location for number in numbers for _ in range(sides)]
    loss_mask, prompt = (np.unpackbits(arrays[name], count=ends[-1]).view(bool) for name in ("loss_mask", "prompt"))
    flags = zip([0, *ends], ends, locations, arrays["has_prompt"].tolist(), arrays["truncated"].tolist(), strict=False)
    examples = [
        Example(
            arrays["tokens"][start:end], loss_mask[start:end], prompt[start:end] if has_prompt else None, location, bool(truncated)
        )
        for start, end, location, has_prompt, truncated in flags
    ]
    if sides == 1:
        return examples
    scores = [None if np.isnan(score) else score for score in arrays["scores"].tolist()]
    return [Pair(*pair) for pair in zip(examples[::2], examples[1::2], scores, strict=True)]


def _sides(item: Example | Pair) -> tuple[Example, ...]:
    return (item.chosen, item.rejected) if isinstance(item, Pair) else (item,)
