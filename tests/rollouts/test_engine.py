"""Sampling: what is sampled, its log-probabilities, and that neither depends on how rows are batched."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import falcon_h1, gemma3_text, gpt_bigcode, lfm2, llama, qwen3

from mlxlora.adapters.prepare import prepare
from mlxlora.batch import Batch
from mlxlora.config.options import AdapterOptions
from mlxlora.errors import InputError, RunError
from mlxlora.models.logprobs import scorer
from mlxlora.rollouts import prefix_cache
from mlxlora.rollouts.engine import Decoding, sample
from mlxlora.rollouts.kv_cache import Route, find_route
from mlxlora.rollouts.sampling import Sampling, categorical, draw_tokens, truncated, uniforms
from tests.support import tiny

QWEN3 = tiny.LLAMA | {"model_type": "qwen3", "rope_theta": 1e4, "max_position_embeddings": 512}
GEMMA3 = tiny.LLAMA | {"model_type": "gemma3_text", "sliding_window": 6, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16}
LFM2 = tiny.LLAMA | {"model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64}
LFM2 |= {"block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "rope_theta": 1e4}
LFM2 |= {"max_position_embeddings": 512, "full_attn_idxs": [1], "block_ff_dim": 128}
BIGCODE = {"model_type": "gpt_bigcode", "n_embd": 64, "n_layer": 2, "n_inner": 128, "n_head": 4, "n_positions": 256}
BIGCODE |= {"layer_norm_epsilon": 1e-5, "vocab_size": tiny.VOCABULARY, "num_key_value_heads": 1, "multi_query": True}
WINDOWED = tiny.LLAMA | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
HYBRID = tiny.LLAMA | {"model_type": "falcon_h1", "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
HYBRID |= {"mamba_d_state": 16, "mamba_d_conv": 4, "max_position_embeddings": 512}

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13, 14, 15], [5]]
NEVER: list[int] = []
ALL = Sampling()


def built(module, config):
    return tiny._random(module.Model(module.ModelArgs.from_dict(config)))


MODELS = {
    "llama": tiny.dense,
    "qwen3": lambda: built(qwen3, QWEN3),
    "llama with a window": lambda: built(llama, WINDOWED),
    "gemma3": lambda: built(gemma3_text, GEMMA3),
    "lfm2: convolutions": lambda: built(lfm2, LFM2),
    "falcon_h1: state space": lambda: built(falcon_h1, HYBRID),
    "gpt_bigcode: positions of one row only": lambda: built(gpt_bigcode, BIGCODE),
    "gemma2: softcap": tiny.softcapped,
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def plain():
    return tiny.dense()


def drawn(model, prompts=PROMPTS, group=3, stop=(3, 4), seed=0, batch=0, **options):
    options = {"max_tokens": 14} | options
    return sample(model, prompts, Decoding(Sampling(**options), stop, group, batch), key=mx.random.key(seed))


def flat(groups):
    return [completion for group in groups for completion in group]


def tokens(groups):
    return [completion.tokens.tolist() for completion in flat(groups)]


def rows(prompts, groups):
    """The batch that training would score: completions after their prompts."""
    whole = [[*prompt, *c.tokens] for prompt, group in zip(prompts, groups, strict=True) for c in group]
    width = max(map(len, whole)) - 1
    inputs, positions, targets, sequence = np.zeros((len(whole), width), np.int32), [], [], []
    for r, (row, c) in enumerate(zip(whole, flat(groups), strict=True)):
        inputs[r, : len(row) - 1] = row[:-1]
        positions += range(r * width + len(row) - 1 - len(c.tokens), r * width + len(row) - 1)
        targets += c.tokens.tolist()
        sequence += [r] * len(c.tokens)
    lengths = [len(c.tokens) for c in flat(groups)]
    return Batch(mx.array(inputs), *(mx.array(column, mx.int32) for column in (positions, targets, sequence, lengths)))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_the_training_forward_pass(model, temperature):
    groups = drawn(model, temperature=temperature)
    logps, _ = scorer(model, temperature=temperature)(rows(PROMPTS, groups), gradient=False)
    np.testing.assert_allclose(np.concatenate([c.logps for c in flat(groups)]), np.array(logps), atol=5e-5)


def test_logps_ignore_truncation_and_penalty(plain):
    groups = drawn(plain, top_k=5, top_p=0.9, min_p=0.05, repetition_penalty=1.3)
    logps, _ = scorer(plain)(rows(PROMPTS, groups), gradient=False)
    np.testing.assert_allclose(np.concatenate([c.logps for c in flat(groups)]), np.array(logps), atol=5e-5)


def test_a_completion_does_not_depend_on_the_batch(model):
    once = drawn(model, max_tokens=8)
    for batch in (1, 5):
        assert tokens(drawn(model, batch=batch, max_tokens=8)) == tokens(once)


@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 99), batch=st.integers(1, 12), top_p=st.sampled_from([1.0, 0.8]), penalty=st.sampled_from([1.0, 1.4]))
def test_batching_law(plain, seed, batch, top_p, penalty):
    options = {"seed": seed, "top_p": top_p, "repetition_penalty": penalty, "max_tokens": 20, "stop": range(12)}
    assert tokens(drawn(plain, batch=batch, **options)) == tokens(drawn(plain, **options))


def test_same_key_same_completions_and_no_global_randomness(plain):
    mx.random.seed(1)
    state = np.array(mx.random.state[0])
    first = drawn(plain, seed=5)
    assert np.array_equal(state, np.array(mx.random.state[0]))
    mx.random.seed(2)
    assert tokens(first) == tokens(drawn(plain, seed=5)) != tokens(drawn(plain, seed=6))
    assert len({tuple(row) for row in tokens(first)}) > 6  # samples of a group differ


def test_the_stop_token_is_kept_and_ends(plain):
    groups = drawn(plain, stop=range(16), group=8, max_tokens=30)
    assert any(c.finished for c in flat(groups))
    for c in flat(groups):
        assert not np.isin(c.tokens[:-1], range(16)).any()
        assert (c.tokens[-1] < 16) == c.finished
        assert c.finished or len(c.tokens) == 30
        assert len(c.tokens) == len(c.logps) and c.tokens.dtype == np.int32 and c.logps.dtype == np.float32


def test_never_stops(plain):
    assert all(len(c.tokens) == 14 and not c.finished for c in flat(drawn(plain, stop=NEVER)))


def test_stops_at_once(plain):
    assert all(len(c.tokens) == 1 and c.finished for c in flat(drawn(plain, stop=range(tiny.VOCABULARY), batch=2)))


def test_one_token(plain):
    assert all(len(c.tokens) == 1 for c in flat(drawn(plain, max_tokens=1)))


def test_a_stop_token_at_the_limit_finishes(plain):
    assert all(c.finished for c in flat(drawn(plain, max_tokens=1, stop=range(tiny.VOCABULARY))))


def test_greedy_is_mlx_lms(model):
    groups = drawn(model, temperature=0, group=1, stop=NEVER)
    for prompt, (completion,) in zip(PROMPTS, groups, strict=True):
        expected = [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=14)]
        assert completion.tokens.tolist() == expected


def test_long_prompts_pass_in_parts(plain, monkeypatch):
    prompts = [list(range(1, 90)), list(range(3, 50)), [4]]
    whole = drawn(plain, prompts=prompts)
    monkeypatch.setattr("mlxlora.rollouts.prefix_cache._PREFILL_TOKENS", 1)
    assert tokens(drawn(plain, prompts=prompts)) == tokens(whole)
    monkeypatch.setattr("mlxlora.rollouts.engine.find_route", lambda _: Route(True, ""))
    assert tokens(drawn(plain, prompts=prompts)) == tokens(whole)


def test_adapters_are_sampled_and_dropout_is_not():
    model = tiny.dense()
    before = tokens(drawn(model))
    prepare(model, AdapterOptions(num_layers=-1, dropout=0.5))
    tiny.shaken(model)
    model.train()
    assert tokens(drawn(model)) == tokens(drawn(model)) != before
    assert model.training and all(m.training for m in model.modules())


def test_the_model_is_left_in_training_mode_after_an_error(plain):
    plain.train()
    with pytest.raises(InputError, match="prompt 2 of 2 has no tokens"):
        drawn(plain, prompts=[[1], []])
    broken = tiny.dense()
    broken.update({"model": {"norm": {"weight": mx.full((64,), mx.nan)}}})
    with pytest.raises(RunError, match="log-probability nan"):
        drawn(broken)
    assert plain.training and broken.training


def test_routes():
    assert find_route(MODELS["llama"]()).mixed
    separate = find_route(MODELS["gpt_bigcode: positions of one row only"]())
    assert not separate.mixed and "equally long prompts" in separate.note


def test_plain_and_windowed_layers_keep_a_prompt_once():
    assert all(find_route(MODELS[name]()).shared for name in ("llama", "qwen3", "llama with a window", "gemma3"))
    convolutions = find_route(MODELS["lfm2: convolutions"]())
    assert convolutions.mixed and not convolutions.shared and "ArraysCache" in convolutions.note
    assert not find_route(MODELS["gemma2: softcap"]()).shared


@pytest.mark.parametrize("batch", [0, 4])
def test_our_caches_sample_what_mlx_lms_sample(plain, batch):
    ours = drawn(plain, batch=batch, max_tokens=80, stop=(3,))
    theirs = sample(plain, PROMPTS, Decoding(Sampling(max_tokens=80), (3,), 3, batch, Route(True, "")), key=mx.random.key(0))
    assert tokens(ours) == tokens(theirs)
    np.testing.assert_allclose(*(np.concatenate([c.logps for c in flat(groups)]) for groups in (ours, theirs)), atol=5e-5)


def test_a_compiled_step_samples_the_same(plain, monkeypatch):
    expected = drawn(plain, max_tokens=70, stop=range(6))
    monkeypatch.setattr("mlxlora.rollouts.engine._compiles", lambda: True)
    assert tokens(drawn(plain, max_tokens=70, stop=range(6))) == tokens(expected)


def test_a_compiled_step_sees_new_weights(plain, monkeypatch):
    monkeypatch.setattr("mlxlora.rollouts.engine._compiles", lambda: True)
    model = tiny.dense()
    before = tokens(drawn(model))
    prepare(model, AdapterOptions(num_layers=-1))
    assert tokens(drawn(model)) == before
    tiny.shaken(model)
    assert tokens(drawn(model)) != before


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.05), (4, 0.6)])
@pytest.mark.parametrize("head", [32, 64])
def test_quantized_keys_and_values(bits, tolerance, head):
    model = built(qwen3, QWEN3 | {"head_dim": head})
    groups = drawn(model, kv_bits=bits, batch=5)
    logps, _ = scorer(model)(rows(PROMPTS, groups), gradient=False)
    difference = np.abs(np.concatenate([c.logps for c in flat(groups)]) - np.array(logps))
    assert 0 < difference.mean() < tolerance
    assert tokens(groups) == tokens(drawn(model, kv_bits=bits, batch=5))


def test_what_cannot_be_quantized(plain):
    with pytest.raises(InputError, match="--kv-bits 8: this model's heads have 16 entries"):
        drawn(plain, kv_bits=8)
    with pytest.raises(InputError, match="--kv-bits 4: this model's cache cannot be quantized"):
        drawn(MODELS["lfm2: convolutions"](), kv_bits=4)


def test_a_prompt_is_read_once_for_its_group(plain, monkeypatch):
    read = []
    prefill = prefix_cache.prefill_prompts
    monkeypatch.setattr(
        "mlxlora.rollouts.prefix_cache.prefill_prompts", lambda _, prompts, bits: read.extend(prompts) or prefill(_, prompts, bits)
    )
    prompts, route = [[1, 2, 3], [4, 5], [6]], find_route(plain)
    for batch, stop in ((0, NEVER), (0, range(40)), (18, range(40))):
        read.clear()
        sample(plain, prompts, Decoding(Sampling(max_tokens=40), stop, 6, batch, route), key=mx.random.key(0))
        assert read == [(1, 2, 3), (4, 5), (6,)]


def test_no_prompts(plain):
    assert drawn(plain, prompts=[]) == []


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"max_tokens": 0}, {"kv_bits": 3}]
)
def test_options_are_checked(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=name.replace("_", "-")):
        Sampling(**wrong)


# --- one step -------------------------------------------------------------------------------


def logits(rows=1, vocabulary=50, scale=2.0, seed=0):
    return mx.array((np.random.default_rng(seed).standard_normal((rows, vocabulary)) * scale).astype(np.float32))


def many(z, sampling=ALL, count=20_000, seed=0, seen=None):
    noise = uniforms(mx.random.split(mx.random.key(seed), 1), count)[0]
    repeated = mx.broadcast_to(z, (count, z.shape[-1]))
    return np.array(draw_tokens(repeated, sampling, noise, seen)[0])


@pytest.mark.parametrize("vocabulary", [5, 512, 1500])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_softmax(vocabulary, temperature):
    z = logits(vocabulary=vocabulary)
    p = np.array(mx.softmax(z / temperature, axis=-1))[0].astype(np.float64)
    seen = np.bincount(many(z, Sampling(temperature=temperature)), minlength=vocabulary)
    order = np.argsort(-p)
    cells = np.minimum(np.arange(vocabulary), 40)  # the tail is pooled
    expected, observed = (np.bincount(cells, values[order]) for values in (p / p.sum() * 20_000, seen))
    chi2, degrees = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert chi2 < degrees + 4 * np.sqrt(2 * degrees) + 4


def test_the_first_token_of_a_model_follows_its_softmax(plain):
    first = [c.tokens[0] for c in drawn(plain, prompts=[[1, 2, 3]], group=4000, max_tokens=1, stop=NEVER)[0]]
    p = np.array(mx.softmax(plain(mx.array([[1, 2, 3]]))[0, -1]))
    share = np.bincount(first, minlength=len(p)) / 4000
    assert np.abs(share - p).max() < 4 * np.sqrt(0.25 / 4000)


def test_rare_tokens_are_not_lost_and_impossible_ones_never_drawn():
    z = mx.full((1, 4096), -16.0)  # 4095 tokens of 1e-7 each beside one of nearly 1
    z[0, 0] = 0.0
    noise = mx.array([[1 - 2**-12, u] for u in np.linspace(0, 0.999, 500)], mx.float32)
    assert len(set(np.array(categorical(mx.broadcast_to(z, (500, 4096)), noise)).tolist())) > 400
    holes = mx.where(mx.arange(4096) % 3 == 1, z, -mx.inf)
    drawn_tokens = np.array(categorical(mx.broadcast_to(holes, (500, 4096)), uniforms(mx.random.key(0)[None], 500)[0]))
    assert (drawn_tokens % 3 == 1).all()


def test_top_k():
    z = logits()
    assert set(many(z, Sampling(top_k=7))) == set(np.argsort(-np.array(z)[0])[:7])
    assert mx.array_equal(truncated(z, Sampling(top_k=50)), z)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p(top_p):
    z = logits()
    p = np.array(mx.softmax(z, axis=-1))[0]
    order = np.argsort(-p)
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1]
    assert set(np.flatnonzero(np.isfinite(np.array(truncated(z, Sampling(top_p=top_p)))[0]))) == set(nucleus)
    assert set(many(z, Sampling(top_p=top_p))) <= set(nucleus)


@pytest.mark.parametrize("min_p", [0.1, 1.0])
def test_min_p(min_p):
    z = logits()
    p = np.array(mx.softmax(z, axis=-1))[0]
    assert set(many(z, Sampling(min_p=min_p))) <= set(np.flatnonzero(p >= min_p * p.max() * (1 - 1e-5)))


def test_repetition_penalty():
    z, seen = mx.array([[2.0, 1.9, -1.0]]), mx.array([[True, False, True]])
    token, logp = draw_tokens(z, Sampling(temperature=0, repetition_penalty=2.0), mx.zeros((1, 2)), seen)
    assert token.item() == 1  # 2/2 < 1.9
    assert logp.item() == pytest.approx((1.9 - mx.logsumexp(z)).item(), abs=1e-6)  # of the policy, not of the penalised logits


def test_repetition_penalty_sees_prompt_and_completion(plain):
    groups = drawn(plain, prompts=[[1, 2, 3]], group=6, repetition_penalty=1e6, stop=NEVER, max_tokens=30, temperature=0)
    for row in tokens(groups):
        assert len(set(row)) == len(row) and not {1, 2, 3} & set(row)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), k=st.integers(0, 9), p=st.floats(0.01, 1), m=st.floats(0, 1), t=st.floats(0.1, 3))
def test_something_is_always_left(seed, k, p, m, t):
    sampling = Sampling(temperature=t, top_k=k, top_p=p, min_p=m)
    z = logits(rows=4, seed=seed)
    left = np.array(truncated(z / t, sampling))
    assert np.isfinite(left).any(axis=-1).all()
    assert np.isfinite(left[np.arange(4), np.array(z).argmax(axis=-1)]).all()
    tokens_, logps = draw_tokens(z, sampling, uniforms(mx.random.key(seed)[None], 4)[0])
    assert np.isfinite(left[np.arange(4), np.array(tokens_)]).all() and (np.array(logps) <= 0).all()


def test_weights_are_untouched(plain):
    before = tiny.snapshot(plain.parameters())
    drawn(plain)
    assert all(np.array_equal(before[name], np.array(leaf)) for name, leaf in tree_flatten(plain.parameters()))
