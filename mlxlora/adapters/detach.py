"""The way back from a trained model to the model as mlx-lm loaded it, and on to further training."""

from typing import Any

import mlx.nn as nn
from attrs import evolve, frozen
from mlx.utils import tree_unflatten

from ..config.options import AdapterOptions
from ..errors import InputError, described
from ..models.loading import ORIGIN, load_with_config
from ..models.modes import freeze
from ..utils.patches import restore
from .files import mismatches
from .lora import NamedArrays, base_of_adapter, unusual
from .prepare import ADAPTERS, CHANGED, MADE_AS, put_weights
from .rank_scale import uniform


def detach(model: nn.Module) -> nn.Module:
    """Gives a model back as mlx-lm loaded it, in place: without adapters, and without whatever training changed on it.

    Weights that full training changed are read again from where the model was loaded.

    Raises:
        InputError: no model; such weights, of one that `mlxlora.load` did not load; or adapters of the model's own kind.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"detach takes a model, such as the first of what load returns, got {described(model)}")
    if own := unusual(model):
        raise InputError(f"detach: {own[0]} is an adapter of the model's own kind; load the model again")
    origin = ORIGIN.get(model)
    if CHANGED.get(model) and origin is None:
        raise InputError("detach: training changed the weights of this model; load it again")
    _strip(model)
    if CHANGED.get(model) and origin is not None:
        model.update(load_with_config(origin)[0].parameters())
        CHANGED.put(model, False)
    return model.eval()


@frozen(eq=False)
class Earlier:
    """What an earlier run trained in a model.

    Attributes:
        arrays: of its adapters, as a file has them.
        scale: of these adapters.
    """

    arrays: NamedArrays
    scale: float | None


def is_trained(model: nn.Module) -> bool:
    """Whether an earlier run left adapters or other weights in a model."""
    return CHANGED.get(model) or bool(_adapters(model))


def continued(model: nn.Module, options: AdapterOptions) -> AdapterOptions:
    """The options of the adapters of an earlier run, if a run that continues them gives none."""
    before = MADE_AS.get(model)
    if before is None or options != AdapterOptions() or options.adapter != "continue":
        return options
    return evolve(before, resume_adapter_file=None, adapter="continue")


def taken_off(model: nn.Module, options: AdapterOptions) -> Earlier | None:
    """Takes adapters off a model that an earlier run trained; returns them if `options` continue them.

    Raises:
        InputError: they cannot be continued, or not be taken off.
    """
    trained = is_trained(model)
    if not trained or options.adapter == "fresh" or options.resume_adapter_file:
        detach(model) if trained else None
        return None
    if not _adapters(model):
        restore(model)  # the weights are what continues
        model.unfreeze()
        return None
    if options.train_type == "full":
        raise InputError("--train-type full: the model has adapters, which are no weights of it; fuse them, or adapter='fresh'")
    freeze(model)
    for _, module in _adapters(model):
        module.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False)
    arrays, size = uniform(model)
    _strip(model)
    return Earlier(arrays, size and size.scale)


def continue_from(model: nn.Module, earlier: Earlier) -> None:
    """Gives the new adapters of a model the values of earlier ones.

    Raises:
        InputError: they have other sizes or are on other modules.
    """

    def told(arrays: NamedArrays, wanted: NamedArrays) -> str:
        problems = mismatches(arrays, wanted)
        remedy = "give the options of the run that made them, or adapter='fresh' to start from the base"
        return problems and f"the model's adapters do not fit these options: {problems}; {remedy}"

    put_weights(model, earlier.arrays, earlier.scale, told)


def _strip(model: nn.Module) -> None:
    """Takes adapters and patches off a model."""
    restore(model)
    model.update_modules(tree_unflatten([(path, base_of_adapter(module)) for path, module in _adapters(model)]))
    model.unfreeze()


def _adapters(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, ADAPTERS)]
