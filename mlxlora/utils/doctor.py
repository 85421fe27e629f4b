"""Reports the setup that a run has here (versions, device, BLAS, compiler, memory, disk) and how to improve it."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from attrs import frozen

from .device import backend, device_memory, device_name, package_version
from .files import cache_folder

REQUIRED = ("mlxlora", "mlx", "mlx-lm", "transformers", "tokenizers", "numpy")
OPTIONAL = {"datasets": "hub data sets"}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "HF_HOME")
SLOW = 30.0  # GFLOP/s in float32: more than a BLAS without vector instructions reaches; a fast one reaches 50 on one core
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
LITTLE_DISK = 5e9  # bytes


@frozen
class Finding:
    """One property of the setup.

    Attributes:
        name: of the property.
        value: its value here.
        ok: whether it needs no change.
        remedy: what to do if it does.
    """

    name: str
    value: str
    ok: bool = True
    remedy: str = ""


def examine(blas: str | None) -> list[Finding]:
    """All findings; takes about a second.

    Args:
        blas: the library that `load_fast_blas` loaded.
    """
    found = [*versions(REQUIRED), device(backend()), memory(mx.device_info())]
    if backend() == "cpu":
        found += [matrix_products(blas, gigaflops()), compiler(shutil.which)]
    return [*found, disk(cache_folder("")), *hub(os.environ), *extras(OPTIONAL)]


def versions(packages: Sequence[str]) -> list[Finding]:
    """Python and the packages that a run needs."""
    found = [_package(name) or Finding(name, "not installed", False, f"pip install {name}") for name in packages]
    return [Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"), *found]


def device(on: str) -> Finding:
    """The backend; not ok on a machine with a GPU that MLX does not use."""
    if on == "cpu" and sys.platform == "darwin":
        return Finding("device", "cpu", False, "MLX sees no GPU: it needs a Mac with Apple silicon and a native (arm64) Python")
    if on == "cpu" and shutil.which("nvidia-smi"):
        return Finding(
            "device", "cpu", False, "there is an NVIDIA GPU: pip install 'mlx[cuda13]' (or 'mlx[cuda12]') makes MLX use it"
        )
    return Finding("device", f"{on} {device_name()}".strip())


def memory(info: dict[str, Any]) -> Finding:
    """Memory of the device; the machine's if MLX reports none."""
    return Finding("memory", f"{device_memory(info) / 1e9:.1f} GB")


def gigaflops(size: int = 768, repetitions: int = 4) -> float:
    """Speed of float32 matrix products in 10⁹ operations per second; the best of a few repetitions."""
    a = mx.random.normal((size, size), key=mx.random.key(0))
    mx.eval(a)
    seconds = []
    for _ in range(repetitions):
        began = time.perf_counter()
        mx.eval(a @ a)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9


def matrix_products(blas: str | None, speed: float) -> Finding:
    """BLAS of the CPU backend, judged by its measured speed."""
    fast = blas or ("Accelerate" if sys.platform == "darwin" else None)
    name = fast or "MLX's own" + " (MLXLORA_BLAS=off)" * _switched_off()
    slow = speed < SLOW
    return Finding("BLAS", f"{name}: {speed:.0f} GFLOP/s in float32", not slow, _faster(bool(fast)) * slow)


def _faster(fast: bool) -> str:
    """The remedy for slow products, with a fast BLAS loaded or without one."""
    if not fast:
        return "unset MLXLORA_BLAS" if _switched_off() else "pip install scipy-openblas32, or apt-get install libopenblas0-pthread"
    limits = [f"{name}={os.environ[name]}" for name in THREADS if os.environ.get(name)]
    return (
        f"a fast one is loaded, but {' '.join(limits)} limits it: unset it"
        if limits
        else "a fast one is loaded: the machine is busy"
    )


def _switched_off() -> bool:
    return os.environ.get("MLXLORA_BLAS") == "off"


def compiler(which: Callable[[str], str | None]) -> Finding:
    """The compiler that mx.compile calls on a CPU; without it MLX runs each operation separately."""
    path = which("g++")
    if path or sys.platform == "darwin":
        return Finding("compiler", path or "clang")
    return Finding("compiler", "no g++: nothing is compiled, steps are slower", False, "apt-get install g++")


def disk(folder: Path) -> Finding:
    """Free space for the cache."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    few = "free some, or set MLXLORA_CACHE to a folder elsewhere" if free < LITTLE_DISK else ""
    return Finding("cache", f"{folder}: {free / 1e9:.1f} GB free", not few, few)


def hub(environment: Any) -> list[Finding]:
    """Environment variables that decide where models come from."""
    return [Finding(name, environment[name]) for name in OFFLINE if environment.get(name)]


def extras(packages: dict[str, str]) -> list[Finding]:
    """Packages that only some options need."""
    return [_package(name) or Finding(name, f"not installed (only for {use})") for name, use in packages.items()]


def _package(name: str) -> Finding | None:
    version = package_version(name)
    return None if version is None else Finding(name, version)
