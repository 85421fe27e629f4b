"""Reads and writes trained weights, adapters or whole weights, in the files that mlx-lm reads."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard

import mlx.core as mx
import mlx.nn as nn
import orjson
from mlx.utils import tree_flatten

from ..config.options import AdapterOptions
from ..distributed.sharded_files import Sliced, stored, write_stored
from ..errors import InputError, listed, quoted, reason
from ..utils.files import atomic_file
from ..utils.launch import warn
from ..utils.paths import within
from ..utils.safetensors import check_header, checksum
from .inject import layers_to_train, lora_parameters, with_paths
from .lora import adapters_of
from .rank_scale import uniform

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_CHECKSUM, _CONFIG_CHECKSUM = "crc32", "config_crc32"  # in the header of a safetensors file: of its arrays, of CONFIG beside it
_BUILT_FROM = ("fine_tune_type", "num_layers", "lora_parameters", "quantize")  # without the model's name, which people change


def save(
    model: nn.Module,
    directory: str | Path,
    options: AdapterOptions,
    name: str = "",
    quantize: str | None = None,
    more: Mapping[str, Any] = {},
) -> None:
    """Writes adapters.safetensors and adapter_config.json in mlx-lm's format, each through a temporary name.

    Adapters with several ranks or scales, and PiSSA adapters, become updates of one rank and one scale on the unchanged weights.

    Args:
        model: with trained parameters.
        directory: the folder to write to.
        options: of the adapters.
        name: of the model, a folder or hub name, which mlx-lm stores, too.
        quantize: how the model was quantized as it was loaded.
        more: further entries of the configuration.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    arrays, size = uniform(model)
    arrays = stored(model, arrays)
    config = {
        "model": name,
        "fine_tune_type": options.train_type,
        "num_layers": layers_to_train(model, options),
        "lora_parameters": None if options.train_type == "full" else lora_parameters(with_paths(model, options), size),
        **({"quantize": quantize} if quantize else {}),
        **more,
    }
    with atomic_file(directory / CONFIG) as path:
        path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
    with atomic_file(directory / WEIGHTS) as path:
        save_arrays(path, arrays, config_checksum(config), checked=True)


