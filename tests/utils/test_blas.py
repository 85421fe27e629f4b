"""A fast BLAS gets the names that MLX calls, from a library that has them under others."""

import ctypes
import ctypes.util
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlxlora.utils.blas_shim import give_names, image

linux = pytest.mark.skipif(sys.platform != "linux", reason="an ELF file is for Linux")

PRODUCTS = """
import mlxlora.utils.blas as blas
blas._SYSTEM = ()
print(blas.load_fast_blas())
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(0)
a, b = (rng.standard_normal((70, 70)).astype(np.float32) for _ in range(2))
s = a @ a.T + 70 * np.eye(70, dtype=np.float32)
assert np.allclose(np.array(mx.array(a) @ mx.array(b)), a @ b, atol=1e-3)
assert np.allclose(np.array(mx.array(a).T @ mx.array(b)), a.T @ b, atol=1e-3)
assert np.allclose(np.array(mx.linalg.cholesky(mx.array(s))), np.linalg.cholesky(s), atol=1e-3)
assert np.allclose(np.array(mx.linalg.inv(mx.array(s))) @ s, np.eye(70), atol=1e-3)
assert np.allclose(np.array(mx.linalg.svd(mx.array(a))[1]), np.linalg.svd(a)[1], atol=1e-3)
assert np.allclose(np.array(mx.linalg.eigh(mx.array(s))[0]), np.linalg.eigvalsh(s), rtol=1e-4)
assert "mlxlora-shim" in open("/proc/self/maps").read()
"""


@linux
@pytest.mark.skipif(find_spec("scipy_openblas32") is None, reason="needs scipy-openblas32, of the extra cpu")
def test_mlx_computes_with_the_package() -> None:
    done = subprocess.run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True)
    assert "libscipy_openblas" in done.stdout, done.stderr
    assert done.returncode == 0, done.stderr


@linux
def test_a_name_jumps_to_an_address() -> None:
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    address = ctypes.cast(library.pow, ctypes.c_void_p).value
    named = give_names({"mlxlora_power": address or 0, "mlxlora_other": address or 0})
    for name in ("mlxlora_power", "mlxlora_other"):
        function = getattr(named, name)
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double, ctypes.c_double]
        assert function(2.0, 10.0) == 1024.0
    assert not hasattr(named, "mlxlora_missing")
    assert hasattr(ctypes.CDLL(None), "mlxlora_power"), "libraries loaded later find it"


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_an_image_is_of_its_machine(machine: str, number: int) -> None:
    made = image({"f": 0x1234}, machine)
    assert made[:4] == b"\x7fELF" and int.from_bytes(made[18:20], "little") == number
    assert (0x1234).to_bytes(8, "little") in made


def test_another_machine_is_refused() -> None:
    with pytest.raises(OSError, match="riscv64"):
        image({"f": 1}, "riscv64")


@linux
def test_a_package_that_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "scipy_openblas32" / "lib").mkdir(parents=True)
    (tmp_path / "scipy_openblas32" / "__init__.py").touch()  # else an installed one comes before it
    (tmp_path / "scipy_openblas32" / "lib" / "libscipy_openblas.so").write_bytes(b"not a library")
    code = "import mlxlora.utils.blas as blas; blas._SYSTEM = (); print(blas.load_fast_blas())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("None\n", "")
