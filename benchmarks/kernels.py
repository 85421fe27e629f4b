"""Where a step's time goes: every kernel of one block and of the head, alone, at Qwen3-0.6B's shape.

`python -m benchmarks.kernels --device gpu`. A kernel runs 20 times in a row; the time is the median of 5 such rows. Next to
it: how often a training step of LoRA rank 8 on all 28 blocks runs it, the product, and the time that its arithmetic would need at
the speed of the fastest matmul in the table.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from attrs import frozen

from benchmarks.common import flags, parsed, tell

RANK = 8


class Shape(NamedTuple):
    """Widths, heads and blocks of a model; Qwen3-0.6B's."""

    hidden: int = 1024
    inner: int = 3072
    heads: int = 16
    kv_heads: int = 8
    head: int = 128
    layers: int = 28
    vocabulary: int = 151936


QUICK = Shape(64, 96, 4, 2, 16, 2, 512)


@frozen
class Kernel:
    """What runs, how often in a step, and its floating-point operations and bytes."""

    name: str
    run: Callable[..., Any]
    args: tuple[mx.array, ...]
    times: int
    flops: float = 0.0


def noise(*shape: int) -> mx.array:
    return (0.02 * mx.random.normal(shape)).astype(mx.bfloat16)


def linear(name: str, n: int, inner: int, outer: int, times: int) -> list[Kernel]:
    x, w, g, a, b, t = noise(n, inner), noise(outer, inner), noise(n, outer), noise(inner, RANK), noise(RANK, outer), noise(n, RANK)
    big, small = 2.0 * n * inner * outer, 2.0 * n * RANK
    return [
        Kernel(f"{name}: x W", lambda x, w: x @ w.T, (x, w), times, big),
        Kernel(f"{name}: g W (dx)", lambda g, w: g @ w, (g, w), times, big),
        Kernel(f"{name}: x A", lambda x, a: x @ a, (x, a), 2 * times, small * inner),
        Kernel(f"{name}: y + z B", lambda y, z, b: mx.addmm(y, z, b), (g, t, b), times, small * outer),
        Kernel(f"{name}: g B' (dz)", lambda g, b: g @ b.T, (g, b), times, small * outer),
        Kernel(f"{name}: dx + dz A'", lambda y, z, a: mx.addmm(y, z, a.T), (x, t, a), times, small * inner),
        Kernel(f"{name}: x' dz (dA)", lambda x, t: x.T @ t, (x, t), times, small * inner),
        Kernel(f"{name}: z' g (dB)", lambda t, g: t.T @ g, (t, g), times, small * outer),
    ]


def vjp(run: Callable[..., mx.array], argument: int = 0) -> Callable[..., Any]:
    """Forward and backward; MLX cannot run the backward pass alone."""
    return lambda g, *args: mx.vjp(lambda x: run(*args[:argument], x, *args[argument + 1 :]), [args[argument]], [g])[1]


@mx.compile
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


@mx.compile
def swiglu_back(g: mx.array, gate: mx.array, up: mx.array) -> Any:
    return mx.vjp(lambda a, b: nn.silu(a) * b, [gate, up], [g])[1]


def block(shape: Shape, rows: int, length: int) -> list[Kernel]:
    (D, M, H, KV, HEAD, LAYERS, _), n = shape, rows * length
    x, w, wide, heads, w_head = noise(n, D), noise(D), noise(n, M), noise(rows, H, length, HEAD), noise(HEAD)
    kv = noise(rows, KV, length, HEAD)

    def norm(x: mx.array, w: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, w, 1e-6)

    def rope(x: mx.array) -> mx.array:
        return mx.fast.rope(x, HEAD, traditional=False, base=1e6, scale=1.0, offset=0)

    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=HEAD**-0.5, mask="causal")

    def attend_back(g: mx.array, q: mx.array, k: mx.array, v: mx.array) -> Any:
        return mx.vjp(attend, [q, k, v], [g])

    pairs = 2.0 * rows * H * length * length * HEAD  # causal: half of the square, two products
    return [
        *linear("q", n, D, H * HEAD, LAYERS),
        *linear("k or v", n, D, KV * HEAD, 2 * LAYERS),
        *linear("o", n, H * HEAD, D, LAYERS),
        *linear("gate or up", n, D, M, 2 * LAYERS),
        *linear("down", n, M, D, LAYERS),
        Kernel("norm", norm, (x, w), 2 * LAYERS),
        Kernel("norm, forward and backward", vjp(norm), (x, x, w), 2 * LAYERS),
        Kernel("norm of q, forward and backward", vjp(norm), (heads, heads, w_head), LAYERS),
        Kernel("rope of q", rope, (heads,), 2 * LAYERS),
        Kernel("attention", attend, (heads, kv, kv), LAYERS, pairs),
        Kernel("attention, forward and backward", attend_back, (heads, heads, kv, kv), LAYERS, 3.5 * pairs),
        Kernel("swiglu", swiglu, (wide, wide), LAYERS),
        Kernel("swiglu backward", swiglu_back, (wide, wide, wide), LAYERS),
        Kernel("residual", lambda a, b: a + b, (x, x), 4 * LAYERS),
        Kernel("heads to rows", lambda q: mx.contiguous(q.transpose(0, 2, 1, 3)), (heads,), 4 * LAYERS),
    ]


