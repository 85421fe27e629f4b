"""Laws of objectives: properties that hold for every one of them, whatever it computes."""

from functools import reduce
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.errors import InputError
from mlxlora.objectives.grpo import IMPORTANCE_LEVELS, cispo, dapo, dr_grpo, grpo, gspo, policy_losses
from mlxlora.objectives.kto import KTO_SCORES, kto
from mlxlora.objectives.links import F_DIVERGENCES
from mlxlora.objectives.objective import Objective, token_mean, watch
from mlxlora.objectives.preference import cpo, dpo, orpo, simpo, xpo
from mlxlora.objectives.supervised import SFT_LOSSES, distill, sft
from mlxlora.objectives.surrogates import kl, reinforce
from mlxlora.objectives.terms import entropy, nll
from tests.support.loss_types import loss_types
from tests.support.random_batches import Row, build, by_row, gradient, rows, swapped, unwatched

GRPO_LOSSES = loss_types(grpo)

SMOOTHED = {"exo_pair": 0.1, "robust": 0.1, "sigmoid": 0.1}
GRPO = {
    f"grpo:{name}:{level}": grpo(loss_type=name, importance_level=level, beta=0.1)
    for name in GRPO_LOSSES
    for level in IMPORTANCE_LEVELS
}
OBJECTIVES: dict[str, Objective] = {
    "distill": distill(nll_weight=0.5),
    **{f"sft:{name}": sft(loss_type=name) for name in SFT_LOSSES},
    **{f"dpo:{name}": dpo(loss_type=name, label_smoothing=SMOOTHED.get(name, 0.0)) for name in loss_types(dpo) if name != "nll"},
    **{f"dpo:f:{name}": dpo(f_divergence=name) for name in F_DIVERGENCES},
    "dpo:ld": dpo(ld_alpha=0.3),
    "dpo:ld:ipo": dpo(loss_type="ipo", ld_alpha=0.3),
    "dpo:wpo": dpo(wpo=True),
    "dpo:mpo": dpo(loss_type="0.8*sigmoid+0.2*bco_pair+1.0*nll", wpo=True),
    **{f"cpo:{name}": cpo(loss_type=name) for name in loss_types(cpo)},
    "xpo": xpo(alpha=0.2),
    "simpo": simpo(),
    "alphapo": simpo(reward_alpha=0.25),
    "orpo": orpo(),
    "orpo:prompt": orpo(nll_on_prompt=True),
    **{f"kto:{name}": kto(loss_type=name, undesirable_weight=1.5) for name in KTO_SCORES},
    **GRPO,
    "grpo:delta": grpo(delta=1.3, epsilon_high=0.28),
    "grpo:correct_kl": grpo(correct_kl=True),
    "grpo:top_entropy": grpo(top_entropy=0.4),
    "grpo:off_policy": grpo(off_policy_threshold=0.05),
    "grpo:entropy": grpo(entropy_coef=0.01),
    "gspo": gspo(),
    "dr_grpo": dr_grpo(),
    "dapo": dapo(),
    "cispo": cispo(),
}
OF_THE_WHOLE_BATCH = {  # these are defined on a batch, so its parts are something else
    "dpo:aot": "sorts over the batch",
    "dpo:aot_unpaired": "sorts over the batch",
    "grpo:bnpo:token": "token mean of each micro-batch",
    "grpo:bnpo:sequence": "token mean of each micro-batch",
    "grpo:top_entropy": "quantile over the batch",
}
STEP = 3e-3  # nats
every = pytest.mark.parametrize("objective", [pytest.param(o, id=name) for name, o in OBJECTIVES.items()])
anything = settings(deadline=None, max_examples=4, derandomize=True)


