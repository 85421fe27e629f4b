"""DPO, CPO, ORPO and KTO against TRL: loss, loss of every pair, rewards, metrics, gradient of every log-probability."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.batch import Batch
from mlxlora.objectives import losses
from mlxlora.objectives.kto import kto
from mlxlora.objectives.objective import Objective
from mlxlora.objectives.preference import cpo, dpo, orpo
from mlxlora.objectives.scores import log_odds, log_ratio
from tests.support.goldens import GOLDENS, cases, close, evaluate, flat_batch, grid, present, values

pytestmark = present

DIFFERENT = {
    "sigmoid_b0.1_ls0.1_ignored": "TRL ignores label smoothing in DPO's sigmoid; ours applies it, as cDPO does "
    "(test_sigmoid_is_smoothed checks the formula, and that without smoothing it is TRL's number)",
}
NOT_MEANS = {"rewards/margins": "KTO's is a difference of two means over different completions"}
DIVERGENCE = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
NAMES = {"sft": "nll"}


def preferences(*, prompts: bool = False) -> tuple[np.ndarray, Batch, np.ndarray]:
    given = GOLDENS["preference_inputs"]
    both = {k: grid(given[k.format("chosen")], given[k.format("rejected")]) for k in (
        "policy_{}_logps", "ref_{}_logps", "policy_{}_log_sum_sq_probs", "{}_completion_mask", "{}_attention_mask"
    )}  # fmt: skip
    batch, loss_mask = flat_batch(
        both["{}_completion_mask"],
        both["{}_attention_mask"] if prompts else None,
        ref_logps=both["ref_{}_logps"],
        log_sum_sq_probs=both["policy_{}_log_sum_sq_probs"],
    )
    return both["policy_{}_logps"], batch, loss_mask


def dpo_of(config: dict[str, Any]) -> Objective:
    types = [NAMES.get(name, name) for name in config["loss_type"]]
    weights = config.get("loss_weights", [1.0] * len(types))
    options = {k: config[k] for k in ("beta", "label_smoothing", "discopop_tau", "ld_alpha") if k in config}
    return dpo(
        loss_type="+".join(f"{w}*{t}" for w, t in zip(weights, types, strict=True)),
        f_divergence=DIVERGENCE.get(config.get("f_divergence_type", ""), "reverse_kl"),
        f_alpha=config.get("f_alpha_divergence_coef", 0.5),
        wpo=config.get("use_weighting", False),
        **options,
    )


def cpo_of(config: dict[str, Any]) -> Objective:
    if config["loss_type"] == "alphapo":  # TRL's name for simpo without the NLL and with a reward shape
        config = config | {"loss_type": "simpo", "cpo_alpha": 0.0}
    names = {"cpo_alpha": "alpha", "simpo_gamma": "gamma", "alpha": "reward_alpha"}
    return cpo(**{names.get(k, k): v for k, v in config.items()})


def pair_grid(case: dict[str, Any]) -> np.ndarray:
    return grid(case["grad_policy_chosen"], case["grad_policy_rejected"])


def check(case: dict[str, Any], objective: Objective, given: tuple[np.ndarray, Batch, np.ndarray]) -> dict[str, float]:
    loss, metrics, gradient = evaluate(objective, *given)
    close(loss, case["loss"])
    close(gradient, pair_grid(case), operands=np.abs(gradient).max())
    rewarded = case["config"]["beta"] * np.abs([case["chosen_logps"], case["rejected_logps"]]).max()
    for name, value in case["metrics"].items():
        if name != "nll_loss" or value:  # TRL reports 0 where it did not compute it
            close(metrics[name], value, operands=rewarded)
    for name, key in (("rewards/chosen", "chosen_rewards"), ("rewards/rejected", "rejected_rewards")):
        close(values(objective, name, *given), case[key], operands=rewarded)
    for name, key in (("logps/chosen", "chosen_logps"), ("logps/rejected", "rejected_logps")):
        close(values(objective, name, *given), case[key])
    return metrics


@pytest.mark.parametrize("case", cases("dpo", but=DIFFERENT))
def test_dpo(case: dict[str, Any]) -> None:
    objective, given = dpo_of(case["config"]), preferences()
    check(case, objective, given)
    if len(case["config"]["loss_type"]) == 1 and case["config"]["loss_type"] != ["sft"]:
        close(values(objective, case["config"]["loss_type"][0], *given), case["per_sample_loss"])


@pytest.mark.parametrize("case", cases("cpo"))
def test_cpo(case: dict[str, Any]) -> None:
    objective, given = cpo_of(case["config"]), preferences()
    check(case, objective, given)
    close(values(objective, case["config"]["loss_type"].replace("alphapo", "simpo"), *given), case["per_sample_loss"])


@pytest.mark.parametrize("case", cases("orpo"))
def test_orpo(case: dict[str, Any]) -> None:
    beta = case["config"]["beta"]
    objective, given = orpo(beta=beta, nll_on_prompt=True), preferences(prompts=True)
    check(case, objective, given)
    close(-beta * values(objective, "odds_ratio", *given), case["per_sample_loss"])
    close(values(objective, "log_odds_chosen", *given), case["log_odds"])
    close(values(objective, "log_odds_ratio", *given), case["log_sigmoid_log_odds"])


def labeled() -> tuple[np.ndarray, Batch, np.ndarray]:
    """Completions with their labels, and the reference point of TRL's mismatched log-probabilities."""
    logps, batch, loss_mask = preferences()
    given = GOLDENS["kto_inputs"]
    mismatched = np.roll(loss_mask, 1, axis=0)  # the mask of the completion before
    ratios = np.where(mismatched, grid(given["kl_policy_logps"]) - grid(given["kl_ref_logps"]), 0).sum(axis=1)
    point = mx.full((len(ratios),), max(float(ratios.mean()), 0.0))
    return logps, batch._replace(label=mx.array(grid([given["labels"]])[0] > 0), reference_point=point), loss_mask


