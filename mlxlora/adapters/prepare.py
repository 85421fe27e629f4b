"""Makes a model trainable: adds adapters, turns them off, loads saved ones."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from attrs import evolve
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters

from ..config.options import AdapterOptions, BaseOptions, ModelOptions
from ..data.own_template import template_of_run
from ..errors import InputError, listed, quoted
from ..models.loading import load_with_config, model_options
from ..models.modes import exact, freeze, round_weights
from ..utils.patches import Slot
from .files import CONFIG, WEIGHTS, check_settings, is_number, mismatches, read_adapter_config, sound_arrays
from .inject import convert, layers_to_train
from .lora import NamedArrays, base_of_adapter
from .qat import rounded
from .rank_scale import native

ADAPTERS = (LoRALinear, DoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRAEmbedding)
"""mlx-lm's kinds of adapters, and so ours."""

MADE_AS: Slot[AdapterOptions | None] = Slot("made as", None)
"""The options with which `prepare` made a model trainable."""

CHANGED: Slot[bool] = Slot("changed", False, stays=True)
"""Whether full training changed the weights of a model."""


def prepare(model: nn.Module, options: AdapterOptions) -> nn.Module:
    """Freezes the model and makes trainable what `options` name: adapters, or its own weights.

    Raises:
        InputError: more layers than the model has, modules that do not exist, full training of quantized weights, or adapters
            that are there already.
    """
    layers = layers_to_train(model, options)
    if any(isinstance(module, ADAPTERS) for module in model.modules()):
        raise InputError("the model has adapters already; mlxlora.detach(model) takes them off")
    freeze(model)
    if options.train_type == "full":
        _check_full(options)
        _unfreeze(model, layers, everything=options.num_layers == -1)
    else:
        convert(model, layers, options)
        model.update(tree_map(lambda p: p.astype(getattr(mx, options.adapter_dtype)), model.trainable_parameters()))
    if not tree_flatten(model.trainable_parameters()):
        raise InputError(f"--train-type {options.train_type} leaves nothing to train in this model; try --num-layers -1")
    if options.qat:
        round_weights(model, rounded(model, options.qat))
    MADE_AS.put(model, options)
    if options.train_type == "full":
        CHANGED.put(model, True)
    return model


