"""Reads and writes files of parameters that ranks hold in slices, with one whole array in memory at a time."""

import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson
from attrs import field, frozen

from ..utils.safetensors import bytes_of, counted
from .ranks import Ranks
from .sharding import Shape, cut, is_sharded, ranks_of, shape_of, unsliced


@frozen(eq=False)
class Sliced:
    """An array of a file, the concatenation of whole arrays of which every rank holds slices.

    Attributes:
        key: its name in messages between ranks.
        shape: of the array in the file.
        dtype: of the array.
        shapes: of the whole arrays.
        ranks: the processes that hold the slices.
        own: returns this rank's slices.
        put: replaces this rank's slices.
    """

    key: str
    shape: Shape
    dtype: mx.Dtype
    shapes: tuple[Shape, ...]
    ranks: Ranks = field(repr=False)
    own: Callable[[], list[mx.array]] = field(repr=False)
    put: Callable[[list[mx.array]], None] = field(repr=False)

    def parts(self) -> Iterator[mx.array]:
        """The whole arrays one after the other; other ranks have to do the same or be in `on_rank0`."""
        if self.ranks.leads:
            self.ranks.of_rank0(["give", self.key])
        pending = zip(self.own(), self.shapes, strict=True)
        try:
            for own, shape in pending:
                yield unsliced(self.ranks.stacked(own.reshape(-1)), [shape])[0]
        except GeneratorExit:  # the reader failed, which the other ranks do not know
            for own, _ in pending:
                self.ranks.stacked(own.reshape(-1))
            raise

    def take(self, array: mx.array | None = None) -> None:
        """Replaces the slices by those of rank 0's array; other ranks give none."""
        if self.ranks.leads:
            self.ranks.of_rank0(["take", self.key])
        flat, found, start = None if array is None else array.reshape(-1), [], 0
        for shape in self.shapes:
            end = start + prod(shape)
            part = mx.zeros(shape, self.dtype) if flat is None else flat[start:end].reshape(shape).astype(self.dtype)
            found.append(cut(self.ranks.from_first(part), self.ranks))
            start = end
        self.put(found)


def stored(model: nn.Module, arrays: dict[str, mx.array]) -> dict[str, Any]:
    """Parameters of the model for a file: sliced ones become `Sliced` with the whole shape."""
    if not is_sharded(model):
        return arrays
    modules = dict(model.named_modules())
    return {name: _parameter(model, modules, name) for name in arrays}


def _parameter(model: nn.Module, modules: dict[str, Any], path: str) -> Sliced:
    parent, _, name = path.rpartition(".")
    module, ranks = modules[parent], ranks_of(model)
    shape = shape_of(module, name)

    def put(found: list[mx.array]) -> None:
        (module[name],) = found

    return Sliced(f"parameter {path}", shape, module[name].dtype, (shape,), ranks, lambda: [module[name]], put)


def write_stored(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None, *, checked: str = "") -> None:
    """Writes a safetensors file (https://huggingface.co/docs/safetensors) with one whole array in memory at a time.

    Args:
        path: of the file.
        arrays: MLX arrays and `Sliced` arrays.
        metadata: texts for its header.
        checked: key of a checksum in the header; empty: no checksum.
    """
    unknown, names = "0" * 8, sorted(arrays)
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {}), **({checked: unknown} if checked else {})}}
    end = crc = 0
    for name in names:
        start, end = end, end + prod(arrays[name].shape) * arrays[name].dtype.size
        header[name] = {"dtype": _CODES[arrays[name].dtype], "shape": list(arrays[name].shape), "data_offsets": [start, end]}
    text = orjson.dumps(header)
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            crc = counted(crc, name, arrays[name])
            with closing(_parts(arrays[name])) as parts:  # closes at once, because the other ranks wait
                for part in parts:
                    data = bytes_of(part)
                    file.write(data)
                    crc = zlib.crc32(data, crc)
        if checked:
            file.seek(8 + text.index(f'"{checked}":"{unknown}"'.encode()) + len(f'"{checked}":"'))
            file.write(f"{crc:08x}".encode())


def _parts(array: Any) -> Generator[mx.array, None, None]:
    yield from array.parts() if isinstance(array, Sliced) else (array,)


_CODES = {mx.bool_: "BOOL", mx.bfloat16: "BF16", mx.float16: "F16", mx.float32: "F32"}
_CODES |= {getattr(mx, f"{kind}{bits}"): f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
