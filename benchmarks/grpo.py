"""Speed and memory of a GRPO step, against that of mlx-lm-lora's trainer.

    python -m benchmarks.grpo [--device gpu] [--quick] [--json FILE]

A step samples G completions of every prompt, rewards them and updates once; rollout and training step are also measured
alone. Both sides have the same llama-shaped model (random float32 weights, LoRA of rank 8 on every linear layer, Adam), the
same prompts and the same reward, in one process, and take turns. No token ends a completion, so both sample the same number.
Theirs is `generate_grpo`, `_rollout_rewards`, `grpo_loss` in microbatches and the update, as `train_grpo` runs them (not
compiled). `difference` is that of the gradient's norm on the same completions and advantages.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from attrs import frozen  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from benchmarks.common import Cost, flags, interleaved, parsed, qwen3_600m, ratios, small_llama, tell  # noqa: E402
from mlxlora.adapters.prepare import disabled, prepare  # noqa: E402
from mlxlora.config.options import AdapterOptions, PromptData  # noqa: E402
from mlxlora.data.batching import Make, MicroBatch  # noqa: E402
from mlxlora.data.sources import Context  # noqa: E402
from mlxlora.data.tokenize import Prompt  # noqa: E402
from mlxlora.models.logprobs import scorer  # noqa: E402
from mlxlora.objectives.grpo import grpo  # noqa: E402
from mlxlora.rollouts.engine import Decoding, sample  # noqa: E402
from mlxlora.rollouts.kv_cache import find_route  # noqa: E402
from mlxlora.rollouts.rewards import NamedReward  # noqa: E402
from mlxlora.rollouts.sampling import Sampling  # noqa: E402
from mlxlora.rollouts.source import Rollouts, prompts  # noqa: E402
from mlxlora.training.reference import referenced  # noqa: E402
from mlxlora.training.step import columns_of, make_step  # noqa: E402

try:
    from mlx_lm_lora.trainer import grpo_trainer
except ImportError:
    grpo_trainer = None
peer: Any = grpo_trainer

COLUMNS = {
    "case": "case",
    "ours": "ours, ms",
    "peer": "mlx-lm-lora, ms",
    "speed_ratio": "speed",
    "cpu_ratio": "CPU time",
    "ours_mb": "ours, MB",
    "peer_mb": "mlx-lm-lora, MB",
    "memory_ratio": "memory",
    "difference": "difference",
}


@frozen
class Case:
    """A model and what it samples.

    Attributes:
        hidden: hidden size of the model.
        layers: its blocks.
        vocabulary: tokens it knows.
        prompts: in a batch.
        group_size: G, completions of each.
        prompt: P, tokens of a prompt.
        completion: C, tokens of a completion.
        beta: weight of the KL; the peer keeps a second model for it.
        base: makes the model; None: the small llama of these sizes.
    """

    hidden: int = 256
    layers: int = 6
    vocabulary: int = 16000
    prompts: int = 1
    group_size: int = 8
    prompt: int = 256
    completion: int = 64
    beta: float = 0.0
    base: Callable[[], nn.Module] | None = None

    @property
    def name(self) -> str:
        """What the table says."""
        sizes = f"{self.prompts}x{self.group_size} P={self.prompt} C={self.completion} D={self.hidden} V={self.vocabulary}"
        return f"{sizes}, beta {self.beta:g}"


CPU = [Case(), Case(beta=0.1), Case(prompts=4, prompt=64)]
GPU = [Case(hidden=1024, layers=28, vocabulary=151936, base=qwen3_600m)]
QUICK = [Case(hidden=64, layers=2, vocabulary=512, group_size=4, prompt=24, completion=8, beta=0.1)]
Parts = dict[str, Callable[[], Any]]
PARTS = ("whole step", "rollout", "training step")


class Words:
    """As much of a tokenizer as either side asks for; its end of sequence is no token of the model."""

    def __init__(self, vocabulary: int) -> None:
        self.eos_token_ids = {vocabulary}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return " ".join(map(str, ids))


def reward(prompts: list[str], completions: list[str], answer: list[str], types: Any = None) -> list[float | None]:
    """Differs within a group."""
    return [sum(map(int, text.split())) % 97 / 97 for text in completions]


def make_model(case: Case) -> nn.Module:
    """The same weights at every call, with adapters whose update is not 0."""
    base = case.base() if case.base else small_llama(hidden=case.hidden, layers=case.layers, vocabulary=case.vocabulary)
    model = prepare(base, AdapterOptions(num_layers=-1, rank=8))
    mx.eval(model.parameters())
    return model.train()


def make_prompts(case: Case) -> list[Prompt]:
    """Random tokens."""
    tokens = np.random.default_rng(0).integers(1, case.vocabulary, (case.prompts, case.prompt)).astype(np.int32)
    return [Prompt(row, {"answer": ""}, "random", "") for row in tokens]


# --- the two sides --------------------------------------------------------------------------------


def ours(case: Case, rows: Sequence[Prompt]) -> tuple[Parts, MicroBatch, Callable[[], float]]:
    """(what is measured, a batch, the norm of the gradient on it)."""
    model, objective = make_model(case), grpo(beta=case.beta)
    step = make_step(model, optim.Adam(learning_rate=1e-5), objective, score=scorer(model, columns=columns_of(objective)))
    route, sampling = find_route(model), Sampling(max_tokens=case.completion)
    how = Rollouts((NamedReward("reward", reward),), case.group_size, sampling, route=route)
    make: Make = prompts(PromptData(), how).make(Context(model, Words(case.vocabulary), 0, share=True))  # as a run chooses here
    if case.beta:
        make = referenced(make, partial(disabled, model), 1.0)
    numbers, tokens = count(), [row.tokens.tolist() for row in rows]
    micro = make(rows, next(numbers))

    def rollout() -> None:
        how = Decoding(sampling, {case.vocabulary}, case.group_size, route=route)
        sample(model, tokens, how, key=mx.random.key(next(numbers)))

    def whole() -> None:
        step(make(rows, next(numbers)).batch)

    parts: Parts = dict(zip(PARTS, (whole, rollout, lambda: step(micro.batch)), strict=True))
    return parts, micro, lambda: float(step(micro.batch)["grad_norm"].item())


def theirs(case: Case, rows: Sequence[Prompt], micro: MicroBatch) -> tuple[Parts, Callable[[], float]]:
    """The same with mlx-lm-lora, at its trainer's settings for a batch of that many prompts."""
    model, words = make_model(case), Words(case.vocabulary)
    reference, optimizer = (make_model(case).eval() if case.beta else None), optim.Adam(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    tokens = [row.tokens.tolist() for row in rows]
    batch = tokens, [[] for _ in rows], ["" for _ in rows], ["" for _ in rows], None
    value_and_grad = nn.value_and_grad(model, peer.grpo_loss)
    options = {"max_tokens": case.completion, "group_size": case.group_size, "batch_size": case.prompts, "end_token": ""}
    options |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}

    def rollout() -> Any:
        return peer.generate_grpo(model, words, tokens, **options)

    def gradient(completions: Any, texts: Any, indices: Any, advantages: mx.array, metrics: Any) -> Any:
        given = {"completions": completions, "completion_texts": texts, "batch_indices": indices, "advantages": advantages}
        settings = {"beta": case.beta, "epsilon": 0.2, "max_tokens": case.completion, "grpo_loss_type": "grpo"}
        return peer._grpo_value_and_grad(
            value_and_grad, model, case.prompts, batch=batch, ref_model=reference, reward_metrics=metrics, **given, **settings
        )

    def train(*rolled: Any) -> None:
        (loss, *_), grads = gradient(*rolled)
        if not mx.all(mx.stack([mx.isfinite(loss), *(mx.all(mx.isfinite(g)) for _, g in tree_flatten(grads))])).item():  # type: ignore[arg-type]
            raise FloatingPointError
        optimizer.update(model, grads)
        mx.eval(model.state, optimizer.state, loss)

    def whole() -> None:
        completions, texts, indices = rollout()
        train(completions, texts, indices, *peer._rollout_rewards(batch, texts, indices, [reward], None))

    ends = np.cumsum(np.array(micro.batch.lengths))
    fixed = [mx.array(part) for part in np.split(np.array(micro.batch.targets)[: ends[-1]], ends[:-1])]
    again = fixed, [""] * len(fixed), [i for i in range(len(rows)) for _ in range(case.group_size)], micro.batch.advantages, {}

    def norm() -> float:
        return float(np.sqrt(sum(mx.square(g).sum().item() for _, g in tree_flatten(gradient(*again)[1]))))

    return dict(zip(PARTS, (whole, rollout, lambda: train(*again)), strict=True)), norm


