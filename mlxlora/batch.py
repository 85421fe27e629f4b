"""The batch that every stage reads and writes, and the alphabet of its shapes.

    R  rows fed to the model          N  trained tokens (targets of the loss)
    T  positions of a row             S  sequences (completions)
    D  hidden size                    P  preference pairs (S = 2P: all chosen, then all rejected)
    V  vocabulary                     G  completions per prompt (S = prompts x G)
    U  prompts that rows share        K  positions of a shared prompt

Log-probabilities are natural (nats) and float32.
"""

from typing import NamedTuple

import mlx.core as mx


class Batch(NamedTuple):
    """Token rows, which of their tokens are trained, and the constants that an objective compares the policy with.

    A NamedTuple of arrays, because `mx.compile` accepts it.

    Attributes:
        tokens: [R, T] int32, what the model reads; right-padded.
        positions: [N] int32, index into the R*T positions: the one that predicts the target.
        targets: [N] int32, the trained tokens.
        sequence: [N] int32, which sequence a trained token belongs to; S marks bucket filler.
        lengths: [S] int32, trained completion tokens of each sequence.
        prompt: [N] bool, trained tokens that belong to the prompt; None if none does.
        ref_logps: [N] log-probabilities under the reference policy.
        old_logps: [N] log-probabilities under the policy that sampled the rows.
        advantages: [S] advantage of each completion.
        preference_score: [P] weight of each pair.
        label: [S] bool, whether the completion is desirable (KTO).
        reference_point: [S] KTO's z, the policy's divergence from the reference on mismatched completions, nats.
        from_reference: [S] bool, whether the reference sampled the completion (XPO).
        divergence: [N] of the policy's distribution at each target from a teacher's, nats (distillation).
        entropy: [N] entropy of the policy's distribution at each target, if the objective asks for it.
        log_sum_sq_probs: [N] log Σ_v π(v)² of the policy's distribution at each target, if the objective asks for it.
        correct: [N] 1 where the target is the policy's likeliest token, else 0, if the objective asks for it.
        prefix: [U, K] int32, prompts that rows continue: row r continues prompt r div (R/U); None if rows are whole.
        prefix_lengths: [U] int32, their tokens; the rest is padding, on the right.
        segments: [R, T] int32, which of a row's sequences a token belongs to, from 1, and 0 in padding; None: one per row.
    """

    tokens: mx.array
    positions: mx.array
    targets: mx.array
    sequence: mx.array
    lengths: mx.array
    prompt: mx.array | None = None
    ref_logps: mx.array | None = None
    old_logps: mx.array | None = None
    advantages: mx.array | None = None
    preference_score: mx.array | None = None
    label: mx.array | None = None
    reference_point: mx.array | None = None
    from_reference: mx.array | None = None
    divergence: mx.array | None = None
    entropy: mx.array | None = None
    log_sum_sq_probs: mx.array | None = None
    correct: mx.array | None = None
    prefix: mx.array | None = None
    prefix_lengths: mx.array | None = None
    segments: mx.array | None = None

    @property
    def sequences(self) -> int:
        """S, a number known when the batch is traced."""
        return self.lengths.shape[0]


def completions(batch: Batch) -> mx.array:
    """[N] bool: the trained tokens of completions."""
    real = batch.sequence < batch.sequences
    return real if batch.prompt is None else real & ~batch.prompt


def everything(batch: Batch) -> mx.array:
    """[N] bool: every trained token, of prompts too."""
    return batch.sequence < batch.sequences


def chosen(batch: Batch) -> mx.array:
    """[N] bool: the trained tokens of the chosen completions."""
    return completions(batch) & (batch.sequence < batch.sequences // 2)


def chosen_rows(batch: Batch) -> mx.array:
    """[N] bool: the trained tokens of the chosen completions and of their prompts."""
    return batch.sequence < batch.sequences // 2


def rejected(batch: Batch) -> mx.array:
    """[N] bool: the trained tokens of the rejected completions."""
    return completions(batch) & (batch.sequence >= batch.sequences // 2)


def halves(scores: mx.array) -> tuple[mx.array, mx.array]:
    """[2P] to ([P] chosen, [P] rejected)."""
    pairs = scores.shape[0] // 2
    return scores[:pairs], scores[pairs:]  # not mx.split: two equal splits do not compile (mlx 0.32.4)


def token_sum(values: mx.array, batch: Batch) -> mx.array:
    """[N] to [S]: the sum over each sequence's completion tokens.

    A product with a one-hot matrix: it is deterministic, and a scatter-add on a GPU is not.
    """
    return mx.where(_member(batch), values[None], 0.0).sum(axis=-1)


def token_offsets(batch: Batch) -> mx.array:
    """[N] int32: the place of each completion token in its completion, from 0 (tokens of a sequence lie in reading order)."""
    member = _member(batch).astype(mx.int32)
    return (member.cumsum(axis=-1) * member).sum(axis=0) - 1


def _member(batch: Batch) -> mx.array:
    """[S, N] bool: which completion tokens belong to which sequence."""
    member = batch.sequence[None] == mx.arange(batch.sequences)[:, None]
    return member if batch.prompt is None else member & ~batch.prompt[None]


_ADDED_BY = {
    "ref_logps": "with_reference(...)",
    "old_logps": "rollouts(...)",
    "advantages": "rollouts(...)",
    "preference_score": "pairs(...)",
    "label": "unpaired(...)",
    "reference_point": "unpaired(...)",
    "from_reference": "on_policy_pairs(..., explore=True)",
    "divergence": "a scorer with a teacher",
    "entropy": "the scorer",
    "log_sum_sq_probs": "the scorer",
    "correct": "the scorer",
}


def column(batch: Batch, name: str) -> mx.array:
    """A column that an objective needs.

    Raises:
        ValueError: the batch lacks it; the message says what adds it.
    """
    value = getattr(batch, name)
    if value is None:
        raise ValueError(f"this objective needs batch.{name}, which {_ADDED_BY[name]} adds")
    return value
