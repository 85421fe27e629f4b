"""Optimizers and learning-rate schedules by name."""

import re
from collections.abc import Callable, Iterable
from copy import copy
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from ..config.options import Training
from ..errors import InputError

Rate = float | Callable[[mx.array], mx.array]

_OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda rate, weight_decay, **more: optim.Adam(rate, bias_correction=True, **more),
    "adamw": lambda rate, **more: optim.AdamW(rate, bias_correction=True, **more),
    "sgd": optim.SGD,
    "adafactor": lambda rate, **more: optim.Adafactor(rate, relative_step=False, scale_parameter=False, **more),
    "lion": optim.Lion,
    "muon": optim.Muon,
}
_HYPERPARAMETERS = {
    "betas": ("adam", "adamw", "lion"),
    "eps": ("adam", "adamw"),
    "momentum": ("sgd", "muon"),
}
"""The optimizers that have each hyperparameter; MLX's defaults apply if it is not given."""
TRAINED_GROUP, LORAPLUS_GROUP, UNDECAYED_GROUP = "trained", "lora_b", "norm"
"""Parameters with an optimizer of their own: names of the vectors of `trainable`, which `group_of` puts into the same groups."""


def make_optimizer(training: Training, steps: int, paths: Iterable[str] = ()) -> optim.Optimizer:
    """The optimizer that `training` names, on its learning-rate schedule over `steps`.

    Adam and AdamW are the published ones (Kingma & Ba, 2015; Loshchilov & Hutter, 2019), with bias correction. LoRA+ (Hayou et
    al., 2024, https://arxiv.org/abs/2402.12354) is two optimizers: the second one trains the `in_loraplus_group` parameters at a
    multiple of the rate. Biases and weights of norms have an optimizer without weight decay, as in Hugging Face's Trainer, unless
    `training.decay_norms`.

    Args:
        training: the options.
        steps: optimizer steps of the run.
        paths: the trainable parameters.

    Raises:
        InputError: weight decay for adam, which has none, or a hyperparameter of other optimizers.
    """
    if not isinstance(training.optimizer, str):
        return _own_optimizer(training)
    if training.optimizer == "adam" and training.weight_decay:
        raise InputError(f"--weight-decay {training.weight_decay} has no effect on adam; use --optimizer adamw")
    given = {name: getattr(training, name) for name in _HYPERPARAMETERS if getattr(training, name) is not None}
    for name in given:
        if training.optimizer not in _HYPERPARAMETERS[name]:
            raise InputError(f"--{name} has no effect on {training.optimizer}; it belongs to {', '.join(_HYPERPARAMETERS[name])}")
    make = partial(_OPTIMIZERS[training.optimizer], weight_decay=training.weight_decay, **given)
    rate, ratio = learning_rate(training, steps), training.loraplus_lr_ratio
    groups = {TRAINED_GROUP: make(rate)}
    if ratio is not None:
        groups[LORAPLUS_GROUP] = make(_times(rate, ratio))
    if training.weight_decay and not training.decay_norms and any(group_of(path) == UNDECAYED_GROUP for path in paths):
        groups[UNDECAYED_GROUP] = make(rate, weight_decay=0.0)
    if len(groups) == 1:
        return groups[TRAINED_GROUP]

    def belongs(group: str, path: str, _: mx.array) -> bool:
        found = group_of(path)
        return group == (found if found in groups else TRAINED_GROUP)

    return optim.MultiOptimizer(list(groups.values()), [partial(belongs, group) for group in [*groups][:-1]])


_OF_NAMED = ("learning_rate", "lr_schedule", "warmup", "weight_decay", "loraplus_lr_ratio", "betas", "eps", "momentum")
"""Options of optimizers that are named."""


