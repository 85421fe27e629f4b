"""Named means of log-probabilities: the vocabulary that objectives are written in."""

from collections.abc import Callable

import attrs
import mlx.core as mx

from ..batch import Batch, column, completions, halves, token_sum
from .losses import LabelLoss, PairLoss
from .objective import Objective, Reduction, Selection, Term, Weights, per_pair, sequence_count, term, token_mean, watch
from .quantity import Quantity, reads
from .scores import Score, sum_logps

PairWeight = Callable[[Batch], mx.array]
_ROUNDING = 1e-6  # relative, of summed log-probabilities in float32


def nll(*, of: Selection = completions, per: Reduction = token_mean, name: str = "nll") -> Objective:
    """-log π(y_t), the mean over the tokens that `of` selects: cross entropy in nats."""
    return term(name, lambda logps, batch: -logps, per(of))


def dft(*, of: Selection = completions, per: Reduction = token_mean, name: str = "dft") -> Objective:
    """-sg(π(y_t))·log π(y_t) (Dynamic Fine-Tuning, Wu et al., 2025, https://arxiv.org/abs/2508.05629, eq. 9)."""

    def values(logps: mx.array, batch: Batch) -> mx.array:
        return -mx.stop_gradient(mx.exp(logps)) * logps

    return term(name, values, per(of))


def entropy(*, of: Selection = completions, per: Reduction = token_mean, name: str = "entropy") -> Objective:
    """-Σ_v π(v)·log π(v), the mean over tokens, in nats; subtract it for a bonus: `... - 0.01 * entropy()`."""
    return term(name, reads("entropy")(lambda logps, batch: column(batch, "entropy")), per(of))


def divergence(*, of: Selection = completions, per: Reduction = token_mean, name: str = "divergence") -> Objective:
    """D(teacher, π) over the whole vocabulary at each token, the mean over tokens, in nats; the scorer decides which D."""
    return term(name, reads("divergence")(lambda logps, batch: column(batch, "divergence")), per(of))


# --- preferences ----------------------------------------------------------------------------


def preference(score: Score, loss: PairLoss, *, name: str = "preference", weight: PairWeight | None = None) -> Objective:
    """`loss` of the scores of each (chosen, rejected) pair, the mean over pairs.

    Args:
        weight: batch -> [P], factor of each pair's loss; the count stays P.
    """

    def weights(batch: Batch) -> tuple[mx.array, mx.array]:
        ones, pairs = per_pair(batch)
        return ones if weight is None else weight(batch), pairs

    return term(name, reads(*score.needs)(lambda logps, batch: loss(*halves(score(logps, batch)))), weights)


def preference_score(batch: Batch) -> mx.array:
    """[P] or []: the pair's weight in the data; 1 where the data has none."""
    return mx.array(1.0) if batch.preference_score is None else batch.preference_score


def rewards(score: Score, *, beta: float) -> Objective:
    """Watches the implicit rewards β·score: the chosen, the rejected, their margin, and how often the chosen is higher.

    Metrics `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, each a mean over pairs.
    """
    return (
        watch_pairs("rewards/chosen", score, lambda c, r: beta * c)
        + watch_pairs("rewards/rejected", score, lambda c, r: beta * r)
        + watch_pairs("rewards/margins", score, lambda c, r: beta * (c - r))
        + watch("rewards/accuracies", accuracy(score), per_pair)
    )


def accuracy(score: Score) -> Quantity:
    """[P]: 1 where the chosen score is higher, ½ where both are equal up to rounding, 0 where the rejected is higher.

    The policy starts as the reference, so that the log-ratios of DPO are rounding errors then. Scores are equal if a change
    of the log-probabilities by a millionth could swap them.
    """

    @reads(*score.needs)
    def values(logps: mx.array, batch: Batch) -> mx.array:
        scores = score(logps, batch)
        (c, r), (of_c, of_r) = halves(scores), halves(mx.abs(score(2 * logps, batch) - scores))
        return mx.where(mx.abs(c - r) <= _ROUNDING * (of_c + of_r), 0.5, c > r)

    return values


