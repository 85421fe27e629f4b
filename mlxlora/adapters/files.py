"""What is trained: low-rank adapters on an mlx-lm model or its own weights, in the files that mlx-lm reads."""

from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import contextmanager
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.lora import LoRASwitchLinear
from pathlib import Path
from typing import Any
from typing import TypeGuard
import mlx.core as mx
import mlx.nn as nn
import orjson
import zlib
from .pissa import PiSSALinear
from .lora import LeanLoRALinear, adapted
from .inject import layers_to_train, lora_parameters, with_paths
from ..config.options import AdapterOptions
from ..utils.files import atomic_file
from ..distributed.sharded_files import Sliced, stored, write_stored
from .rank_scale import uniform
from ..utils.safetensors import check_header, checksum
from ..errors import InputError, quoted
from ..utils.launch import warn

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_CHECKSUM, _CONFIGURED = "crc32", "config_crc32"  # in the header of a safetensors file: of its arrays, and of what is beside it
_BUILT_FROM = ("fine_tune_type", "num_layers", "lora_parameters", "quantize")  # of the configuration: names of models are changed
_BASE = {  # where each kind of adapter keeps the module that it adapts
    **dict.fromkeys((LoRALinear, LeanLoRALinear, PiSSALinear, DoRALinear, LoRASwitchLinear), "linear"),
    **dict.fromkeys((LoRAEmbedding, DoRAEmbedding), "embedding"),
}


# --- files ----------------------------------------------------------------------------------


def save(model: nn.Module, directory: str | Path, options: AdapterOptions, name: str = "", quantize: str | None = None) -> None:
    """Writes adapters.safetensors and adapter_config.json as mlx-lm writes them, each through a temporary name.

    Adapters of several ranks or multipliers, or that started from components of the weights, become updates of one rank and
    one multiplier on the weights as they are. The `name` of the model is kept there too, as mlx-lm keeps it, and how it was
    quantised as it was loaded.
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
    }
    with atomic_file(directory / CONFIG) as path:
        path.write_bytes(orjson.dumps(config, option=orjson.OPT_INDENT_2))
    with atomic_file(directory / WEIGHTS) as path:
        save_arrays(path, arrays, configured(config), checked=True)


def own_arrays(model: nn.Module) -> dict[str, mx.array]:
    """What is trained and what it started from, as they are; with these a run goes on exactly."""
    started = {path: m.own_arrays() for path, m in adapted(model).items() if hasattr(m, "own_arrays")}
    beside = {f"{path}.{name}": array for path, arrays in started.items() for name, array in arrays.items()}
    return {**dict(tree_flatten(model.trainable_parameters())), **beside}  # type: ignore[dict-item]


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None, *, checked: bool = False) -> None:
    """A safetensors file at exactly `path` (MLX would append the suffix); `checked`: with a checksum."""
    if any(isinstance(array, Sliced) for array in arrays.values()):
        write_stored(path, arrays, metadata, checked=_CHECKSUM if checked else "")
        return
    with path.open("wb") as file:
        described = {**(metadata or {}), **({_CHECKSUM: checksum(sorted(arrays.items()))} if checked else {})}
        mx.save_safetensors(file, arrays, described)  # type: ignore[arg-type]


def configured(config: Mapping[str, Any]) -> dict[str, str]:
    """For the header of a file of adapters: a checksum of what they are built from, however the configuration is laid out."""
    try:
        text = orjson.dumps({name: config.get(name) for name in _BUILT_FROM}, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # deeper than any of ours
        text = b""
    return {_CONFIGURED: f"{zlib.crc32(text):08x}"}


def put_arrays(model: nn.Module, arrays: dict[str, mx.array]) -> None:
    """Puts what a file has into the model, one after the other where parameters are slices; `arrays` is empty then."""
    for name, place in stored(model, own_arrays(model)).items():
        if isinstance(place, Sliced):
            place.take(arrays.pop(name))
    model.load_weights(list(arrays.items()), strict=False)


def check_settings(config: dict[str, Any], path: Path) -> None:
    """Checks the types of what adapters are built from.

    Raises:
        InputError: the configuration at `path` has something of another type, or lacks it.
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
    """Whether a value of JSON is a number within what MLX computes with.

    >>> is_number(1), is_number(True), is_number(10**400), is_number("1")
    (True, False, False, False)
    """
    return type(value) in (int, float) and abs(value) < 1e30


def read_config(directory: str | Path) -> dict[str, Any]:
    """The adapter_config.json of an adapter directory.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = Path(directory) / CONFIG
    try:
        config = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise InputError(f"{directory}: no adapters there ({path.name}: {getattr(error, 'strerror', None) or error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object with lora_parameters, got {quoted(config)}")
    return config


def sound_arrays(file: str | Path, config: Mapping[str, Any] | None = None) -> dict[str, mx.array]:
    """The arrays of a safetensors file, all of them finite; with a warning if `config`, of the file beside it, is another now.

    Raises:
        InputError: it is missing or damaged, or holds NaN or infinity.
    """
    arrays, metadata = _read(file)
    finite = [mx.isfinite(array).all() for array in arrays.values()]
    mx.eval(finite)
    if broken := [name for name, fine in zip(arrays, finite, strict=True) if not fine.item()]:
        raise InputError(f"{file} holds numbers that are not finite: {_some(sorted(broken), 3)}; take an earlier checkpoint")
    if config is not None and _CONFIGURED in metadata and not configured(config).items() <= metadata.items():
        warn(f"{_file(file)}: {CONFIG} is not the one that was written with it; if you did not change it, take another copy")
    return arrays


def read_arrays(file: str | Path, *, lazy: bool = False) -> dict[str, mx.array]:
    """The arrays of a safetensors file; if `lazy`, each is read when it is used, and no checksum is looked at.

    Raises:
        InputError: it is missing or damaged; where the file has a checksum, one bit is enough.
    """
    return _load(file)[0] if lazy else _read(file)[0]


def check_arrays(file: str | Path) -> None:
    """Reads a safetensors file and forgets it, so that never more than one array is in memory.

    Raises:
        InputError: it is missing or damaged.
    """
    arrays, metadata = _load(file)
    _check(file, metadata, ((name, arrays.pop(name)) for name in sorted(arrays)))


Found = tuple[dict[str, mx.array], dict[str, str]]


def _read(file: str | Path) -> Found:
    """Arrays and metadata."""
    arrays, metadata = _load(file)
    _check(file, metadata, ((name, arrays[name]) for name in sorted(arrays)))
    return arrays, metadata


def _load(file: str | Path) -> Found:
    """Both by their path: of a file that Python opened, a thread of MLX could hold on to until the interpreter is gone."""
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
        raise InputError(f"{path}: damaged: its checksum does not match; take another copy, or one of the run's checkpoints")


def _file(file: str | Path) -> Path:
    return Path(file) / WEIGHTS if Path(file).is_dir() else Path(file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({' '.join(str(error).split())})") from None


def mismatches(arrays: dict[str, mx.array], wanted: dict[str, mx.array]) -> str:
    """What is missing, superfluous or of another shape, in one line; empty if nothing is."""
    both = [(n, list(a.shape), list(wanted[n].shape)) for n, a in sorted(arrays.items()) if n in wanted]
    found = [f"{n} has shape {ours}, not {theirs}" for n, ours, theirs in both if ours != theirs]
    found += [f"{n} is not trainable in the model" for n in arrays if n not in wanted]
    found += [f"{n} is missing" for n in wanted if n not in arrays]
    return _some(found)


def _some(problems: list[str], shown: int = 3) -> str:
    """Problems in one line, those past `shown` as a number."""
    more = f" and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + more