def _own_optimizer(training: Training) -> optim.Optimizer:
    """A copy of the user's optimizer as it is before its first step, so that a run depends on no other.

    Raises:
        InputError: it is none of `mlx.optimizers`, it has several, or an option says what the object says.
    """
    optimizer, defaults = training.optimizer, Training()
    if not isinstance(optimizer, optim.Optimizer) or isinstance(optimizer, optim.MultiOptimizer):
        raise InputError(f"optimizer must be a name or one object of mlx.optimizers, got {type(optimizer).__name__}")
    for name in _OF_NAMED:
        if getattr(training, name) != getattr(defaults, name):
            raise InputError(f"{name} has no effect on an optimizer object; give it to {type(optimizer).__name__}(...)")
    if "learning_rate" not in optimizer.state:
        raise InputError(f"optimizer: give {type(optimizer).__name__} a learning_rate")
    own = copy(optimizer)
    own.state = {"step": mx.array(0, mx.uint64), "learning_rate": optimizer.learning_rate}
    for name, schedule in own._schedulers.items():
        own.state[name] = schedule(own.step)
    return own


def group_of(path: str) -> str:
    """The group of a parameter, or of the vector of a group.

    >>> [group_of(path) for path in ("q_proj.weight", "q_proj.lora_b", "q_proj.bias", "input_layernorm.weight", "ln_f.weight")]
    ['trained', 'lora_b', 'norm', 'norm', 'norm']
    """
    if in_loraplus_group(path):
        return LORAPLUS_GROUP
    return UNDECAYED_GROUP if _UNDECAYED.search(path) else TRAINED_GROUP


_UNDECAYED = re.compile(r"bias|norm|(^|\.)ln(_|\d|\.)", re.IGNORECASE)


def in_loraplus_group(path: str) -> bool:
    """Whether LoRA+ multiplies the learning rate of a parameter: B and DoRA's magnitudes, as in PEFT.

    >>> in_loraplus_group("layers.0.q_proj.lora_b"), in_loraplus_group("layers.0.q_proj.lora_a")
    (True, False)
    """
    return path.rpartition(".")[2] in (LORAPLUS_GROUP, "m")


def _times(rate: Rate, ratio: float) -> Rate:
    return (lambda step: ratio * rate(step)) if callable(rate) else ratio * rate


def learning_rate(training: Training, steps: int) -> Rate:
    """The rate of step t = 0, 1, ...: up from `warmup_init` over `warmup` steps, then constant or down to `lr_end`.

    end + (peak - end)·f(x), x = (t - warmup)/span; linear: f = 1 - x; cosine: f = (1 + cos πx)/2, both constant from x = 1 on;
    exponential: f = r^x; step: f = r^⌊x⌋, r = `lr_decay_rate`. span is `lr_decay_steps`, by default `steps` - `warmup`.
    A function of t, such as those of `mlx.optimizers`, is the rate itself.

    Raises:
        InputError: such a function, and a schedule or a warm-up besides.
    """
    peak, start, end, warmup = training.learning_rate, training.warmup_init, training.lr_end, training.warmup
    span = training.lr_decay_steps or max(steps - warmup, 1)
    if callable(peak):
        if training.lr_schedule != "constant" or warmup:
            raise InputError("learning_rate is a schedule of its own; leave out lr_schedule and warmup")
        return peak
    shape = _SHAPES[training.lr_schedule]
    if training.lr_schedule == "constant" and not warmup:
        return peak

    def rate(step: mx.array) -> mx.array:
        t = step.astype(mx.float32)
        falling = end + (peak - end) * shape(mx.maximum((t - warmup) / span, 0.0), training.lr_decay_rate)
        return mx.where(t < warmup, start + (peak - start) * (t / max(warmup, 1)), falling)

    return rate


def put_state(state: Any, values: Any) -> None:
    """Puts the arrays of `values` into the containers of `state`; a compiled step holds these, so they stay the same objects."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, mx.array):
            state[key] = value
        else:
            put_state(state[key], value)


_SHAPES: dict[str, Callable[[mx.array, float], mx.array]] = {
    "constant": lambda done, _: mx.ones_like(done),
    "linear": lambda done, _: 1 - mx.minimum(done, 1.0),
    "cosine": lambda done, _: 0.5 * (1 + mx.cos(mx.pi * mx.minimum(done, 1.0))),
    "exponential": lambda done, left: left**done,
    "step": lambda done, left: left ** mx.floor(done),
}
