"""A fixed GRPO batch through the model: TRL's loss, gradient norm and the gradient norm of every parameter."""

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import orjson
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load

from mlxlora.batch import Batch
from mlxlora.data.batching import collate
from mlxlora.data.tokenize import Example
from mlxlora.models.logprobs import scorer
from mlxlora.objectives.advantages import group_relative
from mlxlora.objectives.grpo import grpo
from mlxlora.objectives.objective import Objective
from mlxlora.training.step import columns_of
from tests.support.paths import SHARED

PATH = SHARED / "parity" / "curves.json"
GIVEN = orjson.loads(PATH.read_bytes())["grpo_batch"] if PATH.exists() else {"cases": []}
RTOL = 1e-4
ATOL = 1e-6  # on-policy losses are sums that cancel to 0
NAMES = {"importance_sampling_level": "importance_level", "use_bias_correction_kl": "correct_kl"}
pytestmark = pytest.mark.skipif(not PATH.exists(), reason=f"needs {PATH}")


@pytest.mark.parametrize("case", GIVEN["cases"], ids=lambda case: case["name"])
def test_loss_and_gradient_are_trls(case: dict[str, Any]) -> None:
    loss, metrics, norms = measured(case)
    np.testing.assert_allclose(loss, case["loss"], rtol=RTOL, atol=ATOL)
    np.testing.assert_allclose(np.linalg.norm(list(norms.values())), case["grad_norm"], rtol=RTOL)
    theirs = case["grad_norm_per_parameter"]
    assert norms.keys() == theirs.keys()
    np.testing.assert_allclose([norms[name] for name in theirs], list(theirs.values()), rtol=RTOL)
    means = [name for name in case["metrics"] if name in metrics and _ours(case, name)]
    np.testing.assert_allclose([metrics[m] for m in means], [case["metrics"][m] for m in means], rtol=RTOL, atol=ATOL)


def test_log_probabilities_and_entropies_are_trls() -> None:
    logps, batch = scorer(model(), columns={"entropy": False})(plain())
    count = sum(map(len, GIVEN["completion_token_ids"]))
    np.testing.assert_allclose(np.array(logps)[:count], flat("policy_per_token_logps"), rtol=RTOL, atol=1e-4)
    np.testing.assert_allclose(np.array(batch.entropy)[:count], flat("policy_entropies"), rtol=RTOL)


def test_advantages_are_trls() -> None:
    rewards = mx.array(GIVEN["rewards"]).reshape(-1, GIVEN["num_generations"])
    np.testing.assert_allclose(np.array(group_relative(rewards)).ravel(), GIVEN["batch"]["advantages"], rtol=1e-5, atol=1e-6)


def measured(case: dict[str, Any]) -> tuple[float, dict[str, float], dict[str, float]]:
    """Loss, metrics, and the norm of the gradient of every parameter."""
    objective, batch, policy = objective_of(case), batch_of(case), model()
    score = scorer(policy, temperature=case["config"].get("temperature", 1.0), columns=columns_of(objective))

    def loss(parameters: Any) -> tuple[mx.array, dict[str, mx.array]]:
        policy.update(parameters)
        return objective(*score(batch))

    before = policy.trainable_parameters()
    (value, metrics), gradient = mx.value_and_grad(loss)(before)
    policy.update(before)
    norms = {name: mx.linalg.norm(g.reshape(-1)).item() for name, g in tree_flatten(gradient)}
    return value.item(), {name: metric.item() for name, metric in metrics.items()}, norms  # type: ignore[union-attr]


def objective_of(case: dict[str, Any]) -> Objective:
    options = {NAMES.get(name, name): value for name, value in case["config"].items() if name != "temperature"}
    if options["loss_type"] == "cispo":
        options["cap"] = options["epsilon_high"]  # TRL's bound is epsilon_high itself, the paper's 1 + epsilon_high
    return grpo(**options, max_completion_length=GIVEN["max_completion_length"])


def batch_of(case: dict[str, Any]) -> Batch:
    columns = {"old_logps": "old_per_token_logps"} if case["uses_old"] else {}
    columns |= {"ref_logps": "ref_per_token_logps"} if case["uses_ref"] else {}
    batch = plain()
    filler = batch.targets.size - sum(map(len, GIVEN["completion_token_ids"]))
    return batch._replace(**{ours: mx.array(np.pad(flat(theirs), (0, filler))) for ours, theirs in columns.items()})


def plain() -> Batch:
    prompts = [ids for ids in GIVEN["prompt_token_ids"] for _ in range(GIVEN["num_generations"])]
    rows = [_example(*ids) for ids in zip(prompts, GIVEN["completion_token_ids"], strict=True)]
    return collate(rows, advantages=mx.array(GIVEN["batch"]["advantages"]))


def flat(name: str) -> np.ndarray:
    """The values at completion tokens, row after row."""
    rows = zip(GIVEN[name], GIVEN["completion_token_ids"], strict=True)
    return np.concatenate([np.array(values[: len(ids)], np.float32) for values, ids in rows])


def _example(prompt: list[int], completion: list[int]) -> Example:
    tokens = np.array(prompt + completion, np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "")


def _ours(case: dict[str, Any], name: str) -> bool:
    """Means that TRL takes of the same thing: it counts what cispo clips as our clipped surrogate does."""
    return name in ("entropy", "kl") or (case["config"]["loss_type"] != "cispo" and name.endswith("_mean"))


@cache
def model() -> nn.Module:
    return load(str(PATH.parent / "tiny_llama"))[0]