def pair_logps(score: Score) -> Objective:
    """Watches the scores themselves: `logps/chosen` and `logps/rejected`, means over pairs."""
    return watch_pairs("logps/chosen", score, lambda c, r: c) + watch_pairs("logps/rejected", score, lambda c, r: r)


def exploration(*, name: str = "exploration") -> Objective:
    """log π(y) of the completions that the reference sampled, the mean over pairs; minimizing it moves the policy away (XPO)."""

    def weights(batch: Batch) -> tuple[mx.array, mx.array]:
        return column(batch, "from_reference"), per_pair(batch)[1]

    return term(name, reads("from_reference")(sum_logps), weights)


def watch_pairs(name: str, score: Score, loss: PairLoss) -> Objective:
    """A metric of the scores of each pair, the mean over pairs."""
    return 0.0 * preference(score, loss, name=name)


# --- completions that are good or bad on their own ----------------------------------------------


def judgment(
    score: Score, loss: LabelLoss, *, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, name: str = "judgment"
) -> Objective:
    """`loss` of the score of each completion and its label, times the weight of the label, the mean over completions."""

    def weights(batch: Batch) -> tuple[mx.array, mx.array]:
        return mx.where(column(batch, "label"), desirable_weight, undesirable_weight), sequence_count(batch)

    @reads("label", *score.needs)
    def values(logps: mx.array, batch: Batch) -> mx.array:
        return loss(score(logps, batch), column(batch, "label"))

    return term(name, values, weights)


def watch_labels(name: str, score: Score, *, scale: float = 1.0) -> Objective:
    """Watches scale·score: `name`/chosen, the mean over the desirable completions, and `name`/rejected, over the others."""

    @reads("label", *score.needs)
    def values(logps: mx.array, batch: Batch) -> mx.array:
        return scale * score(logps, batch)

    desirable, undesirable = per_label(desirable=True), per_label(desirable=False)
    return watch(f"{name}/chosen", values, desirable) + watch(f"{name}/rejected", values, undesirable)


def per_label(*, desirable: bool) -> Weights:
    """Every completion of the label weighs the same, for values [S]."""

    def weights(batch: Batch) -> tuple[mx.array, mx.array]:
        selected = column(batch, "label") == desirable
        return selected, selected.sum()

    return weights


# --- gates: factors of the values that carry no gradient --------------------------------------


def gated(objective: Objective, *gates: Quantity | None) -> Objective:
    """The values of every optimized term times sg(gate), for each gate; counts and metrics stay as they are.

    Args:
        gates: [N], [S] or [P], whatever broadcasts to the values; None is no gate.
    """
    for gate in gates:
        if gate is not None:
            objective = Objective(tuple((c, _through(gate, t) if c else t) for c, t in objective.terms))
    return objective


def _through(gate: Quantity, t: Term) -> Term:
    def values(logps: mx.array, batch: Batch) -> mx.array:
        return mx.stop_gradient(gate(logps, batch)) * t.values(logps, batch)

    constants = (gate.needs | t.values.needs) - t.values.differentiates
    return attrs.evolve(t, values=Quantity(values, gate.needs | t.values.needs, constants))


@reads("log_sum_sq_probs")
def confidence(logps: mx.array, batch: Batch) -> mx.array:
    """[P]: w(chosen)·w(rejected), w = exp(mean_t(log π(y_t) - log Σ_v π(v)²)): how likely the policy itself writes the pair.

    WPO with sampled alignment (Zhou et al., 2024, https://arxiv.org/abs/2406.11827, eq. 2).
    """
    aligned = token_sum(logps - column(batch, "log_sum_sq_probs"), batch) / mx.maximum(batch.lengths, 1)
    c, r = halves(mx.exp(aligned))
    return c * r
