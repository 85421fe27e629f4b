"""mlx-lm's LoRA layer with fewer and smaller operations: the same parameters, files and results."""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear


class LeanLoRALinear(LoRALinear):
    """y = base(x) + scale·(x A) B, where the last product adds to the base's output in place of two more kernels.

    The backward pass adds to the base's gradient in the same way. Dropout, and adapters of another dtype than x (a
    bfloat16 model in evaluation), go mlx-lm's way.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] to [..., out]."""
        if not self.lora_a.dtype == self.lora_b.dtype == x.dtype or (self.training and self.dropout._p_1 < 1):
            return super().__call__(x)
        rows = x.reshape(-1, x.shape[-1])
        return _adapted(self.linear, rows, self.scale * self.lora_a, self.lora_b).reshape(*x.shape[:-1], -1)


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
    """Makes every LoRALinear of the model one."""
    for module in model.modules():
        if type(module) is LoRALinear:
            module.__class__ = LeanLoRALinear
    return model