def head(shape: Shape, n: int, chunk: int) -> list[Kernel]:
    from mlxlora.models.distribution import dlogps

    D, V = shape.hidden, shape.vocabulary
    h, w, logits, y = noise(chunk, D), noise(V, D), noise(chunk, V), mx.random.randint(0, V, (chunk,))
    one, times = mx.ones((chunk,)), n // chunk
    return [
        Kernel("head: h W", lambda h, w: h @ w.T, (h, w), times, 2.0 * chunk * D * V),
        Kernel("head: log-probabilities", mx.fast.cross_entropy, (logits, y), times),
        Kernel("head: gradient of logits", dlogps, (logits, y, one, one), times),
        Kernel("head: gradient times W", lambda g, w: g @ w, (logits, w), times, 2.0 * chunk * D * V),
    ]


def seconds(kernel: Kernel, rows: int, repeat: int = 20) -> float:
    """Of one run, the median of so many rows of `repeat`."""
    times = []
    for _ in range(rows + 1):
        start = time.perf_counter()
        mx.eval([kernel.run(*kernel.args) for _ in range(repeat)])
        times.append((time.perf_counter() - start) / repeat)
    return median(times[1:])


def table(shape: Shape, repetitions: int, rows: int, length: int, chunk: int) -> list[dict[str, Any]]:
    kernels = block(shape, rows, length) + head(shape, rows * length, chunk)
    mx.eval([k.args for k in kernels])
    found = [(k, seconds(k, repetitions)) for k in kernels]
    best = max(k.flops / s for k, s in found)
    return [
        {
            "case": f"{rows} x {length}",
            "kernel": k.name,
            "us": round(1e6 * s, 1),
            "times": k.times,
            "ms": round(1e3 * s * k.times, 2),
            "tflops": round(k.flops / s / 1e12, 1) if k.flops else "",
            "best_ms": round(1e3 * k.times * k.flops / best, 2) if k.flops else "",
        }
        for k, s in found
    ]


def launches(repetitions: int, length: int = 1000) -> list[dict[str, Any]]:
    """Microseconds of one operation in a chain of `length` on 256 x 256 numbers, its construction left out."""
    x, w = noise(256, 256), noise(256, 256)
    mx.eval(x, w)
    steps: dict[str, tuple[Callable[[mx.array], mx.array], int]] = {
        "matrix product": (lambda y: y @ w, 1),
        "addmm": (lambda y: mx.addmm(x, y, w), 1),
        "RMS norm": (lambda y: mx.fast.rms_norm(y, None, 1e-6), 1),
        "cast": (lambda y: y.astype(mx.float32).astype(mx.bfloat16), 2),
        "addition": (lambda y: y + w, 1),
        "addition of a transposed matrix": (lambda y: y.T + w, 1),
        "two views": (lambda y: y.reshape(-1).reshape(256, 256), 1),
    }
    found = []
    for name, (step, operations) in steps.items():
        times = []
        for _ in range(repetitions + 1):
            y = x
            for _ in range(length):
                y = step(y)
            start = time.perf_counter()
            mx.eval(y)
            times.append((time.perf_counter() - start) / length / operations)
        found.append({"case": "host", "kernel": name, "us": round(1e6 * median(times[1:]), 1)})
    return found


COLUMNS = {
    "case": "case",
    "kernel": "kernel",
    "us": "µs",
    "times": "times a step",
    "ms": "ms a step",
    "tflops": "TFLOP/s",
    "best_ms": "ms at the best matmul's speed",
}


def main() -> None:
    parser = flags(__doc__, repetitions=5)
    parser.add_argument("--host", action="store_true", help="only the host's time for each operation")
    options = parsed(parser)
    if options.host:
        tell(launches(options.repetitions, 20 if options.quick else 1000), dict(list(COLUMNS.items())[:3]), options)
        return
    sizes = ((1, 64, 32),) if options.quick else ((4, 1024, 2048), (8, 2048, 2048))
    how = (QUICK, 1) if options.quick else (Shape(), options.repetitions)
    tell([row for size in sizes for row in table(*how, *size)], COLUMNS, options)


if __name__ == "__main__":
    main()
