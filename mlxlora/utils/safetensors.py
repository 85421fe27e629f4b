"""Safetensors files: numpy arrays kept for later runs with a digest, and checks before MLX reads a file."""

import hashlib
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save, save_file

from ..errors import InputError, reason
from .files import atomic_file, sweep

NumpyArrays = dict[str, np.ndarray]
_LARGEST = 2**31 - 1  # MLX keeps dimensions in 32 bits
_DAY = 86400.0  # seconds; no writer takes so long


def write_arrays(path: Path, arrays: NumpyArrays) -> None:
    """Writes arrays with their digest; makes the folder if there is none.

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


def read_checked(path: Path) -> NumpyArrays:
    """Reads what `write_arrays` wrote.

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


def bytes_of_arrays(arrays: NumpyArrays) -> bytes:
    """Arrays with their digest as bytes."""
    return save(arrays, {"sha256": _checksum(arrays)})


def arrays_of(content: bytes) -> NumpyArrays:
    """The inverse of `bytes_of_arrays`.

    Raises:
        ValueError: the bytes are damaged.
    """
    try:
        arrays = load(content)
        header = orjson.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        known = header["__metadata__"]["sha256"]
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    if known != _checksum(arrays):
        raise ValueError("its checksum does not match")
    return arrays


def check_header(path: Path) -> None:
    """Checks the header of a safetensors file, which MLX's reader trusts: lengths, types, shapes and offsets.

    Raises:
        InputError: it is damaged or cannot be read.
    """
    try:
        with safe_open(path, framework="np") as file:
            wide = [name for name in file.keys() if max(file.get_slice(name).get_shape(), default=0) > _LARGEST]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({reason(error)})") from None
    if wide:
        raise InputError(f"{path}: {wide[0][:200]!r} has a dimension beyond {_LARGEST}, which MLX cannot hold")


# --- arrays of MLX -----------------------------------------------------------------------------


def counted(crc: int, name: str, array: Any) -> int:
    """CRC-32 of what `crc` covers and the name, type and shape of an array; its bytes follow."""
    return zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)


def bytes_of(array: mx.array) -> memoryview:
    """The numbers of an array, in order."""
    return np.array(mx.contiguous(array.reshape(-1)).view(mx.uint8)).data


def checksum(named: Iterable[tuple[str, mx.array]]) -> str:
    """CRC-32 of the names, types, shapes and bytes of arrays, which must be sorted by name.

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