def _check_full(options: AdapterOptions) -> None:
    """Refuses options of adapters for full training."""
    plain = AdapterOptions()
    for name in ("rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "adapter_dtype"):
        if getattr(options, name) != getattr(plain, name):
            raise InputError(f"--{name.replace('_', '-')} is for adapters; use --train-type lora")


def _unfreeze(model: nn.Module, layers: int, *, everything: bool) -> None:
    if any(hasattr(m, "bits") and "scales" in m for m in model.modules()):
        raise InputError("--train-type full cannot train quantized weights; use lora, or a model that is not quantized")
    model.unfreeze() if everything else [layer.unfreeze() for layer in model.layers[-layers:]]  # type: ignore[union-attr]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Removes the adapters while the context lasts: the model computes as before training, bit for bit, without QAT's rounding.

    Enter `evaluating` within. (A scale of 0 would be exact for LoRA but wrong for DoRA.) A function compiled within keeps the
    base, so compile the scorer of a reference apart from that of the policy.
    """
    found = [(name, m, base_of_adapter(m)) for name, m in model.named_modules() if isinstance(m, ADAPTERS)]
    try:
        model.update_modules(tree_unflatten([(name, base) for name, _, base in found]))
        with exact(model):
            yield model
    finally:
        model.update_modules(tree_unflatten([(name, m) for name, m, _ in found]))


def attach(model: nn.Module, directory: str | Path) -> nn.Module:
    """Puts the adapters, or trained weights, of an adapter folder on the model, for inference.

    Raises:
        InputError: there are none, they are damaged or not finite, or they do not fit; the message has the first problems.
    """
    config = read_adapter_config(directory)  # names the remedy for adapters of peft
    try:
        if (Path(directory) / WEIGHTS).is_file():
            check_settings(config, Path(directory) / CONFIG)
            sound_arrays(directory, config)  # mlx-lm does not detect damage
        load_adapters(model, str(directory))
    except InputError:
        raise
    except Exception as error:  # mlx-lm raises many kinds for files of unknown origin
        head, *lines = [line.strip() for line in str(error).splitlines()] or [type(error).__name__]
        details = listed(sorted(lines), shown=3, separator="; ")
        raise InputError(f"--adapter-path {directory}: {head} {details}".rstrip()) from None
    return model.eval()


@contextmanager
def attached(model: nn.Module, directory: str | Path) -> Iterator[nn.Module]:
    """Puts the adapters of a folder on the model while the context lasts, then restores its modules and weights.

    Raises:
        InputError: there are no adapters, or they do not fit.
    """
    modules, weights = dict(model.named_modules()), tree_flatten(model.parameters())
    try:
        yield attach(model, directory)
    finally:
        replaced = [(name, modules[name]) for name, m in model.named_modules() if modules.get(name, m) is not m]
        model.update_modules(tree_unflatten(replaced))
        model.update(tree_unflatten(weights))


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Loads the trainable weights that an earlier run saved, from an adapter folder or a file.

    Raises:
        InputError: the file is missing or damaged, has NaN or infinity, or does not fit; the message has the first mismatches.
    """
    folder = Path(file) if Path(file).is_dir() else Path(file).parent
    config = read_adapter_config(folder) if (folder / CONFIG).is_file() else None

    def told(arrays: NamedArrays, wanted: NamedArrays) -> str:
        problems = mismatches(arrays, wanted)
        return problems and f"{file} does not fit the model as configured: {problems}"

    put_weights(model, sound_arrays(file, config), _scale_of(folder, config or {}), told)


def put_weights(
    model: nn.Module, arrays: NamedArrays, scale: float | None, told: Callable[[NamedArrays, NamedArrays], str]
) -> None:
    """Gives the trainable parameters of a model other values.

    Args:
        model: with adapters, or other trainable parameters.
        arrays: the values, in the form of a file.
        scale: of adapters; None: that of the model's.
        told: (values, parameters) -> the message if they do not fit, else empty.

    Raises:
        InputError: they do not fit.
    """
    arrays, wanted = native(model, arrays, scale), dict(tree_flatten(model.trainable_parameters()))
    if problem := told(arrays, wanted):  # type: ignore[arg-type]
        raise InputError(problem)
    model.load_weights([(name, array.astype(wanted[name].dtype)) for name, array in arrays.items()], strict=False)


def _scale_of(folder: Path, config: Mapping[str, Any]) -> float | None:
    """The scale of the adapters in a folder, if its configuration says."""
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if scale is not None and not is_number(scale):
        raise InputError(f"{folder / CONFIG}: scale must be a number, got {quoted(scale)}")
    return scale


def load(options: str | ModelOptions, adapter_path: str | None = None) -> tuple[nn.Module, Any]:
    """Loads the model and tokenizer of a folder or hub name through mlx-lm, with adapters if `adapter_path` names any.

    Raises:
        InputError: there is no such model, it is damaged, or the adapters do not fit.
    """
    model, tokenizer, _ = load_with_config(model_options(options))
    return attach(model, adapter_path) if adapter_path else model, tokenizer


def base_of(options: BaseOptions, adapter_path: str | Path) -> ModelOptions:
    """The model that `options` name or, if none, the base of the adapters, quantized as it was for their training.

    Its chat template is that of the training, unless `options` name one.

    Raises:
        InputError: there are no adapters, or they do not name their base.
    """
    named = ModelOptions(
        model=options.model,
        trust_remote_code=options.trust_remote_code,
        eos_token=options.eos_token,
        quantize=getattr(options, "quantize", None),
        chat_template=options.chat_template,
        chat_template_args=options.chat_template_args,
    )
    if named.model and not (Path(adapter_path) / CONFIG).is_file():
        return named
    config = read_adapter_config(adapter_path)
    of_run = template_of_run(config, Path(adapter_path))
    named = evolve(named, **{name: getattr(named, name) or value for name, value in of_run.items()})
    if named.model:
        return named
    if not config.get("model"):
        raise InputError(f"{adapter_path} does not name the model it was trained on; add --model NAME")
    check_settings(config, Path(adapter_path) / CONFIG)
    given = config.get("eos_token")  # of training, so that the model stops where it was trained to
    return evolve(
        named,
        model=config["model"],
        quantize=named.quantize or config.get("quantize"),
        eos_token=named.eos_token or (tuple(map(str, given)) if isinstance(given, list) else None),
    )
