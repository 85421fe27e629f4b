"""Converts adapters to and from the format of Hugging Face's peft library, bit for bit; by hand, because peft needs torch.

    mlx-lm   y = W x + scale · (x A) B          A [in, r]   B [r, out]   adapters.safetensors
    peft     y = W x + alpha / r · B' A' x      A' [r, in]  B' [out, r]  adapter_model.safetensors

So A' = Aᵀ, B' = Bᵀ and alpha = scale · r (rank-stabilized LoRA: alpha / √r). DoRA's magnitudes are the same in both.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson
from attrs import evolve, frozen
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.utils import hf_repo_to_path
from safetensors import safe_open

from ..config.options import AdapterOptions, ModelOptions
from ..errors import InputError, listed, quoted
from ..models.loading import load_with_config, model_options
from ..models.quantize import weight_of
from ..reporting.card import CARD, CardHead, front_matter, portable
from ..utils.folders import check_vacant, written_folder
from ..utils.paths import within
from .files import (
    CONFIG,
    is_number,
    mismatches,
    read_adapter_config,
    read_arrays,
    read_config_object,
    save,
    save_arrays,
    sound_arrays,
)
from .inject import layers_to_train, linear_keys
from .lora import NamedArrays, rank_of
from .prepare import attach, prepare
from .rank_scale import IN_BLOCK, resized

PEFT_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_KEY = re.compile(
    rf"{re.escape(_PREFIX)}(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(?:\.(?!weight$)\w+)?(?:\.weight)?"
)
_SAVED = re.compile(rf"{re.escape(_PREFIX)}(?P<path>(?:\w+\.)*(?:embed_tokens|wte|embedding|lm_head))(?:\.base_layer)?\.weight")
_NAMES = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initializations that subtract something from the base


# --- to peft ----------------------------------------------------------------------------------


def to_peft(
    model: str | ModelOptions,
    adapter_path: str | Path,
    output: str | Path,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> int:
    """Writes adapters as a folder that `peft.PeftModel.from_pretrained` reads, `mlxlora export` in Python.

    Args:
        model: the base; its weights are not read.
        adapter_path: folder of the adapters.
        output: the folder to write, whole or not at all.
        base_model: the name under which transformers finds the base; default: that in `model`.
        overwrite: replace a folder that `export` wrote.

    Returns:
        The number of modules.

    Raises:
        InputError: an adapter that peft does not support, or a module with another name in transformers; the message names it.
    """
    model = model_options(model)
    folder = check_vacant(output, "--peft", "export", overwrite=overwrite, apart_from=(adapter_path,))
    configuration = read_adapter_config(adapter_path)
    network, *_ = load_with_config(evolve(model, quantize=None), lazy=True)
    names = _checkpoint_names(str(model.model))
    attach(network, adapter_path)
    adapters = {path: m for path, m in network.named_modules() if "lora_a" in m}
    _check_exportable(adapters, names, configuration)
    base = base_model or str(model.model)
    with written_folder(folder, "--peft", "export") as temporary:
        save_arrays(temporary / PEFT_WEIGHTS, peft_arrays(read_arrays(adapter_path)), {"format": "pt"})
        described = peft_config(configuration, adapters, base)
        (temporary / CONFIG).write_bytes(orjson.dumps(described, option=orjson.OPT_INDENT_2))
        (temporary / CARD).write_text(_card(base, described), encoding="utf-8")
    return len(adapters)


def _checkpoint_names(model: str) -> set[str]:
    """Names of the weights of an original checkpoint; empty for one that mlx-lm converted, because it may have renamed them."""
    files = (Path(model) if Path(model).exists() else hf_repo_to_path(model)).glob("*.safetensors")
    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="np") as header:
            if (header.metadata() or {}).get("format") == "mlx":
                return set()
            names |= set(header.keys())
    return names


def _check_exportable(adapters: Mapping[str, nn.Module], names: set[str], config: Mapping[str, Any]) -> None:
    if not adapters:
        raise InputError(f"these are not LoRA or DoRA adapters (fine_tune_type {config.get('fine_tune_type')}); use `mlxlora fuse`")
    for path, module in adapters.items():
        if not isinstance(module, LoRALinear | DoRALinear):
            raise InputError(f"{path}: peft has no equivalent of mlx-lm's {type(module).__name__}; use `mlxlora fuse`")
        if names and f"{path}.weight" not in names:
            raise InputError(f"{path}: the checkpoint has no {path}.weight, so this module has another name in transformers")


def peft_arrays(arrays: Mapping[str, mx.array]) -> NamedArrays:
    """mlx-lm's adapter weights with peft's names and orientation.

    >>> [(name, array.shape) for name, array in peft_arrays({"layers.0.up_proj.lora_a": mx.zeros((64, 8))}).items()]
    [('base_model.model.layers.0.up_proj.lora_A.weight', (8, 64))]
    """
    split = ((*name.rpartition(".")[::2], array) for name, array in arrays.items())
    return {f"{_PREFIX}{path}.{_PARTS[part]}": array.T if array.ndim == 2 else array for path, part, array in split}


def peft_config(config: Mapping[str, Any], paths: Iterable[str], base: str) -> dict[str, Any]:
    """peft's adapter_config.json for an mlx-lm one."""
    parameters = config["lora_parameters"]
    targets, blocks = _targets(list(paths))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": parameters["rank"],
        "lora_alpha": alpha(parameters["scale"], parameters["rank"]),
        "lora_dropout": parameters["dropout"],
        "target_modules": targets,
        "layers_to_transform": blocks,
        "use_dora": config.get("fine_tune_type") == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def alpha(scale: float, rank: int) -> float:
    """scale · rank, or the floating-point number next to it that gives exactly `scale` when divided by `rank`.

    >>> alpha(20.0, 8), alpha(0.07, 100) / 100
    (160, 0.07)
    """
    found = next((value for value in _near(scale * rank) if value / rank == scale), scale * rank)
    return int(found) if found == int(found) else found


