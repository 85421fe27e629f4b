"""What MLX computes on here, and which packages there are."""

import os
from collections.abc import Mapping
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
    """As the device calls itself; empty where it does not."""
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or "")


def device_memory(info: Mapping[str, Any] | None = None) -> int:
    """Bytes that the default device can use, or the machine's where MLX does not say; `info` is `mx.device_info()`."""
    info = mx.device_info() if info is None else info
    known = (info.get(name) for name in ("max_recommended_working_set_size", "total_memory", "memory_size"))
    return int(next((size for size in known if size), 0) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def package_version(name: str) -> str | None:
    """Of an installed package; None if it is not.

    >>> package_version("nonesuch") is None
    True
    """
    try:
        return installed(name)
    except PackageNotFoundError:
        return None
