"""Speed and memory of sampling groups of completions, against mlx-lm's generators and mlx-lm-lora's.

    python -m benchmarks.rollouts [--device gpu] [--quick] [--json FILE]

One model with random weights, the same prompts and limits, temperature 1, in one process, taking turns. Ours, mlx-lm's
`generate_step` (one completion after the other: two of them are timed) and its `BatchGenerator` (prompts as they are, or with
the cache of a prompt that was read once) also keep every sampled token's log-probability, as policy gradients need;
mlx-lm-lora's `generate_grpo` keeps none and so has less to do. "ragged": a twentieth of the probability ends a completion at
every token. Every side runs once before, so that its shapes are compiled; a case that took longer than --budget
seconds is not repeated.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402
from attrs import evolve, frozen  # noqa: E402
from mlx_lm.generate import BatchGenerator, generate_step  # noqa: E402
from mlx_lm.models import llama  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.sample_utils import make_sampler  # noqa: E402

from benchmarks.common import flags, interleaved, parsed, qwen3_600m, tell  # noqa: E402
from mlxlora.rollouts.engine import Decoding, sample  # noqa: E402
from mlxlora.rollouts.kv_cache import Route, find_route  # noqa: E402
from mlxlora.rollouts.sampling import Sampling  # noqa: E402

COLUMNS = {
    "case": "case",
    "peer_name": "peer",
    "ours": "ours, tokens/s",
    "peer": "peer, tokens/s",
    "ours_completions": "ours, completions/s",
    "speed_ratio": "speed",
    "ours_mb": "ours, MB",
    "peer_mb": "peer, MB",
    "memory_ratio": "memory",
}


@frozen
class Case:
    """Prompts and how many completions of them; `kv_bits`: of our cache."""

    name: str
    lengths: Sequence[int]
    group: int
    tokens: int
    ragged: bool = False
    kv_bits: int | None = None
    hidden: int = 512
    layers: int = 8
    vocabulary: int = 16000


QUICK = [Case("quick, 2 prompts, G=4", (12, 20), 4, 8, hidden=64, layers=2, vocabulary=500)]
CPU = [
    Case("prompt 256, 48 new, G=8", (256,), 8, 48),
    Case("prompt 256, 48 new, G=32", (256,), 32, 48),
    Case("4 prompts of 64 to 256, up to 64 new, ragged, G=8", (64, 128, 192, 256), 8, 64, ragged=True),
]
GPU = [
    Case("prompt 512, 128 new, G=8", (512,), 8, 128),
    Case("prompt 512, 128 new, G=64", (512,), 64, 128),
    Case("prompt 512, 128 new, G=256", (512,), 256, 128),
    Case("8 prompts of 128 to 512, up to 128 new, ragged, G=16", tuple(range(128, 513, 54)), 16, 128, ragged=True),
]


@frozen
class Work:
    """What every side is given."""

    model: nn.Module
    prompts: list[list[int]]
    case: Case
    stop: list[int]
    route: Route


def small_llama(case: Case) -> nn.Module:
    """Float32, tied."""
    args = {"model_type": "llama", "hidden_size": case.hidden, "num_hidden_layers": case.layers, "vocab_size": case.vocabulary}
    args |= {"intermediate_size": case.hidden * 11 // 4, "num_attention_heads": case.hidden // 64 or 1, "rms_norm_eps": 1e-5}
    return llama.Model(llama.ModelArgs.from_dict(args | {"num_key_value_heads": case.hidden // 128 or 1}))


def prepare(case: Case, make: Callable[[Case], nn.Module]) -> Work:
    """The same weights and prompts at every call."""
    mx.random.seed(0)
    model = make(case)
    mx.eval(model.parameters())
    model.eval()
    rng, vocabulary = np.random.default_rng(0), model.args.vocab_size  # type: ignore[union-attr]
    prompts = [rng.integers(1, vocabulary, length).tolist() for length in case.lengths]
    stop = list(range(0, vocabulary, 20)) if case.ragged else []  # the random model is nearly uniform
    return Work(model, prompts, case, stop, find_route(model))


# --- the sides: each returns the number of tokens it sampled ------------------------------------------


def ours(work: Work) -> int:
    limits = Sampling(max_tokens=work.case.tokens, kv_bits=work.case.kv_bits)
    how = Decoding(limits, work.stop, work.case.group, route=work.route)
    groups = sample(work.model, work.prompts, how, key=mx.random.key(0))
    return sum(len(completion.tokens) for group in groups for completion in group)


def one_by_one(work: Work) -> int:
    """Two completions."""
    sampler, stop, count = make_sampler(1.0), set(work.stop), 0
    for prompt in islice((prompt for prompt in work.prompts for _ in range(work.case.group)), 2):
        logps = []
        for token, logp in generate_step(mx.array(prompt), work.model, max_tokens=work.case.tokens, sampler=sampler):
            logps.append(logp[token])
            if token in stop:
                break
        mx.eval(logps)
        count += len(logps)
    return count


def batched(work: Work) -> int:
    return _drained(work, [(prompt, None) for prompt in work.prompts for _ in range(work.case.group)])


def batched_shared(work: Work) -> int:
    rows = []
    for prompt in work.prompts:
        cache = make_prompt_cache(work.model)
        work.model(mx.array(prompt[:-1])[None], cache=cache)
        mx.eval([layer.state for layer in cache])
        rows += [(prompt[-1:], copy.copy(cache))] * work.case.group
    return _drained(work, rows)


def _drained(work: Work, rows: list[tuple[list[int], Any]]) -> int:
    stop, size = [[token] for token in work.stop] or None, len(rows)
    generator = BatchGenerator(
        work.model, stop_tokens=stop, sampler=make_sampler(1.0), completion_batch_size=size, prefill_batch_size=size
    )
    prompts, caches = zip(*rows, strict=True)
    generator.insert(list(prompts), [work.case.tokens] * size, caches=list(caches))
    logps = []
    while responses := generator.next_generated():
        logps += [response.logprobs[response.token] for response in responses]
    mx.eval(logps)
    generator.close()
    return len(logps)


def mlx_lm_lora(work: Work) -> int:
    from mlx_lm_lora.trainer.grpo_trainer import generate_grpo  # type: ignore[import-not-found]

    tokenizer: Any = SimpleNamespace(eos_token_ids=work.stop, encode=lambda *_, **__: [], decode=lambda ids: "")
    size = len(work.prompts) * work.case.group
    limits = {"max_tokens": work.case.tokens, "group_size": work.case.group, "batch_size": size, "end_token": ""}
    options = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return sum(len(row) for row in generate_grpo(work.model, tokenizer, work.prompts, **limits, **options)[0])


PEERS: dict[str, Callable[[Work], int]] = {
    "mlx-lm generate_step": one_by_one,
    "mlx-lm BatchGenerator": batched,
    "mlx-lm BatchGenerator, shared caches": batched_shared,
    "mlx-lm-lora generate_grpo": mlx_lm_lora,
}


# --- the table --------------------------------------------------------------------------------------


def measure(case: Case, make: Callable[[Case], nn.Module], repetitions: int, budget: float) -> list[dict[str, Any]]:
    """A row of the table for each peer; every side samples the same completions at each repetition."""
    work = prepare(case, make)
    tokens: dict[str, int] = {}
    calls = {name: _seeded(name, side, work, tokens) for name, side in {"ours": ours, **PEERS}.items()}
    for name in list(calls):
        try:
            calls[name]() if name != "mlx-lm generate_step" else one_by_one(evolve(work, case=evolve(case, tokens=8)))
        except ImportError as error:
            print(f"{name}: left out ({error})")
            del calls[name]
    costs = dict(zip(calls, interleaved(list(calls.values()), repetitions, budget), strict=True))
    return [_row(case, name, tokens, costs) for name in calls if name != "ours"]


def _seeded(name: str, side: Callable[[Work], int], work: Work, tokens: dict[str, int]) -> Callable[[], None]:
    def call() -> None:
        mx.random.seed(0)
        tokens[name] = side(work)

    return call


def _row(case: Case, name: str, tokens: dict[str, int], costs: dict[str, Any]) -> dict[str, Any]:
    our, their = costs["ours"], costs[name]
    speeds = {side: tokens[side] / costs[side].wall for side in ("ours", name)}
    return {
        "case": case.name,
        "peer_name": name,
        "ours": round(speeds["ours"]),
        "peer": round(speeds[name]),
        "ours_completions": round(len(case.lengths) * case.group / our.wall, 2),
        "speed_ratio": round(speeds["ours"] / speeds[name], 2),
        "ours_mb": round(our.peak / 1e6, 1),
        "peer_mb": round(their.peak / 1e6, 1),
        "memory_ratio": round(our.peak / their.peak, 2),
    }


def main() -> None:
    parser = flags(__doc__, repetitions=3)
    parser.add_argument("--budget", type=float, default=30, help="seconds of a case, after which it is not repeated")
    parser.add_argument("--kv-bits", type=int, choices=(4, 8), help="of our cache")
    options = parsed(parser)
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    cases, make = (GPU, lambda _: qwen3_600m()) if on_gpu else (CPU, small_llama)
    cases, make = (QUICK, small_llama) if options.quick else (cases, make)
    found: list[dict[str, Any]] = []
    for case in (case for case in cases if options.only in case.name):
        repetitions = 1 if options.quick else options.repetitions
        found += measure(evolve(case, kv_bits=options.kv_bits), make, repetitions, options.budget)
        print("\n".join(" ".join(map(str, row.values())) for row in found[-len(PEERS) :]), flush=True)
    tell(found, COLUMNS, options)


if __name__ == "__main__":
    main()