def _near(value: float) -> tuple[float, float, float]:
    return value, math.nextafter(value, math.inf), math.nextafter(value, -math.inf)


def _targets(paths: list[str]) -> tuple[list[str], list[int] | None]:
    """peft's target_modules and layers_to_transform: the same modules in several blocks, or every module by its full path."""
    found = [IN_BLOCK.fullmatch(path) for path in paths]
    inside = {(int(match["block"]), match["path"]) for match in found if match}
    blocks, names = sorted({block for block, _ in inside}), sorted({name for _, name in inside})
    if len(inside) == len(paths) == len(blocks) * len(names):
        return names, blocks
    return sorted(paths), None


def _card(base: str, config: Mapping[str, Any]) -> str:
    name = portable(base)
    kind = "DoRA" if config["use_dora"] else "LoRA"
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{name}"), ".")'
    )
    head = front_matter(name, CardHead(["mlxlora", kind.lower()], True, f"{kind} adapters for {name}", library="peft"))
    return f"{head}\n\n# {kind} adapters for {name}\n\nTrained on MLX, in the format of peft.\n\n```python\n{code}\n```\n"


# --- from peft --------------------------------------------------------------------------------


def from_peft(folder: str | Path, model: str | ModelOptions, output: str | Path, *, overwrite: bool = False) -> int:
    """Writes adapters of the peft library as an adapter folder of mlx-lm, `mlxlora import` in Python.

    Different ranks and scales become one: smaller ranks are padded with zeros, and scales are multiplied into B. peft may have
    saved embeddings, too (`save_embedding_layers`); these are not imported, so they have to be those of the base.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors of LoRA, rank-stabilized LoRA or DoRA.
        model: the base; default: the one that the folder names.
        output: the folder to write, whole or not at all.
        overwrite: replace a folder that `import` wrote.

    Returns:
        The number of modules.

    Raises:
        InputError: adapters that mlx-lm does not support or that do not fit the model; the message names them.
    """
    model = model_options(model)
    target = check_vacant(output, "--adapter-path", "import", overwrite=overwrite, apart_from=(folder,))
    config = read_config_object(folder)
    _check_importable(config, folder)
    file = within(Path(folder) / PEFT_WEIGHTS)
    arrays = sound_arrays(file)
    saved = {match["path"]: arrays.pop(key) for key in list(arrays) if (match := _SAVED.fullmatch(key))}
    modules = _modules(arrays, config, file)
    model = evolve(model, model=model.model or config.get("base_model_name_or_path"))
    network, *_ = load_with_config(model)
    _check_unchanged(network, saved, file)
    options = _options(network, modules, config)
    _fill(network, options, modules, folder)
    with written_folder(target, "--adapter-path", "import") as temporary:
        save(network, temporary, options, str(model.model))
    return len(modules)


def _check_importable(config: Mapping[str, Any], folder: str | Path) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(f"{folder}: peft_type is {quoted(config.get('peft_type'))}; mlx-lm has LORA, with or without use_dora")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise InputError(f"{folder}: base_model_name_or_path in its {CONFIG} must be text")
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(is_number, (config.get("lora_alpha"), *patterns.values()))):
        raise InputError(f"{folder}: lora_alpha and every alpha_pattern in its {CONFIG} must be numbers")
    if hard := [pattern for pattern in patterns if not _is_easy(pattern)]:
        raise InputError(f"{folder}: alpha_pattern {hard[0][:60]!r} is too complex or not a regular expression; name the modules")
    if not is_number(config.get("lora_dropout", 0.0)) or not 0 <= config.get("lora_dropout", 0.0) < 1:
        raise InputError(f"{folder}: lora_dropout in its {CONFIG} must be a number from 0 to below 1")
    initial = str(config.get("init_lora_weights")).lower()
    if initial.startswith(_CHANGES_BASE):
        raise InputError(f"{folder}: init_lora_weights {initial[:60]} changes the base; first convert to plain LoRA with peft")


