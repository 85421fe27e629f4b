"""Log-probabilities of the trained tokens and their gradient: memory-bounded against plain cross entropy.

    python -m benchmarks.logprobs [--device gpu] [--quick] [--json FILE]

Hidden states [N, D] to Σ log-probabilities and its gradient with respect to the hidden states, for a dense head and one of
4 bits; with respect to the head too, for one that is trained; and without a gradient. Plain is `nn.losses.cross_entropy` on
all logits at once. Both are compiled and take turns in one process. The error is the largest difference of the gradient
(of the log-probabilities where there is none), relative to the largest entry of the plain one in float32.
"""

from collections.abc import Callable
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from attrs import frozen  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from benchmarks.common import flags, interleaved, parsed, ratios, run  # noqa: E402
from mlxlora.batch import Batch  # noqa: E402
from mlxlora.models.logprobs import Scorer, affordable_chunk  # noqa: E402

COLUMNS = {
    "case": "case",
    "ours": "ours, ms",
    "peer": "plain, ms",
    "speed_ratio": "speed",
    "cpu_ratio": "CPU time",
    "ours_mb": "ours, MB",
    "peer_mb": "plain, MB",
    "memory_ratio": "memory",
    "error": "error of ours",
    "peer_error": "error of plain",
}


@frozen
class Case:
    """N trained tokens, hidden size D, vocabulary V; what the head is and what has a gradient."""

    tokens: int
    hidden: int
    vocabulary: int
    kind: str = "dense"

    @property
    def name(self) -> str:
        """What the table says."""
        return f"N={self.tokens} D={self.hidden} V={self.vocabulary}, {self.kind}"


CPU = [Case(2048, 576, 49152), Case(4096, 1024, 32000), Case(1024, 896, 151936), Case(512, 256, 16384, "4 bits")]
CPU += [Case(1024, 576, 49152, "trained head"), Case(2048, 576, 49152, "no gradient")]
GPU = [Case(4096, 1024, 151936), Case(16384, 1024, 151936), Case(4096, 1024, 151936, "4 bits")]
GPU += [Case(4096, 1024, 151936, "trained head"), Case(16384, 1024, 151936, "no gradient")]
QUICK = [Case(64, 32, 512, kind) for kind in ("dense", "4 bits", "trained head", "no gradient")]


class Head(nn.Module):
    """A model that is only a head."""

    def __init__(self, case: Case, dtype: mx.Dtype) -> None:
        super().__init__()
        mx.random.seed(0)
        self.out = nn.Linear(case.hidden, case.vocabulary, bias=False)
        self.set_dtype(dtype)
        if case.kind == "4 bits":
            nn.quantize(self, group_size=32, bits=4)
        self.freeze()
        if case.kind == "trained head":
            self.unfreeze()


@frozen(eq=False)
class Given:
    """A split whose backbone returns given hidden states."""

    model: Head
    states: list[mx.array]

    def hidden(self, tokens: mx.array) -> mx.array:
        """[1, N, D]."""
        return self.states[0][None]

    def head(self, hidden: mx.array) -> mx.array:
        """[N, V]."""
        return self.model.out(hidden)


def batch(case: Case) -> Batch:
    zero, everything = mx.zeros((case.tokens,), mx.int32), mx.arange(case.tokens)
    targets = mx.random.randint(0, case.vocabulary, (case.tokens,), key=mx.random.key(1))
    return Batch(zero[None], everything, targets, zero, mx.array([case.tokens]))


Run = Callable[[Head, mx.array], Any]


def ours(case: Case) -> Run:
    """[N, D] to the sum of log-probabilities; without a gradient to them."""
    given, gradient = batch(case), case.kind != "no gradient"

    def run(model: Head, hidden: mx.array) -> mx.array:
        names = tuple(name for name, _ in tree_flatten(model.trainable_parameters()))
        score = Scorer(model, Given(model, [hidden]), names, chunk=affordable_chunk(case.vocabulary))  # type: ignore[arg-type]
        logps = score(given, gradient=gradient)[0]
        return logps.sum() if gradient else logps

    return run


def plain(case: Case) -> Run:
    """The same from all logits at once."""
    targets = batch(case).targets

    def run(model: Head, hidden: mx.array) -> mx.array:
        logps = -nn.losses.cross_entropy(model.out(hidden).astype(mx.float32), targets)
        return logps if case.kind == "no gradient" else logps.sum()

    return run


def compiled(case: Case, run: Run, model: Head, hidden: mx.array) -> Callable[[], list[mx.array]]:
    """What is measured: gradients, or the log-probabilities."""

    def work(parameters: Any, hidden: mx.array) -> Any:
        def of(parameters: Any, hidden: mx.array) -> mx.array:
            model.update(parameters)
            return run(model, hidden)

        if case.kind == "no gradient":
            return of(parameters, hidden)
        wanted = (0, 1) if case.kind == "trained head" else (1,)
        return mx.grad(of, argnums=wanted)(parameters, hidden)

    step, parameters = mx.compile(work), model.trainable_parameters()

    def call() -> list[mx.array]:
        out = [array for _, array in tree_flatten([step(parameters, hidden)])]
        model.update(parameters)
        mx.eval(out)
        return out  # type: ignore[return-value]

    return call


def measure(case: Case, repetitions: int) -> dict[str, Any]:
    """One row of the table."""
    dtype = mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16
    model = Head(case, dtype)
    hidden = mx.random.normal((case.tokens, case.hidden), key=mx.random.key(2)).astype(dtype)
    calls = [compiled(case, make(case), model, hidden) for make in (ours, plain)]
    found = [call() for call in calls]
    model.set_dtype(mx.float32)
    exact = compiled(case, plain(case), model, hidden.astype(mx.float32))()
    errors = [max(map(_difference, side, exact)) for side in found]
    model.set_dtype(dtype)
    del found, exact
    our, their = interleaved(calls, repetitions)
    return {
        "case": case.name,
        "ours": round(1e3 * our.wall, 1),
        "peer": round(1e3 * their.wall, 1),
        **ratios(our, their),
        "error": f"{errors[0]:.0e}",
        "peer_error": f"{errors[1]:.0e}",
    }


def _difference(a: mx.array, b: mx.array) -> float:
    return (mx.abs(a.astype(mx.float32) - b).max() / mx.abs(b).max()).item()  # type: ignore[return-value]


def main() -> None:
    options = parsed(flags(__doc__, repetitions=5))
    full = CPU if mx.default_device() == mx.Device(mx.cpu) else GPU
    run(QUICK if options.quick else full, measure, COLUMNS, options)


if __name__ == "__main__":
    main()
