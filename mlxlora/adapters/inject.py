"""Puts adapters on a model: chooses modules and layers as mlx-lm does, and gives each its rank, scale and start."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
from attrs import evolve
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..config.options import AdapterOptions
from ..errors import InputError, listed
from ..models.quantize import weight_of
from .lora import LeanLoRALinear, adapters_of, base_of_adapter, lean, rank_of, unusual
from .pissa import iterations_of, pissa
from .rank_scale import Size, size_of, unmatched
from .read_weights import read_directly

ALL_LINEAR = "all-linear"
DEFAULT_LAYERS = 16  # as in mlx-lm
_EXPERTS, _EMBEDDINGS = (SwitchLinear, QuantizedSwitchLinear), (nn.Embedding, nn.QuantizedEmbedding)
_ADAPTABLE = (nn.Linear, nn.QuantizedLinear, *_EXPERTS, *_EMBEDDINGS)  # by mlx-lm


def layers_to_train(model: nn.Module, options: AdapterOptions) -> int:
    """The number of blocks to train, counted from the last.

    Raises:
        InputError: more than the model has.
    """
    depth, asked = len(model.layers), options.num_layers  # type: ignore[arg-type]
    if asked is None:
        return min(DEFAULT_LAYERS, depth)
    if asked > depth:
        raise InputError(f"--num-layers {asked}: the model has {depth} layers; use {depth} or -1 for all")
    return depth if asked == -1 else asked


def convert(model: nn.Module, layers: int, options: AdapterOptions) -> None:
    """Puts adapters on the modules that `options` name: in the last `layers` blocks, and outside of blocks.

    Raises:
        InputError: modules that do not exist or cannot have such adapters; the message names them.
    """
    options = with_paths(model, options)
    _check(model, options)
    _check_read(model, _targets(model, layers, options))
    _check_rank(_targets(model, layers, options), options)
    if options.train_type == "dora":
        _check_dora(model, layers, options)
    try:
        linear_to_lora_layers(model, layers, lora_parameters(options), use_dora=options.train_type == "dora")
        lean(model)
    except ValueError as error:  # a kind of layer that mlx-lm cannot adapt
        raise InputError(f"--train-type {options.train_type}: {error}; name other modules with --lora-keys") from None
    _check_own(model, options)
    _resize(model, options)
    if options.init_lora_weights != "default":
        _start_from_components(model, options.init_lora_weights)


def _check(model: nn.Module, options: AdapterOptions) -> None:
    known = {name for name, _ in model.named_modules()} | {n for b in model.layers for n, _ in b.named_modules()}  # type: ignore[union-attr]
    missing = [key for key in options.lora_keys or () if key not in known]
    if "lm_head" in missing:
        raise InputError("--lora-keys: the output layer of this model is its embedding; use embed_tokens instead of lm_head")
    if missing:
        raise InputError(f"--lora-keys: the model has no module {listed(missing)}; a block has {', '.join(_linear(model))}")
    if options.init_lora_weights != "default" and (options.train_type == "dora" or options.dropout):
        raise InputError(f"--init-lora-weights {options.init_lora_weights} needs --train-type lora and --dropout 0")
    if options.init_lora_weights != "default" and options.resume_adapter_file:
        raise InputError("--resume-adapter-file sets the initial adapters; omit --init-lora-weights")


def _check_read(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuses layers whose weights the model reads itself: it would compute without the adapter, or fail."""
    read = read_directly(model)
    if wrong := [name for name, module in targets.items() if id(module) in read]:
        raise InputError(
            f"--lora-keys: the model reads the weights of {listed(wrong)} itself, so they take no adapter; omit the key"
        )


def _check_rank(targets: Mapping[str, nn.Module], options: AdapterOptions) -> None:
    """Refuses a rank above the smaller side of every adapted matrix: it adds nothing, and memory may not hold it.

    A rank that is above the side of some, such as the router of a mixture of experts, is fine, as in mlx-lm.
    """
    sides = {name: min(sizes) for name, m in targets.items() if (sizes := _sizes(m))}
    if sides and options.rank > (most := max(sides.values())):
        name = max(sides, key=lambda name: sides[name])
        raise InputError(
            f"--rank must be at most {most}, the smaller side of {name}, the largest adapted matrix; got {options.rank}"
        )
    for name, side in sides.items():
        if (own := size_of(name, options).rank) > max(side, options.rank):
            raise InputError(f"--rank-pattern: {name} has a smaller side of {side}, got {own}")


def _sizes(module: Any) -> tuple[int, ...]:
    """Rows and columns of a module's matrix, also of a quantized one; empty if it has none."""
    weight = getattr(module, "weight", None)
    if weight is None or weight.ndim < 2:
        return ()
    columns = weight.shape[-1] * 32 // module.bits if "scales" in module else weight.shape[-1]
    return weight.shape[-2], columns


def _check_dora(model: nn.Module, layers: int, options: AdapterOptions) -> None:
    """Refuses modules for which mlx-lm has no DoRA, or computes wrong sizes when it adds or loads it."""
    targets = _targets(model, layers, options)
    lacking = {name: why for name, m in targets.items() if (why := _without_dora(m))}
    if lacking:
        rest = [name for name in targets if name not in lacking]
        remedy = f"name the others, --lora-keys {','.join(rest)}, or use" if rest else "use"
        refused = [f"{', '.join(n for n in lacking if lacking[n] == why)} ({why})" for why in dict.fromkeys(lacking.values())]
        raise InputError(f"--train-type dora: mlx-lm has none for {'; '.join(refused)}; {remedy} --train-type lora")


