"""Arrays kept on disk for later runs: a safetensors file with a digest of all of it, whole or not there."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..errors import InputError
from .files import atomic_file, sweep

Arrays = dict[str, np.ndarray]
_LARGEST = 2**31 - 1  # MLX keeps dimensions in 32 bits
_DAY = 86400.0  # seconds; whoever wrote to a temporary name so long ago is gone


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes them, and the folder if there is none.

    Raises:
        OSError: they cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, "*.safetensors", older=_DAY)
    try:
        with atomic_file(path) as temporary:
            save_file(arrays, temporary, {"sha256": _checksum(arrays)})
    except SafetensorError as error:
        raise OSError(str(error)) from None


def read_checked(path: Path) -> Arrays:
    """What `write_arrays` wrote.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            known = (file.metadata() or {}).get("sha256")
    except (SafetensorError, TypeError, AttributeError) as error:  # numpy has no bfloat16, no 4 bits
        raise ValueError(str(error)) from None
    if known != _checksum(arrays):
        raise ValueError("its checksum does not match")
    return arrays


def check_header(path: Path) -> None:
    """Checks a safetensors file before MLX's reader, which trusts the header, sees it: lengths, types, shapes and places.

    Raises:
        InputError: it is damaged or cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            wide = [name for name in file.keys() if max(file.get_slice(name).get_shape(), default=0) > _LARGEST]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())[:200]})") from None
    if wide:
        raise InputError(f"{path}: {wide[0][:200]!r} has a dimension beyond {_LARGEST}, which MLX cannot hold")


# --- those of MLX -----------------------------------------------------------------------------


def counted(crc: int, name: str, array: Any) -> int:
    """CRC-32 that goes on with the name, the type and the shape of an array; its bytes follow."""
    return zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)


def bytes_of(array: mx.array) -> memoryview:
    """The numbers of an array, in order."""
    return np.array(mx.contiguous(array.reshape(-1)).view(mx.uint8)).data


def checksum(named: Iterable[tuple[str, mx.array]]) -> str:
    """CRC-32 of the names, types, shapes and bytes of arrays, which come in the order of their names.

    >>> checksum([("a", mx.zeros(2))]) != checksum([("a", mx.zeros(2, mx.int32))])
    True
    """
    crc = 0
    for name, array in named:
        crc = zlib.crc32(bytes_of(array), counted(crc, name, array))
    return f"{crc:08x}"


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