def own_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The trained arrays and those that PiSSA started from, unconverted: from these a run resumes exactly."""
    started = {path: m.own_arrays() for path, m in adapters_of(model).items() if hasattr(m, "own_arrays")}
    beside = {f"{path}.{name}": array for path, arrays in started.items() for name, array in arrays.items()}
    return {**dict(tree_flatten(model.trainable_parameters())), **beside}  # type: ignore[dict-item]


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None, *, checked: bool = False) -> None:
    """Writes a safetensors file to exactly `path` (MLX would append a suffix); `checked`: with a checksum."""
    if any(isinstance(array, Sliced) for array in arrays.values()):
        write_stored(path, arrays, metadata, checked=_CHECKSUM if checked else "")
        return
    with path.open("wb") as file:
        described = {**(metadata or {}), **({_CHECKSUM: checksum(sorted(arrays.items()))} if checked else {})}
        mx.save_safetensors(file, arrays, described)  # type: ignore[arg-type]


def config_checksum(config: Mapping[str, Any]) -> dict[str, str]:
    """An entry for the header of an adapter file: the checksum of the configuration's values that adapters are built from."""
    try:
        text = orjson.dumps({name: config.get(name) for name in _BUILT_FROM}, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # nested too deep to be ours
        text = b""
    return {_CONFIG_CHECKSUM: f"{zlib.crc32(text):08x}"}


def put_arrays(model: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Loads arrays into the model; sliced parameters one after the other, which empties `arrays` of them."""
    for name, place in stored(model, own_arrays(model)).items():
        if isinstance(place, Sliced):
            place.take(arrays.pop(name))
    model.load_weights(list(arrays.items()), strict=False)


def check_settings(config: dict[str, Any], path: Path) -> None:
    """Checks the types and ranges of the values that adapters are built from.

    Raises:
        InputError: the configuration at `path` lacks a value or has a wrong one.
    """
    rules: list[tuple[str, Any, bool, str]] = [
        (name, value, value is None or isinstance(value, str), "text")
        for name, value in ((name, config.get(name)) for name in ("model", "quantize"))
    ]
    kind, parameters = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    rules.append(("fine_tune_type", kind, kind in ("lora", "dora", "full"), "lora, dora or full"))
    if kind != "full":
        rules.append(("num_layers", config.get("num_layers"), type(config.get("num_layers")) is int, "a whole number"))
        rules.append(("lora_parameters", parameters, isinstance(parameters, dict), "an object with rank, scale and dropout"))
    if kind != "full" and isinstance(parameters, dict):
        rank, scale, dropout, keys = (parameters.get(name) for name in ("rank", "scale", "dropout", "keys"))
        named = keys is None or (isinstance(keys, list) and all(isinstance(key, str) for key in keys))
        rules += [
            ("rank", rank, type(rank) is int and 0 < rank < 2**16, "a whole number above 0"),
            ("scale", scale, is_number(scale) and scale != 0, "a number other than 0"),
            ("dropout", dropout, is_number(dropout) and 0 <= dropout < 1, "a number from 0 to below 1"),
            ("keys", keys, named, "a list of module names"),
        ]
    for name, value, holds, expected in rules:
        if not holds:
            raise InputError(f"{path}: {name} must be {expected}, got {quoted(value)}")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number that MLX can compute with.

    >>> is_number(1), is_number(True), is_number(10**400), is_number("1")
    (True, False, False, False)
    """
    return type(value) in (int, float) and abs(value) < 1e30


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a folder of mlx-lm's adapters.

    Raises:
        InputError: there is none, it is not a JSON object, or it is that of peft.
    """
    config = read_config_object(directory)
    if "peft_type" in config:
        convert = f"`mlxlora import --peft {directory} --adapter-path NEW`"
        raise InputError(f"{directory}: these adapters are in the format of peft; convert them with {convert}")
    return config


def read_config_object(directory: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a folder, of mlx-lm or peft.

    Raises:
        InputError: there is none, or it is not a JSON object.
    """
    path = Path(directory) / CONFIG
    try:
        config = orjson.loads(within(path).read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise InputError(f"{directory}: no adapters there ({path.name}: {getattr(error, 'strerror', None) or error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object with lora_parameters, got {quoted(config)}")
    return config


def sound_arrays(file: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, mx.array]:
    """The arrays of a safetensors file, checked to be finite.

    Args:
        file: an adapter folder or a file.
        config: the configuration beside it; warns if it has changed since the file was written.

    Raises:
        InputError: the file is missing or damaged, or has NaN or infinity.
    """
    arrays, metadata = _read(file)
    finite = [mx.isfinite(array).all() for array in arrays.values()]
    mx.eval(finite)
    if broken := [name for name, fine in zip(arrays, finite, strict=True) if not fine.item()]:
        raise InputError(f"{file} has NaN or infinity in {listed(sorted(broken), shown=3)}; use an earlier checkpoint")
    if config is not None and _CONFIG_CHECKSUM in metadata and not config_checksum(config).items() <= metadata.items():
        warn(f"{_file(file)}: {CONFIG} has changed since it was written; if that was not you, use another copy")
    return arrays


def read_arrays(file: str | Path, *, lazy: bool = False) -> dict[str, mx.array]:
    """The arrays of a safetensors file; if `lazy`, each is read when it is used, and the checksum is not verified.

    Raises:
        InputError: the file is missing or damaged; a checksum detects a single wrong bit.
    """
    return _load(file)[0] if lazy else _read(file)[0]


def check_arrays(file: str | Path) -> None:
    """Verifies a safetensors file, with one array at a time in memory.

    Raises:
        InputError: the file is missing or damaged.
    """
    arrays, metadata = _load(file)
    _check(file, metadata, ((name, arrays.pop(name)) for name in sorted(arrays)))


_Content = tuple[dict[str, mx.array], dict[str, str]]  # arrays and metadata


def _read(file: str | Path) -> _Content:
    arrays, metadata = _load(file)
    _check(file, metadata, ((name, arrays[name]) for name in sorted(arrays)))
    return arrays, metadata


def _load(file: str | Path) -> _Content:
    """Loads by path: MLX's threads may keep a file object that Python opened, even as the interpreter ends."""
    path = _file(file)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a safetensors file such as adapters/{WEIGHTS}")
    check_header(path)
    with _readable(path):
        return mx.load(str(path), format="safetensors", return_metadata=True)  # type: ignore[return-value]


def _check(file: str | Path, metadata: Mapping[str, str], arrays: Iterator[tuple[str, mx.array]]) -> None:
    path, known = _file(file), metadata.get(_CHECKSUM)
    with _readable(path):
        if known is None:
            for _, array in arrays:
                mx.eval(array)
            return
        found = checksum(arrays)
    if known != found:
        raise InputError(f"{path}: damaged: its checksum does not match; use another copy, or one of the run's checkpoints")


def _file(file: str | Path) -> Path:
    return within(Path(file) / WEIGHTS) if Path(file).is_dir() else Path(file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({reason(error)})") from None


def mismatches(arrays: dict[str, mx.array], wanted: dict[str, mx.array]) -> str:
    """What is missing, superfluous or has another shape, on one line; empty if the arrays match."""
    both = [(n, list(a.shape), list(wanted[n].shape)) for n, a in sorted(arrays.items()) if n in wanted]
    found = [f"{n} has shape {ours}, not {theirs}" for n, ours, theirs in both if ours != theirs]
    found += [f"{n} is not trainable in the model" for n in arrays if n not in wanted]
    found += [f"{n} is missing" for n in wanted if n not in arrays]
    return listed(found, shown=3, separator="; ")
