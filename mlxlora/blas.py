"""A fast BLAS for MLX's CPU backend on Linux, where the system's default one may be 30 times slower."""

import ctypes
import os
import sys

_NAMES = ("libopenblas.so.0", "libopenblas.so")


def load_fast_blas() -> str | None:
    """Loads OpenBLAS if there is one, so that MLX, imported later, resolves its matrix products to it; never raises.

    Symbols of a library loaded with RTLD_GLOBAL come before those of the one that MLX is linked with. Nothing is done
    outside Linux, where MLX is imported already, or with MLXLORA_BLAS=off.

    Returns:
        The library's name, None if nothing was loaded.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get("MLXLORA_BLAS") == "off":
        return None
    for name in _NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None
