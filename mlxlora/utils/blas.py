"""A fast BLAS for MLX's CPU backend on Linux, where MLX's own is 30 times slower."""

import ctypes
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .blas_shim import give_names

_SYSTEM = ("libopenblas.so.0", "libopenblas.so")
_PACKAGE, _PREFIX = "scipy_openblas32", "scipy_"
CALLED = (
    *("cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "sgetrf_", "dgetrf_", "sgetri_", "dgetri_", "strtri_", "dtrtri_", "spotrf_"),
    *("dpotrf_", "sgeqrf_", "dgeqrf_", "sorgqr_", "dorgqr_", "ssyevd_", "dsyevd_", "cheevd_", "sgeev_", "dgeev_", "cgeev_"),
    *("sgesdd_", "dgesdd_", "cgesdd_"),
)
"""What MLX 0.32 calls in BLAS and LAPACK (`nm -D --undefined-only libmlx.so`)."""


@cache
def load_fast_blas() -> str | None:
    """Loads OpenBLAS if there is one, so that MLX, imported later, uses it for matrix products; never raises.

    Takes the system's library, else that of the package scipy-openblas32, whose names have a prefix. Symbols of a library
    loaded with RTLD_GLOBAL come before those of the library that MLX is linked with. Does nothing outside Linux, after MLX was
    imported, or with MLXLORA_BLAS=off; a second call returns the result of the first.

    Returns:
        The library's name; None if nothing was loaded.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get("MLXLORA_BLAS") == "off":
        return None
    return _first(_SYSTEM, _load) or _first(_packaged(), _load_prefixed)


def _first(names: tuple[str, ...], load: Callable[[str], object]) -> str | None:
    """The first library that can be loaded."""
    for name in names:
        try:
            load(name)
        except (OSError, AttributeError):  # missing; built for another machine; other names
            continue
        return name
    return None


def _load(name: str) -> None:
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def _load_prefixed(path: str) -> None:
    """Keeps the library private; otherwise its names would come before those of SciPy's own copy."""
    library = ctypes.CDLL(path)
    functions = {name: getattr(library, _PREFIX + name) for name in CALLED}
    give_names({name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()})


def _packaged() -> tuple[str, ...]:
    """The libraries of the package, found without importing it."""
    spec = find_spec(_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    return tuple(str(file) for folder in folders for file in sorted(Path(folder, "lib").glob("libscipy_openblas*.so")))
