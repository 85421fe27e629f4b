"""GRPO and its relatives against TRL: loss, loss of every token, metrics, gradient of every log-probability."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.batch import Batch
from mlxlora.objectives.grpo import grpo
from mlxlora.objectives.objective import Objective
from tests.support.goldens import GOLDENS, cases, close, evaluate, flat_batch, grid, present, values

pytestmark = present

NAMES = {
    "importance_sampling_level": "importance_level",
    "use_bias_correction_kl": "correct_kl",
    "top_entropy_quantile": "top_entropy",
    "off_policy_mask_threshold": "off_policy_threshold",
}
ACCUMULATION = {"gradient_accumulation_steps", "steps_per_generation"}  # not the objective's: they scale TRL's loss
SAPO = {"sapo_temperature_pos", "sapo_temperature_neg"}
NOT_MEANS = {
    "clip_ratio/low_min": "a minimum over sequences; our metrics are means, which pool over batches",
    "clip_ratio/high_max": "a maximum",
    "entropy_coef": "a constant",
}


def grpo_of(case: dict[str, Any]) -> Objective:
    config, effective = case["config"], case["effective_config"]
    options = {NAMES.get(k, k): v for k, v in config.items() if k not in ACCUMULATION | SAPO}
    options["max_completion_length"] = effective["max_completion_length"]
    options["beta"] = effective["beta"]
    options["correct_kl"] = effective["use_bias_correction_kl"]
    if options["loss_type"] == "cispo":
        options["cap"] = effective["epsilon_high"]  # TRL's bound is epsilon_high itself, the paper's 1 + epsilon_high
    if SAPO & set(config):
        options["sapo_temperatures"] = config["sapo_temperature_pos"], config["sapo_temperature_neg"]
    return grpo(**options)


def rollouts(case: dict[str, Any]) -> tuple[np.ndarray, Batch, np.ndarray]:
    """A completion cut at the length limit keeps its place in the batch and loses its tokens."""
    given = GOLDENS["grpo_inputs"]
    mask = grid(given["completion_mask"])
    if case["truncated_rows_masked"]:
        mask = mask * (1 - grid([given["truncated"]])[0][:, None])
    columns = {name: grid(given[key]) for name, key in (("ref_logps", "ref_logps"), ("entropy", "entropies"))}
    if case["uses_old_logps"]:
        columns["old_logps"] = grid(given["old_logps"])
    batch, loss_mask = flat_batch(mask, advantages=grid([given["advantages"]])[0], **columns)
    return grid(given["policy_logps"]), batch, loss_mask


def trl_scale(case: dict[str, Any]) -> float:
    """What TRL divides a micro-batch's loss by, so that a step is their sum; ours pools counts instead."""
    effective = case["effective_config"]
    accumulation, generation = effective["gradient_accumulation_steps"], effective["steps_per_generation"]
    pooled = case["config"]["loss_type"] in ("dapo", "cispo", "vespo")
    return generation / accumulation if pooled else 1 / accumulation


@pytest.mark.parametrize("case", cases("grpo"))
def test_grpo(case: dict[str, Any]) -> None:
    objective, given = grpo_of(case), rollouts(case)
    scale = trl_scale(case)
    loss, metrics, gradient = evaluate(objective, *given)
    close(scale * loss, case["loss"])
    close(scale * gradient, case["grad_policy"], operands=np.abs(gradient).max())
    for name in set(case["metrics"]) - set(NOT_MEANS):
        close(metrics[name], case["metrics"][name])


@pytest.mark.parametrize("case", [c for c in cases("grpo") if "per_token_loss_masked" in c.values[0]])
def test_grpo_of_each_token(case: dict[str, Any]) -> None:
    objective, (logps, batch, loss_mask) = grpo_of(case), rollouts(case)
    ours = np.zeros(loss_mask.shape, np.float32)
    for coefficient, t in objective.terms:
        if coefficient and t.name in ("policy_loss", "kl_penalty"):
            ours[loss_mask] += coefficient * values(objective, t.name, logps, batch, loss_mask)
    theirs = np.broadcast_to(np.array(case["per_token_loss_masked"], np.float32), loss_mask.shape)
    close(ours[loss_mask], theirs[loss_mask], operands=1.0)


def test_accumulated_micro_batches_make_the_same_gradient_without_a_scale() -> None:
    """One micro-batch of TRL's `_ga2` is half of a step; ours, given the step's counts, needs no normaliser."""
    (case,) = (c for c in GOLDENS["grpo"] if c["name"] == "grpo_ga2")
    logps, batch, loss_mask = rollouts(case)
    objective = grpo_of(case)
    counts = {name: 2 * count for name, count in objective.counts(batch).items()}

    loss, _ = objective(mx.array(logps[loss_mask]), batch, counts)
    close(loss.item(), case["loss"])


def test_every_golden_is_reproduced() -> None:
    assert len(cases("grpo")) == len(GOLDENS["grpo"]) == 72
    assert len({c.id for c in cases("grpo")}) == 72


def test_unreported_metrics_are_the_listed_ones() -> None:
    names = {t.name for c in GOLDENS["grpo"] for _, t in grpo_of(c).terms}
    assert {m for c in GOLDENS["grpo"] for m in c["metrics"]} - names == set(NOT_MEANS)
