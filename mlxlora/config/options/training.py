"""Options of the optimization."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from attrs import validators as v

from ..fields import AutoOrCount, Betas, group, option
from ..given import UpdateRule


@group("Training")
class Training:
    """How the weights are updated, and with how much memory."""

    iters: int = option(600, "Optimizer steps.", v.ge(1))
    epochs: float | None = option(None, "Passes over the data, instead of --iters (--num-epochs is the same).", v.gt(0), v.le(1e6))
    batch_size: int = option(4, "Rows in a batch.", v.ge(1))
    grad_accumulation_steps: int = option(1, "Batches in an optimizer step; the result equals one large batch.", v.ge(1))
    learning_rate: float | Callable[..., Any] = option(1e-5, "Peak learning rate.", v.gt(0))
    optimizer: Literal["adam", "adamw", "sgd", "adafactor", "lion", "muon"] | UpdateRule = option(
        "adam", "Update rule; Adam and AdamW are the published ones, with bias correction."
    )
    weight_decay: float = option(0.0, "Weight decay, decoupled in adamw and lion; adam has none.", v.ge(0))
    decay_norms: bool = option(False, "Apply --weight-decay to biases and weights of norms too, which full training leaves out.")
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: the learning rate of B (and of DoRA's magnitudes) is this many times that of A.", v.gt(0)
    )
    betas: Sequence[float] | None = option(None, "Decay rates of the moments: adam, adamw (0.9, 0.999), lion (0.9, 0.99).", Betas())
    eps: float | None = option(None, "Number added to the denominator: adam, adamw (1e-8).", v.gt(0))
    momentum: float | None = option(None, "Momentum: sgd (0), muon (0.95).", v.ge(0), v.lt(1))
    lr_schedule: Literal["constant", "linear", "cosine", "exponential", "step"] = option(
        "constant", "How the learning rate falls after the warm-up."
    )
    lr_decay_steps: int | None = option(None, "Steps over which the learning rate falls; default: until the last step.", v.ge(1))
    lr_decay_rate: float = option(
        0.1, "exponential, step: factor applied to the learning rate every --lr-decay-steps.", v.gt(0), v.le(1)
    )
    lr_end: float = option(0.0, "Final learning rate of the schedule.", v.ge(0))
    warmup: int = option(0, "Steps over which the learning rate rises.", v.ge(0))
    warmup_init: float = option(0.0, "Learning rate at the start of the warm-up.", v.ge(0))
    max_grad_norm: float = option(1.0, "Clip the global norm of the gradient to this; 0 = off.", v.ge(0))
    grad_checkpoint: bool = option(False, "Recompute each block in the backward pass: less memory, more time.")
    fully_shard: bool = option(
        False, "Every process of mlx.launch keeps a slice of the parameters and of the optimizer state; needs --train-type full."
    )
    micro_batch: str = option(
        "auto",
        "Rows, pairs or groups of a batch to compute at once, a number or auto: as many as fit. The update is the same.",
        AutoOrCount(),
    )
    memory_limit: float | None = option(None, "Memory that MLX may use, GB; default: 80 % of the device's.", v.gt(0), v.le(1e6))
    attention: Literal["auto", "fused", "chunked"] = option(
        "auto",
        "Attention in training: MLX's function (fused), chunks of queries that are recomputed (chunked), or the faster of the "
        "two, measured once on this machine (auto).",
    )
    recurrence: Literal["auto", "loop", "chunked", "kernel"] = option(
        "auto",
        "Recurrent layers (Qwen3.5, Qwen3-Next, Kimi Linear, Jamba, ...) in training: mlx-lm's loop over tokens (loop), chunks "
        "of tokens (chunked), MLX's Metal kernel (kernel), or the kernel where it proves equal, else chunks (auto).",
    )
    seed: int = option(0, "Seed of data order, adapters, dropout and sampling.", v.ge(0))
