"""Whether two ways to compute the same logits agree."""

import mlx.core as mx


def close_logits(a: mx.array, b: mx.array, full: float, half: float) -> bool:
    """Whether shapes agree and |a - b| <= tolerance · max |b|, without the infinities of b.

    Args:
        a: logits.
        b: the logits to compare with.
        full: tolerance if b is float32.
        half: tolerance if b is float16 or bfloat16.
    """
    if a.shape != b.shape:
        return False
    tolerance = full if b.dtype == mx.float32 else half
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    scale = float(mx.abs(mx.where(mx.isinf(b), 0, b)).max().item())  # type: ignore[arg-type]
    return bool(mx.allclose(a, b, rtol=0, atol=tolerance * scale).item())