def near(ours: Any, theirs: Any, rtol: float = 1e-4, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


# --- what may not matter ------------------------------------------------------------------------


@every
@given(seed=st.integers(0, 99), layout=st.permutations(range(6)))
@anything
def test_row_order_changes_nothing(objective: Objective, seed: int, layout: list[int]) -> None:
    logps, batch = build(rows(seed))
    moved, other = build(rows(seed), layout=layout)
    (loss, grad), (moved_loss, moved_grad) = gradient(objective, logps, batch), gradient(objective, moved, other)
    near(moved_loss, loss)
    for ours, theirs in zip(by_row(moved_grad, other), by_row(grad, batch), strict=True):
        near(ours, theirs)


@every
@given(seed=st.integers(0, 99), order=st.permutations(range(3)))
@anything
def test_sequence_order_changes_nothing(objective: Objective, seed: int, order: list[int]) -> None:
    given_rows = rows(seed)
    logps, batch = build(given_rows)
    moved, other = build(swapped(given_rows, order))
    (loss, grad), (moved_loss, moved_grad) = gradient(objective, logps, batch), gradient(objective, moved, other)
    near(moved_loss, loss)
    there = by_row(moved_grad, other)
    here = by_row(grad, batch)
    for place, pair in enumerate(order):
        near(there[place], here[pair])
        near(there[3 + place], here[3 + pair])


@every
@given(seed=st.integers(0, 99), filler=st.integers(1, 20))
@anything
def test_bucket_filler_changes_nothing(objective: Objective, seed: int, filler: int) -> None:
    logps, batch = build(rows(seed))
    loss, grad = gradient(objective, logps, batch)
    filled_loss, filled_grad = gradient(objective, *build(rows(seed), filler=filler))
    near(filled_loss, loss)
    near(filled_grad[:-filler], grad)
    assert not filled_grad[-filler:].any()


@every
def test_every_objective_compiles(objective: Objective) -> None:
    """Traced and simplified, not run: building the kernels of all of them takes a minute the first time."""
    logps, batch = build(rows(1), filler=3)
    loss, grad = mx.compile(mx.value_and_grad(lambda logps, batch: objective(logps, batch)[0]))(logps, batch)
    assert (loss.shape, grad.shape) == ((), logps.shape)


def test_equal_terms_compile() -> None:
    """A bonus on the entropy that is also watched; any two terms that compute the same."""
    logps, batch = build(rows(1), filler=3)
    for objective in (OBJECTIVES["grpo:entropy"], nll(name="a") + nll(name="b"), grpo(loss_type="dapo", beta=0.1)):
        compiled = mx.compile(lambda logps, batch, objective=objective: objective(logps, batch)[1])(logps, batch)
        eager = objective(logps, batch)[1]
        near([compiled[k].item() for k in eager], [v.item() for v in eager.values()])


@pytest.mark.parametrize("name", ["sft:dft", "dpo:mpo", "gspo"])
def test_compiled_is_eager(name: str) -> None:
    objective = OBJECTIVES[name]
    logps, batch = build(rows(1), filler=3)
    compiled = mx.compile(mx.value_and_grad(lambda logps, batch: objective(logps, batch)[0]))
    loss, grad = gradient(objective, logps, batch)
    compiled_loss, compiled_grad = compiled(logps, batch)
    near(compiled_loss.item(), loss)
    near(np.array(compiled_grad), grad)


@every
def test_a_metric_changes_no_gradient(objective: Objective) -> None:
    logps, batch = build(rows(2))
    loss, grad = gradient(objective, logps, batch)
    watching = objective + watch("watched", lambda logps, batch: mx.exp(logps), token_mean())
    for other in (unwatched(objective), watching):
        other_loss, other_grad = gradient(other, logps, batch)
        assert other_loss == loss
        np.testing.assert_array_equal(other_grad, grad)


# --- what an objective is -----------------------------------------------------------------------


@every
def test_gradients_are_linear(objective: Objective) -> None:
    logps, batch = build(rows(3))
    other = nll(name="other")
    loss, grad = gradient(objective, logps, batch)
    other_loss, other_grad = gradient(other, logps, batch)
    sum_loss, sum_grad = gradient(0.5 * objective + 3.0 * other, logps, batch)
    near(sum_loss, 0.5 * loss + 3 * other_loss)
    near(sum_grad, 0.5 * grad + 3 * other_grad)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name not in OF_THE_WHOLE_BATCH])
