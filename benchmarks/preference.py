"""Speed and memory of a DPO, CPO and ORPO step, against those of mlx-lm-lora 5.10.2's trainers.

    python -m benchmarks.preference [--device gpu] [--quick] [--json FILE]

Both train the same llama-shaped model (random float32 weights, LoRA of rank 8 on every linear layer, Adam) on the same
pairs in one process, compiled, and take turns. Theirs is the compiled step of `train_dpo`, `train_cpo` and `train_orpo`
with their loss functions, on batches of their iterators; for DPO a second model is their reference. Their metrics are left
out, because with them the compiled step of CPO raises `IndexError: _Map_base::at` (mlx 0.32.4 on a CPU). Ours is `make_step`
with the layout that a run would choose; "whole" is `make_step` with every row whole, so whole / ours is what sharing
prompts brings. Our reference is a column that was computed before: "with reference" is the speed when that is paid too,
which is so in a run's first epoch. CPO is compared without its NLL, which theirs lacks. An error is the relative
difference of the first loss to the definition, each row by itself; in ORPO theirs averages the NLL over sequences, ours
over tokens, as TRL does, so completions of several lengths show there. Memory is above what was there before the step:
their second model is not counted.

The peer is not a dependency: pip install --no-deps mlx-lm-lora==5.10.2 (and tqdm). Without it only ours is measured.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from attrs import evolve, frozen  # noqa: E402
from mlx.utils import tree_map  # noqa: E402

from benchmarks.common import flags, interleaved, limited, parsed, qwen3_600m, ratios, run, small_llama  # noqa: E402
from mlxlora import AdapterOptions, Objective, disabled, make_step, objectives, prepare  # noqa: E402
from mlxlora.data.batching import pair_batch, read_positions  # noqa: E402
from mlxlora.data.tokenize import Example, Pair  # noqa: E402
from mlxlora.models.grad_checkpoint import checkpointed  # noqa: E402
from mlxlora.models.logprobs import scorer  # noqa: E402
from mlxlora.models.row_layouts import pays  # noqa: E402
from mlxlora.training.reference import log_probabilities  # noqa: E402

dpo_trainer: Any
try:
    from mlx_lm_lora.trainer import cpo_trainer, dpo_trainer, orpo_trainer
except ImportError:
    cpo_trainer = dpo_trainer = orpo_trainer = None

METHODS: dict[str, Objective] = {"dpo": objectives.dpo(), "cpo": objectives.cpo(alpha=0), "orpo": objectives.orpo()}
COLUMNS = {
    "case": "case",
    "layout": "our layout",
    "ours": "ours, s",
    "whole": "whole rows, s",
    "peer": "mlx-lm-lora, s",
    "speed_ratio": "speed",
    "cpu_ratio": "CPU time",
    "with_reference": "with reference",
    "sharing_ratio": "whole / ours",
    "ours_mb": "ours, MB",
    "peer_mb": "mlx-lm-lora, MB",
    "memory_ratio": "memory",
    "ours_error": "ours, loss error",
    "peer_error": "theirs, loss error",
}


@frozen
class Case:
    """A model and its pairs.

    Attributes:
        method: dpo, cpo or orpo.
        prompts: tokens of every prompt.
        completions: tokens of every (chosen, rejected).
        name: of the lengths.
        base: makes the model; None: the small llama of these sizes.
        recomputed: ours with gradient checkpointing.
        limit: GB above what was there before that ours may hold; 0 = any.
    """

    method: str
    prompts: Sequence[int]
    completions: Sequence[tuple[int, int]]
    name: str
    hidden: int = 256
    layers: int = 6
    vocabulary: int = 16000
    base: Callable[[], nn.Module] | None = None
    recomputed: bool = False
    limit: float = 0.0


def cases(pairs: int) -> list[Case]:
    """Fixed lengths, and a mix of lengths."""
    fixed = [(f"P={p} C={c}", [p] * pairs, [(c, c)] * pairs) for p, c in ((32, 128), (128, 128), (384, 64))]
    return [Case(method, p, c, name) for name, p, c in [*fixed, mixed(pairs)] for method in METHODS]


def gpu_cases() -> list[Case]:
    """DPO of 8 pairs, Qwen3-0.6B's shape, bfloat16."""
    plain = [
        Case("dpo", [p] * 8, [(c, c)] * 8, f"Qwen3-0.6B shape, 8 pairs, P={p} C={c}", vocabulary=151936, base=qwen3_600m)
        for p in (384, 1024)
        for c in (64, 128)
    ]
    lean = [evolve(case, name=f"{case.name}, ours with checkpointing", recomputed=True) for case in plain]
    return plain + lean + [evolve(case, name=f"{case.name} and 4 GB", limit=4.0) for case in lean]