@pytest.mark.parametrize("case", cases("kto"))
def test_kto(case: dict[str, Any]) -> None:
    objective, given = kto(**case["config"]), labeled()
    loss, metrics, gradient = evaluate(objective, *given)
    close(loss, case["loss"])
    close(gradient, case["grad_policy"], operands=np.abs(gradient).max())
    for name in set(case["metrics"]) - set(NOT_MEANS):
        close(metrics.get(name, 0.0), case["metrics"][name])  # without a reference point TRL's kl is 0
    each = values(objective, case["config"]["loss_type"], *given)
    (weights,) = (t.weights(given[1])[0] for _, t in objective.terms if t.name == case["config"]["loss_type"])
    label, each = np.array(given[1].label), each * np.array(weights)
    close(np.concatenate([each[label], each[~label]]), case["losses_desirable_then_undesirable"], operands=1.0)  # TRL: 1 - σ


def test_sigmoid_is_smoothed() -> None:
    (case,) = (c for c in GOLDENS["dpo"] if c["name"] in DIFFERENT)
    logps, batch, loss_mask = preferences()
    loss, *_ = evaluate(dpo(beta=0.1, label_smoothing=0.1), logps, batch, loss_mask)
    margins = 0.1 * np.subtract(*np.split(np.array(log_ratio(mx.array(logps[loss_mask]), batch)), 2))
    close(loss, np.mean(0.9 * np.logaddexp(0, -margins) + 0.1 * np.logaddexp(0, margins)))
    close(evaluate(dpo(beta=0.1), logps, batch, loss_mask)[0], case["loss"])


def test_odds_ratio_from_one_to_nothing() -> None:
    golden = GOLDENS["orpo_odds_ratio"]
    averages = grid(golden["chosen_avg_logps"], golden["rejected_avg_logps"])[:, None]
    batch, loss_mask = flat_batch(np.ones_like(averages))
    objective, beta = orpo(beta=0.1), golden["config"]["beta"]
    odds = beta * Objective(tuple((1.0, t) for _, t in objective.terms if t.name == "odds_ratio"))
    _, _, gradient = evaluate(odds, averages, batch, loss_mask)
    close(values(objective, "log_odds_chosen", averages, batch, loss_mask), golden["log_odds"])
    np.testing.assert_allclose(
        values(objective, "log_odds_ratio", averages, batch, loss_mask), golden["log_sigmoid_log_odds"], rtol=1e-5
    )
    close(values(objective, "rewards/chosen", averages, batch, loss_mask), golden["chosen_rewards"])
    expected = grid(golden["grad_of_minus_mean_wrt_chosen"], golden["grad_of_minus_mean_wrt_rejected"])[:, None]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_odds_ratio_at_probability_one_has_a_gradient() -> None:
    """TRL's is NaN there; so is that of every log(1 - exp(x)) whose branches both see x."""
    batch, loss_mask = flat_batch(np.ones((2, 1)))
    logps = np.array([[-1e-9], [-3.0]], np.float32)
    _, metrics, gradient = evaluate(orpo(beta=0.1), logps, batch, loss_mask)
    assert np.isfinite(gradient).all()
    assert -1e-7 < metrics["log_odds_ratio"] <= 0
    assert np.isfinite(np.array(mx.grad(lambda x: log_odds(x, batch).sum())(mx.array(logps[loss_mask])))).all()


def test_every_golden_is_reproduced_or_listed() -> None:
    names = {family: [c["name"] for c in GOLDENS[family]] for family in ("dpo", "cpo", "orpo", "kto")}
    assert {k: len(v) for k, v in names.items()} == {"dpo": 53, "cpo": 22, "orpo": 2, "kto": 3}
    reproduced = [c.id for family in names for c in cases(family, but=DIFFERENT if family == "dpo" else None)]
    assert sorted([*reproduced, *DIFFERENT]) == sorted(name for family in names.values() for name in family)


def test_exo_pair_without_smoothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing > 0, got 0\.0"):
        losses.exo_pair(beta=0.1, label_smoothing=0.0)
