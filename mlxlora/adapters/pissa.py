"""PiSSA: adapters that start from the principal components of the weights (Meng et al., 2024, https://arxiv.org/abs/2404.02948)."""

from typing import Any

import mlx.core as mx

from ..utils.patches import converted
from .lora import LeanLoRALinear, concatenated, with_update


class PiSSALinear(LeanLoRALinear):
    """y = W x + s·(A B - A₀ B₀)x, where s·A₀ B₀ are the first components of W and A, B start there.

    The paper trains on W_res = W - s·A₀ B₀. This layer does not change W, so the model before training stays available,
    quantized or not.
    """

    _start_a: mx.array
    _start_b: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] to [..., out]."""
        a, b = self.as_lora().values()
        if not a.dtype == b.dtype == x.dtype:
            return self.linear(x) + (self.scale * ((x @ a) @ b)).astype(x.dtype)
        return with_update(self.linear, x, self.scale * a, b)

    def as_lora(self) -> dict[str, mx.array]:
        """The same update on the unchanged weights, with twice the rank: [A A₀], [B; -B₀]."""
        start = {"lora_a": self._start_a.astype(self.lora_a.dtype), "lora_b": -self._start_b.astype(self.lora_b.dtype)}
        return concatenated([{"lora_a": self.lora_a, "lora_b": self.lora_b}, start])

    def own_arrays(self) -> dict[str, mx.array]:
        """What a checkpoint stores besides the trained arrays."""
        return {name: self[name] for name in ("_start_a", "_start_b")}


def pissa(module: Any, weight: mx.array, iterations: int | None) -> PiSSALinear:
    """Replaces a LoRALinear: starts from the first components of `weight` [out, in], A = √(S/s) of V, B = √(S/s) of U."""
    u, s, vt = components(weight.astype(mx.float32), module.lora_a.shape[1], iterations)
    root = mx.sqrt(s / module.scale)
    started = converted(module, PiSSALinear)
    started.lora_a, started.lora_b = vt.T * root, root[:, None] * u.T
    started._start_a, started._start_b = started.lora_a, started.lora_b
    return started


def components(weight: mx.array, rank: int, iterations: int | None = None) -> tuple[mx.array, mx.array, mx.array]:
    """U [out, r], S [r], Vᵀ [r, in] of the first singular values.

    Args:
        weight: [out, in] float32.
        rank: r.
        iterations: of the randomized method (Halko et al., 2011, https://arxiv.org/abs/0909.4061), which is faster; None: exact.
    """
    with mx.stream(mx.cpu):  # MLX has SVD and QR on the CPU only
        if iterations is None:
            u, s, vt = mx.linalg.svd(weight)
        else:
            basis = _subspace(weight, min(2 * rank, *weight.shape), iterations)
            u, s, vt = mx.linalg.svd(basis.T @ weight)
            u = basis @ u
        first = u[:, :rank], s[:rank], vt[:rank]
        mx.eval(first)
    return first


def _subspace(weight: mx.array, size: int, iterations: int) -> mx.array:
    """[out, size] with orthonormal columns that nearly span the first left singular vectors."""
    basis = mx.linalg.qr(weight @ mx.random.normal((weight.shape[1], size)))[0]
    for _ in range(iterations):
        basis = mx.linalg.qr(weight @ mx.linalg.qr(weight.T @ basis)[0])[0]
    return basis


def iterations_of(option: str) -> int | None:
    """The N of `pissa_niter_N`; None for `pissa`, which is exact.

    >>> iterations_of("pissa_niter_8"), iterations_of("pissa")
    (8, None)
    """
    return int(option.rpartition("_")[2]) if "niter" in option else None