def mixed(pairs: int) -> tuple[str, list[int], list[tuple[int, int]]]:
    """Log-normal lengths, medians 150 and 80, as in dialogues."""
    rng = np.random.default_rng(0)
    prompts = np.exp(rng.normal(np.log(150), 0.6, pairs)).clip(16, 512).astype(int).tolist()
    completions = np.exp(rng.normal(np.log(80), 0.6, (pairs, 2))).clip(8, 256).astype(int).tolist()
    return "mixed lengths", prompts, [(a, b) for a, b in completions]


def quick_cases() -> list[Case]:
    """The same in seconds, to see that it runs: its numbers mean nothing."""
    sizes = {"hidden": 64, "layers": 2, "vocabulary": 512}
    return [Case(method, [24, 20], [(8, 8)] * 2, "quick, P=24 C=8", **sizes) for method in METHODS]


# --- the same for both ----------------------------------------------------------------------------


def make_model(case: Case) -> nn.Module:
    """The same weights at every call; the adapters' update is not 0, so that policy and reference differ."""
    base = case.base() if case.base else small_llama(hidden=case.hidden, layers=case.layers, vocabulary=case.vocabulary)
    model = prepare(base, AdapterOptions(num_layers=-1, rank=8, scale=2.0))
    if not case.base:
        model.lm_head.weight *= 8  # else every token's log-probability is -log V, and nothing could be seen of a wrong one
    model.update(tree_map(lambda p: p + 0.01 * mx.random.normal(p.shape), model.trainable_parameters()))
    mx.eval(model.parameters())
    return model.train()


