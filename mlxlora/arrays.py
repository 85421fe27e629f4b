"""Arrays kept on disk for later runs: a safetensors file with a digest of all of it, whole or not there."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .files import atomic_file

Arrays = dict[str, np.ndarray]


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Writes them, and the folder if there is none.

    Raises:
        OSError: they cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
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
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    if known != _checksum(arrays):
        raise ValueError("its checksum does not match")
    return arrays


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