def _is_easy(pattern: str) -> bool:
    """Whether a pattern from a file is a regular expression and matches quickly: few repetitions, none of a group."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(pattern) <= 200 and not re.search(r"\)\s*[*+{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 3


@frozen
class Module:
    """One adapted module: its arrays with mlx-lm's names, and its scale."""

    arrays: NamedArrays
    scale: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return rank_of(self.arrays)

    def resized(self, rank: int, scale: float) -> NamedArrays:
        """The same update with another scale and an equal or higher rank; leaves arrays that need no change as they are."""
        return resized(self.arrays, rank, self.scale / scale)


def _modules(arrays: NamedArrays, config: Mapping[str, Any], file: Path) -> dict[str, Module]:
    """The adapted modules by path, in the order of the file."""
    parts: dict[str, NamedArrays] = {}
    for key, array in arrays.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise InputError(f"{file}: {listed([key])} is not LoRA or DoRA of a linear module, which is all that mlx-lm has")
        parts.setdefault(match["path"], {})[_NAMES[match["part"]]] = array.T if array.ndim == 2 else array
    for path, found in parts.items():
        if not {"lora_a", "lora_b"} <= found.keys() or any(found[part].ndim != 2 for part in ("lora_a", "lora_b")):
            raise InputError(f"{file}: {listed([path])} needs two matrices, lora_A and lora_B")
    return {path: Module(found, _scale(path, found["lora_a"].shape[1], config)) for path, found in parts.items()}


def _check_unchanged(network: nn.Module, saved: NamedArrays, file: Path) -> None:
    """Refuses embeddings that differ from those of the base; a tied output layer is the embedding."""
    modules: dict[str, Any] = dict(network.named_modules())
    embedding = next((m for m in modules.values() if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)), None)
    for path, array in saved.items():
        module = modules.get(path) or (embedding if path.endswith("lm_head") else None)
        if module is None or array.shape != weight_of(module).shape:
            raise InputError(f"{file}: {listed([path])} has shape {list(array.shape)}; the base has no such weights")
        if not mx.array_equal(array.astype(weight_of(module).dtype), weight_of(module)):
            raise InputError(
                f"{file}: {listed([path])} differs from the base, but mlx-lm's adapters cannot replace it; merge with peft"
            )


def _scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    patterns = config.get("alpha_pattern") or {}
    pattern = next((p for p in patterns if re.fullmatch(rf"(.*\.)?({p})", path)), None)
    numerator = config["lora_alpha"] if pattern is None else patterns[pattern]
    quotient = numerator / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return min(_near(quotient), key=lambda value: len(repr(value)))  # 0.07, not 0.07000000000000002


def _options(network: nn.Module, modules: Mapping[str, Module], config: Mapping[str, Any]) -> AdapterOptions:
    """Options with which mlx-lm adapts all of the modules; it may adapt more, which then have no effect."""
    found = {path: IN_BLOCK.fullmatch(path) for path in modules}
    keys = {match["path"] if match else path for path, match in found.items()}
    blocks = [int(match["block"]) for match in found.values() if match]
    depth = layers_to_train(network, AdapterOptions(num_layers=-1))
    largest = max(modules.values(), key=lambda module: module.rank)
    return AdapterOptions(
        train_type="dora" if config.get("use_dora") else "lora",
        num_layers=min(max(depth - min(blocks, default=depth - 1), 1), depth),
        rank=largest.rank,
        scale=largest.scale,
        dropout=config.get("lora_dropout", 0.0),
        lora_keys=None if keys == linear_keys(network) else tuple(sorted(keys)),
    )


def _fill(network: nn.Module, options: AdapterOptions, modules: Mapping[str, Module], folder: str | Path) -> None:
    """Puts new adapters on the model and loads the weights of the modules that the folder has."""
    known = {name for name, _ in network.named_modules()}
    if missing := [path for path in modules if path not in known]:
        raise InputError(f"{folder} does not fit the model: it has no module {listed(missing, shown=5)}")
    prepare(network, options)
    wanted = dict(tree_flatten(network.trainable_parameters()))
    arrays = {
        f"{path}.{part}": array
        for path, module in modules.items()
        for part, array in module.resized(options.rank, options.scale).items()
    }
    if problems := mismatches(arrays, {name: wanted[name] for name in wanted if name in arrays}):
        raise InputError(f"{folder} does not fit the model: {problems}")
    network.load_weights(list(arrays.items()), strict=False)