def _without_dora(module: Any) -> str:
    if isinstance(module, _EXPERTS):
        return "experts"
    if isinstance(module, nn.QuantizedEmbedding):
        return "quantized embedding"
    if isinstance(module, nn.QuantizedLinear) and 32 % module.bits:
        return f"{module.bits} bits; 4 and 8 are fine"
    return "" if isinstance(module, _ADAPTABLE) else type(module).__name__


def _targets(model: nn.Module, layers: int, options: AdapterOptions) -> dict[str, nn.Module]:
    """The modules that mlx-lm is going to adapt, by key."""
    keys = options.lora_keys or linear_keys(model)
    blocks = [(name, m) for block in model.layers[-layers:] for name, m in block.named_modules()]  # type: ignore[union-attr]
    return {name: m for name, m in [*blocks, *model.named_modules()] if name in keys}


def _check_own(model: nn.Module, options: AdapterOptions) -> None:
    """Refuses options that adapters of the model's own kind do not support: they have the common rank and start at zero."""
    plain, own = AdapterOptions(), unusual(model)
    for name in ("rank_pattern", "alpha_pattern", "init_lora_weights"):
        if own and getattr(options, name) != getattr(plain, name):
            raise InputError(f"--{name.replace('_', '-')} does not support {own[0]}, an adapter of the model's own kind; omit it")


def _resize(model: nn.Module, options: AdapterOptions) -> None:
    """Gives modules that a pattern names their own rank and scale."""
    modules = adapters_of(model)
    if wrong := unmatched(options, list(modules)):
        raise InputError(f"--rank-pattern, --alpha-pattern: {listed(wrong)} matches none of the adapted modules")
    wanted = {path: size_of(path, options) for path in modules}
    changed = [(path, m) for path, m in modules.items() if wanted[path] != Size(rank_of(m), m.scale)]
    for path, module in changed:
        size = wanted[path]
        fresh = type(module).from_base(base_of_adapter(module), r=size.rank, scale=size.scale, dropout=options.dropout)
        model.update_modules(tree_unflatten([(path, fresh)]))
    lean(model)


def _start_from_components(model: nn.Module, how: str) -> None:
    for path, module in adapters_of(model).items():
        if type(module) is not LeanLoRALinear:
            raise InputError(f"--init-lora-weights {how}: {path} is not a linear layer; name other modules with --lora-keys")
        weight = weight_of(module.linear)
        if rank_of(module) > min(weight.shape):
            raise InputError(f"--init-lora-weights {how}: {path} has {min(weight.shape)} components; use a rank up to that")
        model.update_modules(tree_unflatten([(path, pissa(module, weight, iterations_of(how)))]))


def with_paths(model: nn.Module, options: AdapterOptions) -> AdapterOptions:
    """Options with paths as keys: a last name, such as gate_proj, stands for every module of that name."""
    blocks = [(name, m) for block in model.layers for name, m in _modules(block)]  # type: ignore[union-attr]
    inside = {id(m) for _, m in blocks}
    outside = [name for name, m in _modules(model) if id(m) not in inside and _is_adaptable(m)]
    names = dict.fromkeys([*(name for name, _ in blocks), *outside])
    ends = [(name, name.rpartition(".")[2]) for name in names]

    def paths(key: str) -> list[str]:
        if key == ALL_LINEAR:
            return sorted(linear_keys(model))
        return [key] if key in names else [name for name, end in ends if end == key] or [key]

    keys = options.lora_keys or ((ALL_LINEAR,) if read_directly(model) else ())
    found = dict.fromkeys(path for key in keys for path in paths(key))
    return evolve(options, lora_keys=tuple(found) or None)


def linear_keys(model: nn.Module) -> set[str]:
    """The modules of blocks that mlx-lm adapts by default, without those whose weights the model reads itself."""
    read = read_directly(model)
    named = [(name, m) for layer in model.layers for name, m in _modules(layer)]  # type: ignore[union-attr]
    return {name for name, m in named if _is_adaptable(m) and id(m) not in read}


def _is_adaptable(module: nn.Module) -> bool:
    return isinstance(module, _ADAPTABLE) or hasattr(module, "to_lora") or "lora_a" in module


def _modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by path, with an adapter in place of its base."""
    named = module.named_modules()
    hidden = tuple(f"{name}." for name, m in named if "lora_a" in m)
    return [(name, m) for name, m in named if not (hidden and name.startswith(hidden))]


def _linear(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.QuantizedLinear)
    return [name for name, m in model.layers[-1].named_modules() if isinstance(m, kinds)]  # type: ignore[union-attr]


def lora_parameters(options: AdapterOptions, size: Size | None = None) -> dict[str, Any]:
    """mlx-lm's `lora_parameters` for updates of one size; default: the size of modules that no pattern matches."""
    size = size or size_of("", evolve(options, rank_pattern=None, alpha_pattern=None))
    parameters: dict[str, Any] = {"rank": size.rank, "dropout": options.dropout, "scale": size.scale}
    return {**parameters, "keys": list(options.lora_keys)} if options.lora_keys else parameters
