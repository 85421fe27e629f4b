"""Recurrent layers in training: the gated delta rule in chunks against mlx-lm's loop over tokens, and how the others grow.

    python -m benchmarks.recurrences [layer|step|others] [--device gpu] [--lengths N ...] [--sides ours|peer] [--json FILE]

- layer: one layer's recurrence, forward and backward, compiled, 1 row, float32; --heads of 128 (32, as in Qwen3.5-4B).
  "error" is the largest relative distance of outputs and gradients from the loop's, on the first 256 tokens at most.
- step: a whole training step of 4 blocks with the widths of Qwen3.5-4B (3 of them recurrent), random weights, bfloat16, LoRA on
  all layers, checkpointing, 1 row, all tokens trained. The peer is mlx-lm's trainer, with its loss and its checkpointing.
- others: a step of small models of other recurrences, eager, at three lengths, CPU time; with --sides peer in mlx-lm's loops.
  "x2" is what twice the tokens cost. Attention layers beside the recurrence grow with the square of the row.

"first" is the first call, seconds, with tracing and compiling. Good numbers are above 1 for speed and below 1 for memory.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from attrs import frozen  # noqa: E402
from mlx_lm.models import gated_delta, qwen3_5  # noqa: E402
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint  # noqa: E402

from benchmarks.common import Cost, cost, flags, interleaved, parsed, ratios, tell, write_json  # noqa: E402
from benchmarks.small import VOCABULARY, build  # noqa: E402
from mlxlora import AdapterOptions, objectives, prepare  # noqa: E402
from mlxlora.data.batching import collate  # noqa: E402
from mlxlora.data.tokenize import Example  # noqa: E402
from mlxlora.models.gated_delta import Rule, chunked_delta_rule  # noqa: E402
from mlxlora.models.grad_checkpoint import checkpointed  # noqa: E402
from mlxlora.models.logprobs import scorer  # noqa: E402
from mlxlora.models.recurrences import recurrence_by  # noqa: E402
from mlxlora.models.row_layouts import use_windows  # noqa: E402
from mlxlora.training.step import make_step  # noqa: E402

COLUMNS = {
    "case": "case",
    "ours": "ours, ms",
    "peer": "mlx-lm, ms",
    "speed_ratio": "speed",
    "ours_mb": "ours, MB",
    "peer_mb": "mlx-lm, MB",
    "memory_ratio": "memory",
    "tokens": "ours, tokens/s",
    "first": "ours, first s",
    "peer_first": "mlx-lm, first s",
    "error": "error",
}
GROWTH = {
    "case": "model",
    "times": "CPU ms at each length",
    "growth": "time, x2",
    "memories": "MB at each length",
    "memory_growth": "memory, x2",
    "remark": "",
}
OTHERS = (
    *("mamba", "mamba2", "jamba", "plamo2", "granitemoehybrid", "nemotron_h", "falcon_h1", "recurrent_gemma", "rwkv7"),
    *("lfm2", "bailing_moe_linear", "bailing_hybrid", "baichuan_m1", "qwen3_5", "olmo_hybrid", "kimi_linear", "bailing_moe_v3"),
)
ENOUGH = 30.0  # seconds of a step, after which no longer rows are tried

Call = Callable[[], None]


@frozen
class Size:
    """What `layer` and `step` measure.

    Attributes:
        length: T.
        heads: of a layer.
        width: of a head.
        widths: of the model in multiples of Qwen3.5-4B's.
    """

    length: int
    heads: int = 32
    width: int = 128
    widths: float = 1.0


# --- one layer --------------------------------------------------------------------------------------


def rule(size: Size) -> list[mx.array]:
    """Queries, keys, values, logarithms of decays, rates, and a state of zeros."""
    mx.random.seed(0)
    shape = (1, size.length, max(1, size.heads // 2), size.width)
    queries, keys = (mx.random.normal(shape) for _ in range(2))
    queries, keys = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (queries, keys))
    values = mx.random.normal((1, size.length, size.heads, size.width))
    decays = mx.random.uniform(0.9, 1.0, (1, size.length, size.heads))
    made = [queries / size.width**0.5, keys, values, mx.log(decays), mx.random.uniform(0, 1, decays.shape)]
    made.append(mx.zeros((1, size.heads, size.width, size.width)))
    mx.eval(made)
    return made


def in_chunks(*arrays: mx.array) -> mx.array:
    """Ours."""
    return chunked_delta_rule(Rule(*arrays))[0]


def in_a_loop(q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, rate: mx.array, state: mx.array) -> mx.array:
    """mlx-lm's."""
    return gated_delta.gated_delta_ops(q, k, v, mx.exp(log_decay), rate, state)[0]


