"""MLX's C++ header compiled once for all tests.

On a CPU `mx.compile` calls g++ for every new kernel, and g++ reads the same headers each time: 1.1 s of CPU time a kernel, 0.2 s
with the header precompiled. The libraries that result are byte for byte the same. A cold run of the tests builds 1,000 kernels.
"""

import os
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

_HEADER = Path("mlx/backend/cpu/compiled_preamble.h")
_FLAGS = ("-std=c++17", "-O3", "-Wall", "-fPIC")  # of mlx/backend/cpu/jit_compiler.cpp; with others g++ ignores what was built


def precompile_mlx_header() -> None:
    """Puts a g++ that knows the precompiled header in front of PATH, for this process and those it starts.

    Does nothing where there is no g++ or MLX has no such header.
    """
    compiler, include = shutil.which("g++"), _include()
    if compiler is None or include is None or "mlxlora-header" in compiler:
        return
    folder = Path(tempfile.gettempdir()) / f"mlxlora-header-{version('mlx')}-{os.getuid()}"
    if not (folder / "g++").exists() and not _build(folder, compiler, include):
        return
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def _include() -> Path | None:
    spec = find_spec("mlx")
    folders = [Path(folder) / "include" for folder in (spec and spec.submodule_search_locations) or ()]
    return next((folder for folder in folders if (folder / _HEADER).exists()), None)


def _build(folder: Path, compiler: str, include: Path) -> bool:
    """Builds beside the folder, then renames: two runs may start at once."""
    built = Path(tempfile.mkdtemp(prefix="mlxlora-header-"))
    header = built / _HEADER
    header.parent.mkdir(parents=True)
    shutil.copy(include / _HEADER, header)
    command = [compiler, *_FLAGS, f"-I{include}", "-x", "c++-header", str(include / _HEADER), "-o", f"{header}.gch"]
    done = subprocess.run(command, capture_output=True).returncode == 0
    if done:
        (built / "g++").write_text(f'#!/bin/sh\nexec {compiler} -I{folder} "$@"\n', encoding="utf-8")
        (built / "g++").chmod(0o755)
        try:
            built.rename(folder)
        except OSError:  # another run was first
            done = (folder / "g++").exists()
    shutil.rmtree(built, ignore_errors=True)
    return done
