"""Valid inputs made invalid, by bytes and by JSON values; see fuzz.py."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import frozen
from hypothesis import strategies as st


@frozen
class Target:
    """What is fuzzed.

    Attributes:
        make: a case, from a source of chance.
        strategy: cases of hypothesis.
        call: (folder, case) -> anything; raises InputError or RunError where the case is refused.
        outputs: names that an accepted case may leave in the folder.
        names: whether a message has to name a file.
    """

    make: Callable[[random.Random], Any]
    strategy: st.SearchStrategy[Any]
    call: Callable[[Path, Any], Any]
    outputs: frozenset[str] = frozenset()
    names: bool = True


WEIRD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, -1e-320, 2**31, 2**63, -(2**63), 10**30, "", " ", "a", "0", "null", "\x00"),
    *("\ud7ff", "\u2028", "é" * 50, "a\nb", "x" * 3000, "../../etc/passwd", "/dev/null", "{{ 1 }}", "<|im_end|>", "nan", "1e999"),
    *([], {}, [[]], [None], [{}], {"": None}, {"role": "user"}, {"content": 1}, [1, "a", None], [[[[[[[[1]]]]]]]]),
)
"""Values that are easily forgotten."""

_SYNTAX = (
    *("{", "}", "[", "]", '"', "'", ":", ",", "\n", "\r", "\t", " ", "\\", "\\u0000", "\\ud800", "null", "true", "NaN"),
    *("Infinity", "-", "1e999", "9" * 40, "&a", "*a", "<<", "!!python/object:os.system", "!!binary", "|", ">", "---", "%", "#"),
    *("{{", "}}", "{%", "%}", "?", "~", "@", "`", "role", "content", "messages", "\ufeff", "\u2028", "é"),
)
TOKENS = (*(text.encode() for text in _SYNTAX), b"\x00", b"\xff", b"\xc3", b"\xed\xa0\x80")


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few changes: bits, cuts, repeats, exchanges, pieces of syntax."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at, size = rng.randrange(len(out) + 1), min(rng.choice((1, 1, 2, 4, 16, 64)), len(out))
        match rng.randrange(7):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                del out[at : at + size]
            case 2:
                out[at:at] = out[at : at + size] * rng.choice((1, 1, 2, 50))
            case 3:
                out[at : at + size] = rng.randbytes(size)
            case 4 | 5:
                out[at:at] = rng.choice(TOKENS)
            case _:
                del out[at if rng.random() < 0.5 else len(out) :]
    return bytes(out)


def mutated_value(rng: random.Random, value: Any, often: float = 0.15) -> Any:
    """A JSON value with parts exchanged, renamed, left out or repeated."""
    if rng.random() < often:
        return rng.choice(WEIRD)
    if isinstance(value, dict):
        kept = {k: mutated_value(rng, v, often) for k, v in value.items() if rng.random() > often / 4}
        if kept and rng.random() < often / 2:
            kept[rng.choice(("", "x", "role", "from", "value", "prompt", "system", *kept))] = kept.pop(rng.choice(list(kept)))
        return kept
    if isinstance(value, list):
        changed = [mutated_value(rng, item, often) for item in value if rng.random() > often / 4]
        return changed * (2 if rng.random() < often / 2 else 1)
    return value


def mutated_json(rng: random.Random, value: Any) -> bytes:
    often = rng.choice((0.0, 0.02, 0.08, 0.3))
    text = json.dumps(mutated_value(rng, value, often), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return mutated_bytes(rng, text) if rng.random() < 0.3 else text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(WEIRD),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