def with_gradients(compute: Callable[..., mx.array]) -> Callable[..., Any]:
    """Outputs, and the gradients of the sum of their squares."""

    def total(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        out = compute(*arrays)
        return mx.square(out).sum(), out

    return mx.value_and_grad(total, argnums=tuple(range(5)))


def layer(size: Size, sides: Sequence[str], repetitions: int) -> dict[str, Any]:
    """A row of the table."""
    arrays = rule(size)
    calls = {"ours": in_chunks, "peer": in_a_loop}
    compiled = {side: mx.compile(with_gradients(calls[side])) for side in sides}
    timed = {side: partial(_evaluated, call, arrays) for side, call in compiled.items()}
    short = [array[:, :256] for array in arrays[:5]] + [arrays[5]]
    pairs = zip(*(_flat(with_gradients(call)(*short)) for call in (in_chunks, in_a_loop)), strict=True)
    error = max(float((mx.linalg.norm(a - b) / mx.linalg.norm(b)).item()) for a, b in pairs)  # type: ignore[arg-type]
    name = f"layer, T={size.length}, {size.heads} heads of {size.width}"
    return _row(name, size, timed, repetitions) | {"error": f"{error:.0e}"}


def _evaluated(call: Callable[..., Any], arrays: list[mx.array]) -> None:
    mx.eval(call(*arrays))


def _flat(result: Any) -> list[mx.array]:
    (_, out), gradients = result
    return [array.flatten() for array in (out, *gradients)]


# --- a whole step -----------------------------------------------------------------------------------


def make_model(size: Size) -> nn.Module:
    """4 blocks of Qwen3.5-4B's widths with random bfloat16 weights and LoRA, the same at every call."""

    def of(number: int) -> int:
        return max(8, int(number * size.widths))

    config: dict[str, Any] = {"model_type": "qwen3_5", "hidden_size": of(2560), "intermediate_size": of(9216)}
    config |= {"num_hidden_layers": 4, "vocab_size": of(248320), "num_attention_heads": 16, "num_key_value_heads": 4}
    config |= {"head_dim": of(256), "linear_num_value_heads": size.heads, "linear_num_key_heads": size.heads // 2}
    config |= {"linear_key_head_dim": of(128), "linear_value_head_dim": of(128), "tie_word_embeddings": True}
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    model = prepare(model, AdapterOptions(num_layers=-1, rank=8))
    mx.eval(model.parameters())
    return model.train()


def row_of(length: int, vocabulary: int) -> np.ndarray:
    """Tokens of a row that gives `length` inputs."""
    return np.random.default_rng(0).integers(1, vocabulary, length + 1).astype(np.int32)


def our_step(size: Size) -> Call:
    """Ours, as a run takes it."""
    model = make_model(size)
    tokens = row_of(size.length, _vocabulary(model))
    batch = collate([Example(tokens, np.arange(len(tokens)) > 0, None, "random")])
    step = make_step(checkpointed(model), optim.Adam(learning_rate=1e-5), objectives.sft())

    def call() -> None:
        step(batch)
        mx.eval(step.state)

    return call


def their_step(size: Size) -> Call:
    """mlx-lm's: the step that its `train` compiles."""
    model, optimizer = make_model(size), optim.Adam(learning_rate=1e-5)
    grad_checkpoint(model.layers[0])  # type: ignore[index]
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, default_loss)
    batch, lengths = mx.array(row_of(size.length, _vocabulary(model)))[None], mx.array([[0, size.length + 1]])

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradient = loss_and_grad(model, batch, lengths)
        optimizer.update(model, gradient)
        return loss

    def call() -> None:
        with recurrence_by("loop"):
            mx.eval(step(batch, lengths), state)

    return call


def _vocabulary(model: Any) -> int:
    return model.args.text_config["vocab_size"]


def whole_step(size: Size, sides: Sequence[str], repetitions: int) -> dict[str, Any]:
    """A row of the table."""
    makers = {"ours": our_step, "peer": their_step}
    name = f"step, 4 blocks of Qwen3.5-4B, T={size.length}"
    return _row(name, size, {side: makers[side](size) for side in sides}, repetitions)


def _row(name: str, size: Size, calls: dict[str, Call], repetitions: int) -> dict[str, Any]:
    first = {side: _seconds(call) for side, call in calls.items()}
    costs = dict(zip(calls, interleaved(list(calls.values()), repetitions, budget=60), strict=True))
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"case": name}
    for side, found in costs.items():
        row |= {side: round(found.wall * 1e3, 1), f"{side}_mb": round(found.peak / 1e6, 1)}
    if len(costs) == 2:
        row |= ratios(costs["ours"], costs["peer"])
    if "ours" in costs:
        row |= {"first": round(first["ours"], 1), "tokens": round(size.length / costs["ours"].wall)}
    return row | ({"peer_first": round(first["peer"], 1)} if "peer" in first else {})


