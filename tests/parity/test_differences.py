"""Where mlxlora differs from TRL 1.16 on purpose: the number of each by hand, and its row in docs/methods.md."""

import re
from collections.abc import Callable
from math import exp, log
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch
from mlxlora.config.options import (
    AdapterOptions,
    DataOptions,
    DistillOptions,
    GRPOOptions,
    ORPOOptions,
    PairData,
    RowOptions,
)
from mlxlora.data.batching import collate
from mlxlora.data.labeled import judged_row, with_mismatched
from mlxlora.data.pooled import pooled, results
from mlxlora.data.rows import Row
from mlxlora.data.tokenize import preference_pair, supervised_example
from mlxlora.objectives import cpo, dpo, grpo, kto, orpo
from mlxlora.objectives.advantages import advantage, group_relative, no_signal
from mlxlora.objectives.terms import nll
from mlxlora.rollouts.groups import Gathered, completion_metrics, reward_metrics
from mlxlora.training.step import make_step
from tests.support.chat import chat_tokenizer
from tests.support.goldens import flat_batch
from tests.support.tiny import dense, example, shaken

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("## Differences from TRL")[2]
DIFFERENCES: dict[str, Callable[[], None]] = {}


def difference(title: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """A check of the difference in the row `title` of the page."""

    def note(check: Callable[[], None]) -> Callable[[], None]:
        DIFFERENCES[title] = check
        return check

    return note


def batch_of(logps: list[list[float]], prompts: int = 0, **columns: list) -> tuple[mx.array, Batch]:
    """Sequences of one length, and their columns: [S][T], or by sequence."""
    shape = len(logps), len(logps[0])
    completion = np.arange(shape[1])[None] >= np.full((shape[0], 1), prompts)
    known = {"entropy": np.zeros(shape).tolist(), **columns}
    arrays = {name: np.array(column, np.float32) for name, column in known.items()}
    batch, mask = flat_batch(completion, np.ones(shape) if prompts else None, **arrays)
    return mx.array(np.array(logps, np.float32)[mask]), batch


def near(found: mx.array, value: float) -> None:
    assert found.item() == pytest.approx(value, rel=1e-5, abs=1e-7)


# --- losses -------------------------------------------------------------------------------------


@difference("label smoothing of DPO's `sigmoid`")
def label_smoothing() -> None:
    """z = 1: -log σ(1) = 0.313262, -log σ(-1) = 1.313262."""
    given = batch_of([[-1.0], [-2.0]], ref_logps=[[-1.5], [-1.5]])
    near(dpo(beta=1.0, label_smoothing=0.1)(*given)[0], 0.9 * 0.313262 + 0.1 * 1.313262)
    near(dpo(beta=1.0)(*given)[0], 0.313262)  # TRL's, whatever the smoothing


@difference("bound of `cispo`")
def cispo_cap() -> None:
    """ρ = 1.5, A = 1, log π = -1."""
    given = batch_of([[-1.0]], old_logps=[[-1.0 - log(1.5)]], advantages=[1.0])
    near(grpo(loss_type="cispo", beta=0.0)(*given)[0], 1.2)
    near(grpo(loss_type="cispo", beta=0.0, cap=0.2)(*given)[0], 0.2)  # TRL: epsilon_high itself


@difference("KL of `grpo`")
def kl_correction() -> None:
    """log(π_ref/π) = -1: k3 = e^-1; ρ = e^0.5."""
    given = batch_of([[-1.0]], ref_logps=[[-2.0]], old_logps=[[-1.5]], advantages=[0.0])
    near(grpo(beta=1.0)(*given)[0], exp(-1))
    near(grpo(beta=1.0, correct_kl=True)(*given)[0], exp(-1) * exp(0.5))  # TRL's default
    assert not GRPOOptions().correct_kl


@difference("entropy bonus with `--top-entropy-quantile`")
def entropy_bonus() -> None:
    """Entropies 0 and 2: the mean of all tokens is 1, of the half of highest entropy 2."""
    given = batch_of([[-1.0, -1.0]], entropy=[[0.0, 2.0]], advantages=[0.0])
    near(grpo(beta=0.0, top_entropy=0.5, entropy_coef=1.0)(*given)[0], -1.0)  # TRL: -2


@difference("KL of RLOO")
def rloo_kl() -> None:
    """Rewards 1 and 0, log π/π_ref = 0.5 and 0, β = 0.1: TRL's advantages are those of the rewards 0.95 and 0."""
    leave_one_out = advantage("leave_one_out", "none")
    assert leave_one_out(np.array([[1.0, 0.0]])).tolist() == [[1, -1]]
    np.testing.assert_allclose(leave_one_out(np.array([[1.0 - 0.1 * 0.5, 0.0]])), [[0.95, -0.95]])  # TRL
    given = batch_of([[-1.0], [-1.0]], ref_logps=[[-1.5], [-1.0]], advantages=[1.0, -1.0])
    k3 = exp(-0.5) - 1 + 0.5
    near(grpo(loss_type="reinforce", beta=0.1)(*given)[0], (1 - 1) / 2 + 0.1 * k3 / 2)


@difference("NLL of ORPO")
def orpo_nll() -> None:
    """Prompt tokens -4 and -4, completion tokens -1 and -1."""
    logps, batch = batch_of([[-4.0, -4.0, -1.0, -1.0]] * 2, prompts=2)
    near(orpo()(logps, batch)[1]["nll_loss"], 1.0)
    near(orpo(nll_on_prompt=True)(logps, batch)[1]["nll_loss"], 2.5)  # TRL's
    assert not ORPOOptions().nll_on_prompt


@difference("token means over accumulated batches")
def pooled_means() -> None:
    """One token of -1 in the first batch, three of -3 in the second: 10/4; TRL's CPO and ORPO average 1 and 3."""
    objective = nll()
    batches = [batch_of([[-1.0]]), batch_of([[-3.0, -3.0, -3.0]])]
    counts = {"nll": sum((objective.counts(batch)["nll"] for _, batch in batches), mx.array(0.0))}
    near(sum((objective(*given, counts)[0] for given in batches), mx.array(0.0)), 2.5)
    near(sum((objective(*given)[0] for given in batches), mx.array(0.0)) / 2, 2.0)  # TRL


@difference("reference point of KTO")
def kto_partner() -> None:
    """TRL turns completions around within each batch of the data, so with batches of 2 rows 1 and 2 swap theirs."""
    texts = zip("xxyz", "abcd", strict=True)
    rows = [Row({"prompt": p, "completion": c, "label": True}, "rows", n) for n, (p, c) in enumerate(texts)]
    tokenizer = chat_tokenizer(None)
    judged = [judged_row(row, tokenizer, data=RowOptions(data="rows")) for row in rows]
    items = with_mismatched([item for item in judged if item is not None], 64)
    joined = [tokenizer.decode(item.mismatched.tokens.tolist()).replace("<eos>", "") for item in items if item.mismatched]
    assert joined == ["xd", "xd", "yb", "zc"]  # TRL: xb xa yd zc


# --- advantages ---------------------------------------------------------------------------------


@difference("advantages in float64")
def exact_zero() -> None:
    """0.6 is the mean of 0.3, 0.6, 0.9: TRL's float32 gives 1.99e-7, of which Adam makes a full step."""
    rewards = np.array([0.3, 0.6, 0.9], np.float32)
    trl = (rewards - rewards.mean()) / (rewards.std(ddof=1) + np.float32(1e-4))
    assert trl[1] == pytest.approx(1.99e-7, rel=1e-2)
    assert group_relative(rewards[None])[0, 1] == 0
    np.testing.assert_allclose(group_relative(rewards[None])[0], trl, atol=3e-7)


@difference("defaults of `grpo`")
def grpo_defaults() -> None:
    """Two completions of 1 and 3 tokens, A = 1 and -1, on policy: TRL's `dapo` weighs tokens, ours completions."""
    options = GRPOOptions()
    assert (options.loss_type, options.beta) == ("grpo", 0.1)  # TRL: dapo, 0.0
    completion = np.array([[1, 0, 0], [1, 1, 1]])
    batch, mask = flat_batch(completion, advantages=np.array([1.0, -1.0], np.float32), entropy=np.zeros((2, 3), np.float32))
    logps = mx.array(np.full((2, 3), -1.0, np.float32)[mask])
    near(grpo(beta=0.0)(logps, batch)[1]["policy_loss"], (-1 + 1) / 2)
    near(grpo(loss_type="dapo", beta=0.0)(logps, batch)[1]["policy_loss"], (-1 + 3) / 4)


# --- metrics ------------------------------------------------------------------------------------


@difference("ties of `rewards/accuracies`")
def ties() -> None:
    """At the reference every pair is a tie; TRL counts it as wrong."""
    given = batch_of([[-1.0], [-2.0]], ref_logps=[[-1.0], [-2.0]])
    near(dpo()(*given)[1]["rewards/accuracies"], 0.5)  # TRL: 0
    near(cpo()(*batch_of([[-1.0], [-2.0]]))[1]["rewards/accuracies"], 1.0)
    near(cpo()(*batch_of([[-1.0], [-1.0]]))[1]["rewards/accuracies"], 0.5)


@difference("`frac_reward_zero_std` with `--scale-rewards batch`")
def zero_std() -> None:
    """One of two groups has equal rewards; TRL looks at the standard deviation of the batch, which is not 0."""
    assert no_signal(np.array([[1.0, 1.0], [0.0, 1.0]])).mean() == 0.5  # TRL: 0


@difference("`reward_std`, least and greatest length in a report of several steps")
def statistics_of_a_report() -> None:
    """Two steps with rewards 0, 1 and 3, 5, and lengths 2, 9 and 4, 5."""
    steps = [([0.0, 1.0], [2, 9]), ([3.0, 5.0], [4, 5])]
    found = [Gathered(np.array([rewards]), np.zeros((0, 2)), np.array(lengths), np.ones(2) > 0) for rewards, lengths in steps]
    seen = results(pooled(reward_metrics(one, ()) | completion_metrics(one, 1.0) for one in found))
    assert np.isclose(seen["reward_std"], (59 / 12) ** 0.5)  # Σ(r - 9/4)²/3; TRL: (√½ + √2)/2
    assert (seen["completions/min_length"], seen["completions/max_length"]) == (2, 9)  # TRL: 3 and 7


@difference("metrics that are not means")
def no_other_metrics() -> None:
    """Minima, maxima and differences of means do not pool over batches."""
    names = {t.name for objective in (kto(), grpo(), grpo(loss_type="cispo")) for _, t in objective.terms}
    assert not {"rewards/margins", "clip_ratio/low_min", "clip_ratio/high_max"} & names


# --- rows ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@difference("end of conversations in CPO and ORPO")
def no_second_eos() -> None:
    """The template writes <|im_end|> and a newline; TRL's CPO and ORPO append a second <|im_end|>."""
    tokenizer = chat_tokenizer(TEMPLATE, eos="<|im_end|>")
    said = {side: [{"role": "assistant", "content": text}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    row = Row({"prompt": [{"role": "user", "content": "hi"}], **said}, "rows", 1)
    pair = preference_pair(row, tokenizer)
    assert pair is not None
    ids = pair.chosen.tokens[pair.chosen.loss_mask].tolist()
    assert tokenizer.decode(ids).startswith("yes<|im_end|>") and ids.count(tokenizer.eos_token_id) == 1  # TRL: 2


@difference("rows whose completion is cut off")
def cut_off() -> None:
    """A prompt of 8 tokens and a limit of 8: TRL's CPO and ORPO keep the pair with empty completions, whose mean is 0/0."""
    row = Row({"prompt": "abcdefgh", "chosen": "i", "rejected": "j"}, "rows", 1)
    assert preference_pair(row, chat_tokenizer(None), max_seq_length=8) is None
    assert preference_pair(row, chat_tokenizer(None), max_seq_length=9) is not None
    assert PairData(data="rows").max_seq_length == 2048


@difference("users and tools inside a completion of several turns")
def turns_of_others() -> None:
    """The completion "b", "c" of the user, "d" has 6 trained tokens: d, <|im_end|> and the line's end, and those of b.

    TRL trains all that follows the prompt, with "<|im_start|>user\\nc<|im_end|>\\n<|im_start|>assistant\\n" between them.
    """
    tokenizer = chat_tokenizer(TEMPLATE, eos="<|im_end|>")
    turns = [{"role": role, "content": text} for role, text in (("assistant", "b"), ("user", "c"), ("assistant", "d"))]
    asked = [{"role": "user", "content": "a"}]
    trl = tokenizer.apply_chat_template([*asked, *turns])[len(tokenizer.apply_chat_template(asked, add_generation_prompt=True)) :]
    sft = supervised_example(Row({"prompt": asked, "completion": turns}, "rows", 1), tokenizer, mask_prompt=True)
    pair = preference_pair(Row({"prompt": asked, "chosen": turns, "rejected": turns[2:]}, "rows", 1), tokenizer)
    assert sft is not None and pair is not None
    for ours in (sft, pair.chosen):
        assert tokenizer.decode(ours.tokens[ours.loss_mask]) == "b<|im_end|>\nd<|im_end|>\n"
        assert ours.loss_mask.sum() == 6 and len(trl) == 6 + len("user\nc\nassistant\n") + 3  # two headers and an end


@difference("prompts of `prompt`, `completion` rows in SFT")
def sft_prompts() -> None:
    """A prompt of 3 tokens, a completion of 2 and the end; the first token has nothing that predicts it."""
    row, tokenizer = Row({"prompt": "abc", "completion": "de"}, "rows", 1), chat_tokenizer(None)
    examples = [supervised_example(row, tokenizer, mask_prompt=mask) for mask in (DataOptions().mask_prompt, True)]
    assert [example.loss_mask.sum() for example in examples if example] == [5, 3]  # TRL: 3


@difference("dropout in DPO and KTO")
def dropout() -> None:
    """Two passes over one batch without an update: equal losses, unless dropout draws anew."""
    batch = collate([example(seed, reference=True) for seed in range(4)])
    losses = []
    for rate in (0.0, 0.5):
        mx.random.seed(0)
        model = shaken(prepare(dense(), AdapterOptions(num_layers=-1, dropout=rate))).train()
        losses.append([make_step(model, optim.SGD(0.0), dpo()).measured(batch)["loss"] for _ in range(2)])
    assert losses[0][0] == losses[0][1] and abs(losses[1][0] - losses[1][1]) > 1e-3  # TRL: as without dropout
    assert AdapterOptions().dropout == 0


@difference("defaults of `gkd`")
def gkd_defaults() -> None:
    """TRL: generalized Jensen-Shannon with β = 0.5, and half of the batches are the data's own completions."""
    assert (DistillOptions().divergence, DistillOptions().nll_weight) == ("forward_kl", 0.0)


# --- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("title", DIFFERENCES)
def test_difference(title: str) -> None:
    DIFFERENCES[title]()


def test_the_page_lists_them() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", SECTION, re.MULTILINE)[2:]
    assert rows == list(DIFFERENCES)