def make_pairs(case: Case) -> list[Pair]:
    """Random tokens of the case's lengths."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, case.vocabulary, n) for n in case.prompts]
    sides = [[rng.integers(1, case.vocabulary, n) for n in lengths] for lengths in case.completions]
    return [Pair(*(_example(p, c) for c in both)) for p, both in zip(prompts, sides, strict=True)]


def _example(prompt: np.ndarray, completion: np.ndarray) -> Example:
    tokens = np.concatenate([prompt, completion]).astype(np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "random")


def definition(case: Case, pairs: Sequence[Pair]) -> float:
    """The loss from log-probabilities of each row by itself, without padding."""
    model = make_model(case)
    policy = [_plain(model, pair) for pair in pairs]
    with disabled(model):
        reference = [_plain(model, pair) for pair in pairs]
    chosen, rejected = ([side[i] for side in policy] for i in (0, 1))
    if case.method == "orpo":
        odds = [np.mean(side) - np.log1p(-np.exp(np.mean(side))) for side in chosen + rejected]
        margins = np.array(odds[: len(pairs)]) - odds[len(pairs) :]
        return -np.concatenate(chosen).mean() + 0.1 * np.logaddexp(0, -margins).mean()
    zero = case.method == "cpo"
    sums = [sum(sign * (p.sum() - (0 if zero else r.sum())) for sign, p, r in zip((1, -1), ps, rs, strict=True))
            for ps, rs in zip(policy, reference, strict=True)]  # fmt: skip
    return np.logaddexp(0, -0.1 * np.array(sums)).mean()


def _plain(model: nn.Module, pair: Pair) -> list[np.ndarray]:
    """[C] log-probabilities of either completion."""
    found = []
    for e in (pair.chosen, pair.rejected):
        at, tokens = np.flatnonzero(e.loss_mask), mx.array(e.tokens)
        logits = model(tokens[None, :-1])[0, mx.array(at - 1)].astype(mx.float32)
        found.append(-np.array(nn.losses.cross_entropy(logits, tokens[mx.array(at)])).astype(np.float64))
    return found


# --- ours -----------------------------------------------------------------------------------------

Step = Callable[[], Any]


def our_step(case: Case, pairs: Sequence[Pair], *, share: bool) -> tuple[Step, float]:
    """(a step, the loss before the first)."""
    batch = pair_batch(pairs, share=share).batch
    model = make_model(case)
    step = make_step(checkpointed(model) if case.recomputed else model, optim.Adam(learning_rate=1e-5), METHODS[case.method])
    return partial(limited, case.limit, partial(step, batch)), step(batch)["loss"].item()


def our_reference(case: Case, pairs: Sequence[Pair], *, share: bool) -> tuple[list[Pair], Step | None]:
    """The pairs with the column that the method needs, and what computing it takes."""
    if "ref_logps" not in METHODS[case.method].needs:
        return list(pairs), None
    model = make_model(case).eval()
    flat = [e for pair in pairs for e in (pair.chosen, pair.rejected)]
    with disabled(model):
        score = scorer(model)
    run = mx.compile(partial(score, gradient=False))
    batch = pair_batch(pairs, share=share).batch

    def again() -> None:
        with disabled(model):
            mx.eval(run(batch)[0])

    with disabled(model):
        logps = iter(log_probabilities(flat, score, len(flat)))
    columns = [(next(logps), next(logps)) for _ in pairs]
    loss_mask = [
        Pair(evolve(p.chosen, ref_logps=c), evolve(p.rejected, ref_logps=r)) for p, (c, r) in zip(pairs, columns, strict=True)
    ]
    return loss_mask, again


# --- theirs ---------------------------------------------------------------------------------------


def their_step(case: Case, pairs: Sequence[Pair]) -> tuple[Step, float] | None:
    """The same with mlx-lm-lora: this is the step that its trainers compile; None if it is not installed."""
    if dpo_trainer is None:
        return None
    model, optimizer = make_model(case), optim.Adam(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(model, THEIRS[case.method](model, case))
    batch = next(their_batches(case, pairs))

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: tuple[mx.array, ...]) -> tuple[Any, ...]:
        (value, reward, tokens, _), grad = loss_and_grad(*batch)
        optimizer.update(model, grad)
        return value, reward, tokens

    def run() -> float:
        out = step(batch)
        mx.eval(state, out)
        return out[0].item()

    return run, run()


def their_batches(case: Case, pairs: Sequence[Pair]) -> Any:
    """Their iterator over one batch."""
    rows = [
        {
            "chosen": p.chosen.tokens.tolist(),
            "rejected": p.rejected.tokens.tolist(),
            "chosen_prompt_length": int(p.chosen.loss_mask.argmax()),
            "rejected_prompt_length": int(p.rejected.loss_mask.argmax()),
        }
        for p in pairs
    ]
    trainer = {"dpo": dpo_trainer, "cpo": cpo_trainer, "orpo": orpo_trainer}[case.method]
    return getattr(trainer, f"iterate_{case.method}_batches")(rows, len(rows), 2048)


def _their_dpo(model: nn.Module, case: Case) -> Callable[..., Any]:
    """`loss_wrapper` of `train_dpo`: the policy, and a second model as the reference, on either side."""
    reference = make_model(case).eval()
    for layer in (m for m in reference.modules() if hasattr(m, "lora_b")):
        layer.lora_b = mx.zeros_like(layer.lora_b)  # the base
    token_scores, total = dpo_trainer.get_token_scores, dpo_trainer.compute_score

    def loss(chosen: mx.array, rejected: mx.array, chosen_masks: mx.array, rejected_masks: mx.array) -> Any:
        sides = (chosen, chosen_masks), (rejected, rejected_masks)
        policy = [total(token_scores(model, x, mask), mask, "sigmoid") for x, mask in sides]
        fixed = [total(mx.stop_gradient(token_scores(reference, x, mask)), mask, "sigmoid") for x, mask in sides]
        return dpo_trainer.dpo_loss(*policy, *fixed, chosen_masks, rejected_masks, beta=0.1, delta=50.0, loss_type="sigmoid")

    return loss


def _their_cpo(model: nn.Module, _: Case) -> Callable[..., Any]:
    return lambda *batch: cpo_trainer.cpo_loss_from_model(model, *batch, beta=0.1, delta=50.0)


def _their_orpo(model: nn.Module, _: Case) -> Callable[..., Any]:
    return lambda *batch: orpo_trainer.orpo_loss_from_model(model, *batch, beta=0.1)


THEIRS = {"dpo": _their_dpo, "cpo": _their_cpo, "orpo": _their_orpo}


# --- the table ------------------------------------------------------------------------------------


def measure(case: Case, repetitions: int, *, share: bool | None = None) -> dict[str, Any]:
    """One row of the table."""
    raw = make_pairs(case)
    chosen = pays(*read_positions((p.chosen, p.rejected) for p in raw)) if share is None else share
    pairs, reference = our_reference(case, raw, share=chosen)
    (ours, our_loss), (whole, _), theirs = (
        our_step(case, pairs, share=chosen),
        our_step(case, pairs, share=False),
        their_step(case, pairs),
    )
    steps = {"ours": ours, "whole": whole, "peer": theirs and theirs[0], "reference": reference}
    steps = {name: step for name, step in steps.items() if step}
    for step in steps.values():
        step()
    costs = dict(zip(steps, interleaved(list(steps.values()), repetitions), strict=True))
    exact, our, peer = definition(case, pairs), costs["ours"], costs.get("peer")
    loss_mask = costs["reference"].wall if "reference" in costs else 0.0
    row = dict.fromkeys(COLUMNS, "-") | {
        "case": f"{case.method}, {case.name}",
        "layout": "shared" if chosen else "whole",
        "ours": round(our.wall, 4),
        "whole": round(costs["whole"].wall, 4),
        "sharing_ratio": round(costs["whole"].wall / our.wall, 2),
        "ours_mb": round(our.peak / 1e6, 1),
        "ours_error": f"{abs(our_loss / exact - 1):.0e}",
    }
    if peer and theirs:
        row |= {
            **ratios(our, peer),
            "peer": round(peer.wall, 4),
            "cpu_ratio": round(peer.cpu / our.cpu, 2),
            "with_reference": round(peer.wall / (our.wall + loss_mask), 2),
            "peer_error": f"{abs(theirs[1] / exact - 1):.0e}",
        }
    return row


def main() -> None:
    parser = flags(__doc__, repetitions=7)
    parser.add_argument("--pairs", type=int, default=4, help="in a batch")
    parser.add_argument("--share", action=argparse.BooleanOptionalAction, help="our layout; what a run would choose if not given")
    options = parsed(parser)
    if dpo_trainer is None:
        print("mlx-lm-lora is not installed, so only ours is measured: pip install --no-deps mlx-lm-lora==5.10.2 tqdm")
    full = cases(options.pairs) if mx.default_device() == mx.Device(mx.cpu) else gpu_cases()
    todo = quick_cases() if options.quick else full
    run(todo, partial(measure, share=options.share), COLUMNS, options, lambda case: f"{case.method}, {case.name}")


if __name__ == "__main__":
    main()