# --- the table --------------------------------------------------------------------------------------


def measure(case: Case, repetitions: int, budget: float, only: str) -> list[dict[str, Any]]:
    """Rows of the table: the whole step and its parts, of them those whose name contains `only`."""
    rows = make_prompts(case)
    our_parts, micro, our_norm = ours(case, rows)
    their_parts, their_norm = theirs(case, rows, micro) if peer else ({}, None)
    difference = "" if their_norm is None else f"{abs(their_norm() / our_norm() - 1):.0e}"
    found = []
    for name, part in ((n, p) for n, p in our_parts.items() if only in f"{case.name}, {n}"):
        calls = [part, *([their_parts[name]] if peer else [])]
        for call in calls:
            call(), call()  # every shape is compiled
        row = _compared(*interleaved(calls, repetitions, budget)) | {"case": f"{case.name}, {name}"}
        found.append(row | {"difference": difference if name == "training step" else ""})
        print(" ".join(str(found[-1][column]) for column in COLUMNS), flush=True)
    return found


def _compared(our: Cost, their: Cost | None = None) -> dict[str, Any]:
    costs = {"ours": round(1000 * our.wall, 1), "ours_mb": round(our.peak / 1e6, 1)}
    if their is None:
        return dict.fromkeys(COLUMNS) | costs
    return dict.fromkeys(COLUMNS) | costs | {"peer": round(1000 * their.wall, 1), **ratios(our, their)}


def main() -> None:
    parser = flags(__doc__, repetitions=7)
    parser.add_argument("--budget", type=float, default=30, help="seconds of a line of the table, after which it is not repeated")
    options = parsed(parser)
    if peer is None:
        print("mlx-lm-lora is not installed (pip install --no-deps mlx-lm-lora): ours only")
    found: list[dict[str, Any]] = []
    full = CPU if mx.default_device() == mx.Device(mx.cpu) else GPU
    for case in QUICK if options.quick else full:
        if any(options.only in f"{case.name}, {part}" for part in PARTS):
            found += measure(case, 2 if options.quick else options.repetitions, options.budget, options.only)
    tell(found, COLUMNS, options)


if __name__ == "__main__":
    main()
