"""Speed and memory of attention in training: chunks of queries against MLX's fused function, forward and backward.

    python -m benchmarks.attention [--device gpu] [--quick] [--json FILE]

Both sides compute softmax(scale·Q·Kᵀ)·V of the same random arrays and the gradients of all three, compiled, in one
process, and take turns. "Ours" is `attention.blockwise`; the peer is `mx.fast.scaled_dot_product_attention` with
mask="causal", or with a mask array for windows and segments (packed rows), which it supports in no other way.
"chosen" is the way of a run on this device (--attention auto). Errors are the largest absolute differences of output and
gradients to the peer's in float32, on rows as long as the first 512 tokens; "peer's error" is that of the peer in the
benchmark's dtype, so 0 in float32. Good numbers are above 1 for speed and below 1 for memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
from attrs import frozen  # noqa: E402

from benchmarks.common import flags, interleaved, parsed, ratios, run  # noqa: E402
from mlxlora.models.attention import CHUNK, Scoring, blockwise, fused_backward, in_chunks, visible  # noqa: E402
from mlxlora.utils.device import backend  # noqa: E402

COLUMNS = {
    "case": "case",
    "chosen": "chosen",
    "ours": "ours, ms",
    "peer": "fused, ms",
    "speed_ratio": "speed",
    "cpu_ratio": "CPU time",
    "ours_mb": "ours, MB",
    "peer_mb": "fused, MB",
    "memory_ratio": "memory",
    "error": "our error",
    "peer_error": "peer's error",
}

Gradients = Callable[..., Any]


@frozen
class Case:
    """Rows of one layer.

    Attributes:
        length: T.
        window: of the layer.
        segments: sequences in a row.
        rows: R.
        chunk: queries at a time.
    """

    length: int
    rows: int
    window: int | None = None
    segments: int = 1
    chunk: int = 0
    heads: int = 8
    kv_heads: int = 4
    width: int = 64
    dtype: mx.Dtype = mx.float32

    @property
    def name(self) -> str:
        """The sizes."""
        window = f" window {self.window}" if self.window else ""
        packed = f" {self.segments} segments" if self.segments > 1 else ""
        return f"T={self.length}{window}{packed}, chunk {self.chunk}"


def cases(chunks: Sequence[int]) -> list[Case]:
    """T x window x segments, about as many tokens in each case."""
    on_cpu = backend() == "cpu"
    sizes: dict[str, Any] = {} if on_cpu else {"heads": 16, "kv_heads": 8, "width": 128, "dtype": mx.bfloat16}
    lengths, tokens = ((256, 512, 1024, 2048), 2048) if on_cpu else ((512, 1024, 2048, 4096, 8192), 8192)
    layouts = ((None, 1), (256, 1), (None, 4))
    return [
        Case(length, max(1, tokens // length), window, segments, chunk, **sizes)
        for length in lengths
        for window, segments in layouts
        for chunk in chunks
        if chunk < length and (window is None or window < length)
    ]


def quick_cases() -> list[Case]:
    """The same in seconds, to see that it runs: its numbers mean nothing."""
    return [Case(96, 1, window, segments, 32) for window, segments in ((None, 1), (24, 1), (None, 3), (24, 3))]


def arrays(case: Case) -> list[mx.array]:
    """Queries, keys, values and the output's gradient."""
    mx.random.seed(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    made = [mx.random.normal((case.rows, n, case.length, case.width)).astype(case.dtype) for n in heads]
    mx.eval(made)
    return made


def segments(case: Case) -> mx.array | None:
    """[R, T]: sequences of equal length."""
    if case.segments == 1:
        return None
    return mx.broadcast_to(mx.arange(case.length)[None] * case.segments // case.length, (case.rows, case.length)).astype(mx.int32)


def sides(case: Case) -> tuple[Gradients, Gradients]:
    """Chunks and the fused function: output and gradients."""
    scale, parts = case.width**-0.5, segments(case)
    alike = case.window is None and parts is None

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return blockwise(q, k, v, Scoring(scale, case.window, parts), chunk=case.chunk)

    def peer(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mask = "causal" if alike else visible(range(q.shape[2]), range(q.shape[2]), case.window, parts)
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    def with_gradients(attend: Gradients) -> Gradients:
        def run(q: mx.array, k: mx.array, v: mx.array, g: mx.array) -> Any:
            return mx.vjp(attend, [q, k, v], [g])

        return mx.compile(run)

    return with_gradients(ours), with_gradients(peer)


def error(found: Any, exact: Any) -> str:
    """The largest absolute difference of output and gradients."""
    pairs = zip([*found[0], *found[1]], [*exact[0], *exact[1]], strict=True)
    return f"{max(mx.abs(a.astype(mx.float32) - b).max().item() for a, b in pairs):.0e}"  # type: ignore[type-var]


def errors(case: Case) -> tuple[str, str]:
    """Ours and the peer's."""
    short = Case(
        min(case.length, 512), 1, case.window, case.segments, case.chunk, case.heads, case.kv_heads, case.width, case.dtype
    )
    ours, peer = sides(short)
    given = arrays(short)
    exact = peer(*(array.astype(mx.float32) for array in given))
    return error(ours(*given), exact), error(peer(*given), exact)


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """One row of the table."""
    given, calls = arrays(case), sides(case)
    for call in calls:
        mx.eval(call(*given))  # compiles
    ours, peer = interleaved([lambda c=call: mx.eval(c(*given)) for call in calls], repetitions)
    our_error, peer_error = errors(case)
    packed = case.segments > 1
    fusible = case.window is None and not packed and fused_backward(case.width, case.width)
    return {
        "case": case.name,
        "chosen": "chunks" if in_chunks(case.length, fusible, packed=packed) else "fused",
        "ours": round(ours.wall * 1e3, 2),
        "peer": round(peer.wall * 1e3, 2),
        **ratios(ours, peer),
        "error": our_error,
        "peer_error": peer_error,
    }


def main() -> None:
    parser = flags(__doc__, repetitions=7)
    parser.add_argument("--chunks", metavar="N", type=int, nargs="+", help="queries at a time; default: those of a run")
    options = parsed(parser)
    todo = quick_cases() if options.quick else cases(options.chunks or (CHUNK[backend()],))
    run(todo, measure, COLUMNS, options)


if __name__ == "__main__":
    main()