def test_micro_batches_make_one_batch(name: str) -> None:
    objective, whole = OBJECTIVES[name], rows(4, pairs=4)
    logps, batch = build(whole)
    loss, metrics = objective(logps, batch)
    grad = by_row(gradient(objective, logps, batch)[1], batch)
    places = [[0], [1, 3], [2]]
    micros = [build(swapped(whole, place), filler=2) for place in places]
    counts = reduce(lambda a, b: {k: a[k] + b[k] for k in a}, [objective.counts(b) for _, b in micros])
    parts = [objective(x, b, counts) for x, b in micros]
    near(sum(part.item() for part, _ in parts), loss.item())
    for key in metrics:
        near(sum(m[key].item() for _, m in parts), metrics[key].item())
    for place, (x, b) in zip(places, micros, strict=True):
        micro = mx.grad(lambda x, b=b: objective(x, b, counts)[0])(x)
        for i, row in enumerate(by_row(np.array(micro), b)):
            near(row, grad[place[i % len(place)] + 4 * (i // len(place))])


@every
def test_gradient_is_the_limit_of_differences(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 (whose exp is good to 1e-7 in mlx), with what `stop_gradient` returned at the point held fixed."""
    with mx.stream(mx.cpu):
        logps, batch = build(rows(5), dtype=mx.float64)
        grad = mx.grad(lambda logps: objective(logps, batch)[0])(logps)
        held, stop = [], mx.stop_gradient
        with monkeypatch.context() as patch:
            patch.setattr(mx, "stop_gradient", lambda x: held.append(stop(x)) or held[-1])
            objective(logps, batch)

        def at(moved: mx.array) -> float:
            constants = iter(held)
            with monkeypatch.context() as patch:
                patch.setattr(mx, "stop_gradient", lambda _: next(constants))
                return objective(moved, batch)[0].item()

        for seed in range(3):
            along = mx.array(np.random.default_rng(seed).normal(size=logps.shape), mx.float64)
            small, large = ((at(logps + h * along) - at(logps - h * along)) / (2 * h) for h in (STEP, 2 * STEP))
            difference = (4 * small - large) / 3  # without the term of h², so that steps may be longer than exp's rounding
            near((grad * along).sum().item(), difference, rtol=1e-4, atol=1e-5)


# --- at the edges -------------------------------------------------------------------------------


def one_token(logps: list[float], ref: float | None = None, old: float | None = None) -> list[Row]:
    """One-token completions; the reference and the old policy are the policy itself where None."""

    def row(x: float, advantage: float) -> Row:
        columns = {"logps": x, "ref_logps": x if ref is None else ref, "old_logps": x if old is None else old}
        known = {"entropy": 1.0, "log_sum_sq_probs": -1.0, "divergence": 1.0}
        return Row({k: np.array([v]) for k, v in (columns | known).items()}, np.array([False]), advantage)

    return [row(x, (-1.0) ** i) for i, x in enumerate(logps)]


EDGES = {
    "certain against impossible": [-1e-9, -1e4],
    "impossible against certain": [-1e4, -1e-9],
    "both certain": [-1e-9, -1e-9],
    "both impossible": [-1e4, -1e4],
    "identical": [-1.5, -1.5],
    "exactly one": [0.0, 0.0],
}


@every
@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
@pytest.mark.parametrize("others", [{}, {"ref": -1.0}, {"ref": -1.0, "old": -1.0}, {"ref": -1e4, "old": -1e4}], ids=str)
def test_extremes_are_finite(objective: Objective, edge: list[float], others: dict[str, float]) -> None:
    logps, batch = build(one_token(edge, **others))
    loss, grad = gradient(objective, logps, batch)
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()
    assert np.isfinite(np.square(grad).sum())


@every
def test_an_empty_completion_is_finite(objective: Objective) -> None:
    """A completion cut at the length limit keeps its place and loses its tokens."""
    given_rows = rows(6)
    empty = {name: column[:0] for name, column in given_rows[1].columns.items()}
    given_rows[1] = Row(empty, np.zeros(0, bool), 1.0)
    loss, grad = gradient(objective, *build(given_rows))
    assert np.isfinite(loss)
    assert np.isfinite(grad).all()


# --- what theory says ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"])
def test_dpo_at_its_reference_is_log_two(name: str) -> None:
    logps, batch = build(rows(7))
    loss, metrics = dpo(loss_type=name)(logps, batch._replace(ref_logps=logps))
    assert loss.item() == pytest.approx(np.log(2), rel=1e-6)
    assert metrics["rewards/margins"].item() == 0
    assert metrics["rewards/accuracies"].item() == 0.5  # ties
    noise = 1 + 2e-7 * mx.array(np.random.default_rng(0).normal(size=logps.shape), mx.float32)
    _, metrics = dpo(loss_type=name)(logps * noise, batch._replace(ref_logps=logps))
    assert metrics["rewards/margins"].item() != 0 and metrics["rewards/accuracies"].item() == 0.5


@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("name", GRPO_LOSSES)
@pytest.mark.parametrize("known", [True, False], ids=["old=policy", "old=None"])
def test_on_policy_gradient_is_reinforce(name: str, level: str, known: bool) -> None:
    logps, batch = build(rows(8), filler=2)
    batch = batch._replace(old_logps=logps if known else None)
    _, reduction = policy_losses()[name]
    _, grad = gradient(grpo(loss_type=name, importance_level=level, beta=0.0), logps, batch)
    near(grad, gradient(reinforce(per=reduction), logps, batch)[1])


@pytest.mark.parametrize("name", [*GRPO, "gspo", "dapo", "grpo:top_entropy"])
def test_equal_rewards_teach_nothing(name: str) -> None:
    logps, batch = build(rows(9))
    objective = OBJECTIVES[name]
    alone = Objective(tuple((c, t) for c, t in objective.terms if t.name != "kl_penalty"))
    loss, grad = gradient(alone, logps, batch._replace(advantages=mx.zeros_like(batch.advantages)))
    assert loss == 0
    assert not grad.any()


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_k3_is_a_divergence(seed: int) -> None:
    logps, batch = build(rows(seed))
    estimate = kl().terms[0][1].values
    assert (estimate(logps, batch) >= 0).all().item()
    assert not estimate(logps, batch._replace(ref_logps=logps)).any().item()
    assert not gradient(kl(), logps, batch._replace(ref_logps=logps))[1].any()


def test_entropy_bonus_has_the_gradient_of_the_mean_entropy() -> None:
    logps, batch = build(rows(10), filler=2)
    objective = grpo(entropy_coef=0.01, beta=0.0)
    grad = np.array(mx.grad(lambda h: objective(logps, batch._replace(entropy=h))[0])(batch.entropy))
    completion = np.array((batch.sequence < batch.sequences) & ~batch.prompt)
    near(grad, np.where(completion, -0.01 / completion.sum(), 0))
    assert entropy().needs == {"entropy"}


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (sft(), set()),
        (dpo(), {"ref_logps"}),
        (dpo(loss_type="aot"), {"ref_logps"}),
        (dpo(wpo=True), {"ref_logps", "log_sum_sq_probs"}),
        (distill(), {"divergence"}),
        (xpo(), {"ref_logps", "from_reference"}),
        (cpo(), set()),
        (orpo(), set()),
        (kto(), {"ref_logps", "label", "reference_point"}),
        (kto(loss_type="apo_zero_unpaired"), {"ref_logps", "label"}),
        (grpo(beta=0.0), {"advantages", "entropy"}),
        (grpo(beta=0.1), {"advantages", "entropy", "ref_logps"}),
    ],
)
def test_an_objective_knows_its_needs(objective: Objective, needs: set[str]) -> None:
    assert objective.needs == needs
    logps, batch = build(rows(11))
    optional = {"old_logps", "preference_score"}
    columns = {"ref_logps", "advantages", "entropy", "log_sum_sq_probs", "divergence", *optional}
    columns |= {"label", "reference_point", "from_reference"}
    bare = batch._replace(**dict.fromkeys(columns - needs))
    assert np.isfinite(gradient(objective, logps, bare)[0])
    for name in needs:
        with pytest.raises(ValueError, match=f"needs batch.{name}"):
            objective(logps, batch._replace(**{name: None}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sft(loss_type="x"), "--loss-type must be one of nll, dft, got 'x'"),
        (lambda: dpo(loss_type="sigmoid+x"), "--loss-type must be one of sigmoid, .*, nll, got 'x'"),
        (lambda: dpo(loss_type="0.5*sigmoid+sigmoid"), "names sigmoid twice"),
        (lambda: dpo(loss_type="a*sigmoid"), "got the weight 'a'"),
        (lambda: dpo(loss_type=""), "got ''"),
        (lambda: dpo(f_divergence="x"), "--f-divergence must be one of reverse_kl, forward_kl, js, alpha, got 'x'"),
        (lambda: dpo(ld_alpha=1.5), r"ld_alpha must be in \[0, 1\], got 1.5"),
        (lambda: dpo(label_smoothing=0.5), r"label_smoothing .* got 0.5"),
        (lambda: dpo(loss_type="ipo", beta=0.0), "beta must be > 0, got 0.0"),
        (lambda: dpo(loss_type="discopop", discopop_tau=0.0), "tau <= 1, got 0.0"),
        (lambda: cpo(loss_type="x"), "--loss-type must be one of sigmoid, hinge, ipo, dpop, simpo, got 'x'"),
        (lambda: kto(loss_type="x"), "--loss-type must be one of kto, apo_zero_unpaired, got 'x'"),
        (lambda: grpo(loss_type="x"), "--loss-type must be one of grpo, .*, got 'x'"),
        (lambda: grpo(top_entropy=0.0), r"top_entropy must be in \(0, 1\], got 0.0"),
        (lambda: grpo(importance_level="x"), "--importance-level must be one of token, sequence, got 'x'"),
    ],
)
def test_bad_input_is_named(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