def _seconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- other recurrences ------------------------------------------------------------------------------


def growth(name: str, lengths: Sequence[int], repetitions: int, choice: str = "auto") -> dict[str, Any]:
    """A row of the other table: a training step of a small model at these lengths, without compiling."""
    costs: list[Cost] = []
    remark = ""
    mx.disable_compile()
    try:
        for length in lengths:
            if costs and costs[-1].cpu > ENOUGH:
                remark = f"{length} not tried"
                break
            with recurrence_by(choice):
                costs.append(min((_step_of(name, length) for _ in range(repetitions)), key=lambda c: c.cpu))
    except Exception as error:  # what a model's own code raises
        remark = f"{type(error).__name__}: {str(error)[:60]}"
    finally:
        mx.enable_compile()
    times, memories = [c.cpu for c in costs], [c.peak for c in costs]
    return {
        "case": name,
        "times": " / ".join(str(round(t * 1e3)) for t in times),
        "growth": _doubled(times, lengths),
        "memories": " / ".join(str(round(m / 1e6)) for m in memories),
        "memory_growth": _doubled(memories, lengths),
        "remark": remark,
        "ours": round(times[-1] * 1e3, 1) if times else 0,
    }


def _step_of(name: str, length: int) -> Cost:
    model = prepare(build(name), AdapterOptions(num_layers=-1, rank=8)).train()
    tokens = row_of(length, VOCABULARY)
    batch = collate([Example(tokens, np.arange(len(tokens)) > 0, None, "random")])
    score = scorer(model)
    use_windows(score.forward, model)
    step = make_step(model, optim.Adam(learning_rate=1e-5), objectives.sft(), score=score)
    step(collate([Example(tokens[:17], np.arange(17) > 0, None, "random")]))

    def call() -> None:
        step(batch)
        mx.eval(step.state)

    return cost(call)


def _doubled(values: Sequence[float], lengths: Sequence[int]) -> str:
    """What twice the tokens cost, between the last two lengths."""
    if len(values) < 2:
        return ""
    doublings = np.log2(lengths[len(values) - 1] / lengths[len(values) - 2])
    return f"{(values[-1] / values[-2]) ** (1 / doublings):.2f}"


# --- the tables --------------------------------------------------------------------------------------


def main() -> None:
    parser = flags(__doc__, repetitions=3)
    parser.add_argument("what", nargs="*", default=["layer", "step"], help="layer, step, others")
    parser.add_argument("--lengths", metavar="N", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--sides", choices=("both", "ours", "peer"), default="both", help="what to measure")
    parser.add_argument("--heads", type=int, default=32, help="of a layer")
    parser.add_argument("--widths", type=float, default=1.0, help="of the model of a step, in multiples of Qwen3.5-4B's")
    options = parsed(parser)
    sides = ("ours", "peer") if options.sides == "both" else (options.sides,)
    if options.quick:
        mx.disable_compile()  # a C++ compiler would take longer than everything else
    repetitions, rows, others = (1 if options.quick else options.repetitions), [], []
    if "others" in options.what:
        names = ("mamba2", "qwen3_5") if options.quick else OTHERS
        for name in (name for name in names if options.only in name):
            lengths = options.lengths or ((16, 32) if options.quick else (256, 1024, 4096))
            others.append(growth(name, lengths, repetitions, "loop" if options.sides == "peer" else "auto"))
            print(*others[-1].values(), flush=True)
    for what in (what for what in ("layer", "step") if what in options.what):
        for length in options.lengths or ((96,) if options.quick else (512,)):
            size = Size(length, 4, 16, 1 / 64) if options.quick else Size(length, options.heads, widths=options.widths)
            rows.append((layer if what == "layer" else whole_step)(size, sides, repetitions))
            print(*rows[-1].values(), flush=True)
            if options.json:
                write_json(options.json, rows)  # a longer row may not end
    if others:
        tell(others, GROWTH, options)
    if rows:
        tell(rows, COLUMNS, options)


if __name__ == "__main__":
    main()
