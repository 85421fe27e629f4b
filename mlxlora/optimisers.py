"""Optimisers and learning-rate schedules by name."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from .config import Training
from .errors import InputError

Rate = float | Callable[[mx.array], mx.array]

_OPTIMISERS: dict[str, Callable[[Rate, float], optim.Optimizer]] = {
    "adam": lambda rate, _: optim.Adam(rate, bias_correction=True),  # type: ignore[arg-type]
    "adamw": lambda rate, decay: optim.AdamW(rate, weight_decay=decay, bias_correction=True),  # type: ignore[arg-type]
    "sgd": lambda rate, decay: optim.SGD(rate, weight_decay=decay),  # type: ignore[arg-type]
    "adafactor": lambda rate, decay: optim.Adafactor(rate, weight_decay=decay, relative_step=False, scale_parameter=False),  # type: ignore[arg-type]
    "lion": lambda rate, decay: optim.Lion(rate, weight_decay=decay),  # type: ignore[arg-type]
    "muon": lambda rate, decay: optim.Muon(rate, weight_decay=decay),  # type: ignore[arg-type]
}


def make_optimiser(training: Training, steps: int) -> optim.Optimizer:
    """The optimiser that `training` names, on its schedule over `steps`.

    Adam and AdamW are the published ones (Kingma & Ba, 2015; Loshchilov & Hutter, 2019), with bias correction.

    Raises:
        InputError: weight decay for adam, which has none.
    """
    if training.optimizer == "adam" and training.weight_decay:
        raise InputError(f"--weight-decay {training.weight_decay} has no effect on adam; use --optimizer adamw")
    return _OPTIMISERS[training.optimizer](learning_rate(training, steps), training.weight_decay)


def learning_rate(training: Training, steps: int) -> Rate:
    """The rate of step t = 0, 1, ...: up from 0 over `warmup` steps, then constant or down to 0 at `steps`.

    linear: (steps - t)/(steps - warmup); cosine: (1 + cos(π(t - warmup)/(steps - warmup)))/2, times the peak.
    """
    peak, warmup, span = training.learning_rate, training.warmup, max(steps - training.warmup, 1)
    shape = _SHAPES[training.lr_schedule]
    if training.lr_schedule == "constant" and not warmup:
        return peak

    def rate(step: mx.array) -> mx.array:
        t = step.astype(mx.float32)
        falling = shape(mx.clip((t - warmup) / span, 0.0, 1.0))
        return peak * mx.where(t < warmup, t / max(warmup, 1), falling)

    return rate


def put_state(state: Any, values: Any) -> None:
    """Copies the arrays of `values` into the containers of `state`, which stay the same objects: a compiled step holds them."""
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        if isinstance(value, mx.array):
            state[key] = value
        else:
            put_state(state[key], value)


_SHAPES: dict[str, Callable[[mx.array], mx.array]] = {
    "constant": mx.ones_like,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + mx.cos(mx.pi * done)),
}
