"""mlx-lm's LoRA layer with fewer and smaller operations but the same parameters, files and results; helpers for all adapters."""

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from ..utils.patches import set_class

NamedArrays = dict[str, mx.array]
"""Arrays by name: those of a file, or the factors `lora_a` and `lora_b` of one update."""


class LeanLoRALinear(LoRALinear):
    """y = base(x) + scale·(x A) B, where one fused operation multiplies by B and adds the base's output.

    The backward pass adds to the base's gradient in the same way. With dropout, or if x has another dtype than the adapters
    (a bfloat16 model in evaluation), it computes as mlx-lm does.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] to [..., out]."""
        if not self.lora_a.dtype == self.lora_b.dtype == x.dtype or (self.training and self.dropout._p_1 < 1):
            return super().__call__(x)
        return with_update(self.linear, x, self.scale * self.lora_a, self.lora_b)


def with_update(base: nn.Module, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """base(x) + (x A) B: [..., in] to [..., out]; all arrays have one dtype."""
    return _adapted(base, x.reshape(-1, x.shape[-1]), a, b).reshape(*x.shape[:-1], -1)


def _adapted(base: nn.Module, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """[n, in], [in, r], [r, out] to [n, out]."""

    @mx.custom_function
    def forward(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        return mx.addmm(base(x), x @ a, b)

    @forward.vjp
    def backward(primals: list[mx.array], g: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        x, a, b = primals
        through = g @ b.T
        (dx,) = mx.vjp(base, [x], [g])[1]
        return mx.addmm(dx, through, a.T), x.T @ through, (x @ a).T @ g

    return forward(x, a, b)  # type: ignore[return-value]


def lean(model: nn.Module) -> nn.Module:
    """Turns every LoRALinear of the model into a LeanLoRALinear, in place."""
    for module in model.modules():
        if type(module) is LoRALinear:
            set_class(module, LeanLoRALinear)
    return model


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """The adapters of a model by path: modules with a low-rank update."""
    return {path: m for path, m in model.named_modules() if "lora_a" in m and isinstance(m.lora_a, mx.array)}


def unusual(model: nn.Module) -> list[str]:
    """Paths of adapters that a model defines itself in another form than mlx-lm's, such as afm7's of fused projections."""
    return [path for path, m in model.named_modules() if "lora_a" in m and not isinstance(m.lora_a, mx.array)]


def base_of_adapter(adapter: Any) -> nn.Module:
    """The module that an adapter adapts."""
    return adapter.linear if "linear" in adapter else adapter.embedding


def factors(module: Any) -> dict[str, mx.array]:
    """A and B of a module's update, in mlx-lm's form."""
    return module.as_lora() if hasattr(module, "as_lora") else {"lora_a": module.lora_a, "lora_b": module.lora_b}


def rank_of(arrays: Mapping[str, mx.array]) -> int:
    """The rank r of an update, from its A: [in, r], or [experts, r, in]."""
    return arrays["lora_a"].shape[1]


def rank_axes(both: Mapping[str, mx.array]) -> dict[str, int]:
    """The rank axes of A [in, r] and B [r, out]; of experts, of A [e, r, in] and B [e, out, r]."""
    return {"lora_a": 1, "lora_b": 0 if both["lora_b"].ndim == 2 else 2}


def concatenated(updates: Sequence[Mapping[str, mx.array]]) -> dict[str, mx.array]:
    """The sum of updates A B of one shape as one update: [A₁ A₂ …] [B₁; B₂; …]."""
    return {name: mx.concatenate([both[name] for both in updates], axis) for name, axis in rank_axes(updates[0]).items()}


def update_of(module: Any) -> mx.array:
    """ΔW of an adapter other than DoRA, in the shape of the weights: [out, in], [experts, out, in] or [vocabulary, D]."""
    a, b = factors(module).values()
    if b.ndim == 3:
        return module.scale * (b @ a)
    return module.scale * (a @ b if "embedding" in module else (a @ b).T)
