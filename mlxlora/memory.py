"""How much memory a run may use."""

import re
from collections.abc import Iterable

import mlx.core as mx

from .machine import device_memory

_SHARE = 0.8  # of the device's memory; the rest is for the system and what MLX does not count


def limit_memory(gigabytes: float | None = None) -> int:
    """Bounds what MLX holds: near the limit, its scheduler waits for running work in place of starting more.

    Args:
        gigabytes: 10^9 bytes; None = 80 % of what the device can use.

    Returns:
        The limit in bytes.
    """
    limit = int(gigabytes * 1e9) if gigabytes else int(_SHARE * device_memory())
    mx.set_memory_limit(limit)
    if mx.metal.is_available():
        mx.set_wired_limit(min(limit, device_memory()))
    return limit


def memory_limit() -> int:
    """The limit in bytes."""
    return mx.get_memory_limit()


def out_of_memory(error: BaseException) -> bool:
    """Whether MLX could not allocate; its errors have no type of their own.

    >>> out_of_memory(RuntimeError("[malloc] Unable to allocate 123 bytes."))
    True
    """
    return isinstance(error, RuntimeError | MemoryError) and bool(_ALLOCATION.search(str(error)))


_ALLOCATION = re.compile(r"out of memory|unable to allocate|attempting to allocate|insufficient memory|malloc", re.IGNORECASE)


_SMALLER = (
    *("--micro-batch 1", "--grad-checkpoint", "a smaller --max-seq-length"),
    *("--quantize 4", "--train-type lora in place of full", "fewer --num-layers"),
)


def smaller(no_use: Iterable[str] = ()) -> list[str]:
    """What makes a run need less memory, the cheapest first, without what is of `no_use` to it.

    >>> smaller(["--micro-batch 1", "--grad-checkpoint"])[:2]
    ['a smaller --max-seq-length', '--quantize 4']
    """
    unwanted = set(no_use)
    return [remedy for remedy in _SMALLER if remedy not in unwanted]
