"""The backend, the device and its memory."""

import os
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import Any

import mlx.core as mx


def backend() -> str:
    """The backend of MLX's default device: cpu, cuda or metal."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_name() -> str:
    """The device's own name; empty if it has none."""
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or "")


def device_memory(info: Mapping[str, Any] | None = None) -> int:
    """Bytes that the default device can use; the machine's memory if MLX reports none. `info` is `mx.device_info()`."""
    info = mx.device_info() if info is None else info
    known = (info.get(name) for name in ("max_recommended_working_set_size", "total_memory", "memory_size"))
    return int(next((size for size in known if size), 0) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def package_version(name: str) -> str | None:
    """The version of a package; None if it is not installed.

    >>> package_version("nonesuch") is None
    True
    """
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


_SHARE = 0.8  # of the device's memory; the system and allocations that MLX does not count need the rest


def limit_memory(gigabytes: float | None = None) -> int:
    """Bounds the memory that MLX holds: near the limit, its scheduler waits for running work before it starts more.

    Args:
        gigabytes: 10^9 bytes; None: 80 % of what the device can use.

    Returns:
        The limit in bytes.
    """
    limit = int(gigabytes * 1e9) if gigabytes else int(_SHARE * device_memory())
    mx.set_memory_limit(limit)
    if mx.metal.is_available():
        mx.set_wired_limit(min(limit, device_memory()))
    return limit


def memory_limit() -> int:
    """MLX's memory limit in bytes."""
    return mx.get_memory_limit()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that MLX could not allocate memory; such errors have no type of their own.

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
    """Remedies that make a run need less memory, the cheapest first, without those of `no_use` to it.

    >>> smaller(["--micro-batch 1", "--grad-checkpoint"])[:2]
    ['a smaller --max-seq-length', '--quantize 4']
    """
    unwanted = set(no_use)
    return [remedy for remedy in _SMALLER if remedy not in unwanted]
