"""Ranks, multipliers and starts of single adapters: the same function in mlx-lm's files, and exactly the same run after a stop."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import load_adapters

from mlxlora.adapters.files import own_arrays, read_adapter_config, save
from mlxlora.adapters.lora import adapters_of, rank_of
from mlxlora.adapters.pissa import components
from mlxlora.adapters.prepare import disabled, load_weights, prepare
from mlxlora.adapters.rank_scale import Size, native, size_of, uniform
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.data.batching import collate
from mlxlora.errors import InputError
from mlxlora.models.logprobs import scorer, token_logps
from mlxlora.models.modes import evaluating
from mlxlora.objectives.supervised import sft
from mlxlora.training.checkpoint import load_checkpoint, save_checkpoint
from mlxlora.training.optimizers import make_optimizer
from mlxlora.training.progress import Progress
from mlxlora.training.step import make_step
from tests.support.tiny import dense, distance, example, experts, loss_and_gradient, quantized, same, shaken, snapshot, tied

TOKENS = mx.array([[5, 3, 9, 1, 7, 2]])
PATTERNS = {"rank_pattern": ("q_proj=6", "layers.1.*v_proj=2"), "alpha_pattern": ("up_proj=7",)}
EVERYWHERE = ("all-linear", "embed_tokens", "lm_head")
KINDS: dict[str, Any] = {
    "rank-stabilised": (dense, {"rslora": True}),
    "patterns": (dense, PATTERNS),
    "patterns, rank-stabilised": (dense, PATTERNS | {"rslora": True}),
    "patterns, dora": (dense, PATTERNS | {"train_type": "dora"}),
    "patterns on four bits": (quantized, PATTERNS),
    "patterns on experts": (experts, {"rank_pattern": ("gate_proj=6", "q_proj=2")}),
    "embedding and head": (dense, {"lora_keys": EVERYWHERE, "rank_pattern": ("embed_tokens=2", "lm_head=6")}),
    "embedding and head, dora": (dense, {"lora_keys": EVERYWHERE, "train_type": "dora"}),
    "embedding that is the head, dora": (tied, {"lora_keys": ("embed_tokens",), "train_type": "dora"}),
    "embedding and head on four bits": (quantized, {"lora_keys": EVERYWHERE}),
    "components": (dense, {"init_lora_weights": "pissa"}),
    "components, patterns": (dense, PATTERNS | {"init_lora_weights": "pissa"}),
    "components of four bits": (quantized, {"init_lora_weights": "pissa_niter_4"}),
    "components of the head": (dense, {"init_lora_weights": "pissa", "lora_keys": ("lm_head", "q_proj")}),
}
each_kind = pytest.mark.parametrize(("make", "changes"), KINDS.values(), ids=KINDS.keys())


def options(**changes: Any) -> AdapterOptions:
    return AdapterOptions(**{"num_layers": -1, "rank": 4, "scale": 3.0} | changes)


def trained(make: Any, **changes: Any) -> Any:
    return shaken(prepare(make(), options(**changes)), 0.05).eval()


@each_kind
def test_mlx_lm_computes_the_same(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = trained(make, **changes)
    save(model, tmp_path, options(**changes))
    loaded = load_adapters(make(), str(tmp_path)).eval()
    assert mx.abs(loaded(TOKENS) - model(TOKENS)).max().item() < 2e-4
    assert mx.abs(model(TOKENS) - make()(TOKENS)).max().item() > 1e-2


@each_kind
def test_the_base_is_still_there(make: Any, changes: dict[str, Any]) -> None:
    model = trained(make, **changes)
    with disabled(model):
        assert mx.array_equal(model(TOKENS), make()(TOKENS))


@each_kind
def test_a_fresh_adapter_changes_nothing(make: Any, changes: dict[str, Any]) -> None:
    assert mx.abs(prepare(make(), options(**changes))(TOKENS) - make()(TOKENS)).max().item() < 5e-5


@each_kind
def test_a_stopped_run_goes_on_exactly(make: Any, changes: dict[str, Any], tmp_path: Path, eager: None) -> None:
    training, chosen = Training(learning_rate=1e-3), options(**changes)
    batches = [collate([example(4 * k + i) for i in range(4)]) for k in range(2)]
    model, optimizer = prepare(make(), chosen).train(), make_optimizer(training, 5)
    step = make_step(model, optimizer, sft())
    step(batches[0])
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=1), chosen)
    other, again = prepare(make(), chosen).train(), make_optimizer(training, 5)
    load_checkpoint(path, other, again)
    assert same(snapshot(own_arrays(other)), snapshot(own_arrays(model)))
    step(batches[1])
    make_step(other, again, sft())(batches[1])
    assert same(snapshot(other.trainable_parameters()), snapshot(model.trainable_parameters()))
    assert load_adapters(make(), str(path))(TOKENS).shape == (1, 6, 96)


@each_kind
def test_training_starts_from_a_file(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    """Also where the file has other ranks and another multiplier; from components it goes on beside what it started from."""
    model, fresh = trained(make, **changes), prepare(make(), options(**changes)).eval()
    save(model, tmp_path, options(**changes))
    load_weights(fresh, tmp_path / "adapters.safetensors")
    if "niter" not in changes.get("init_lora_weights", ""):  # where another draw would start elsewhere
        assert mx.abs(fresh(TOKENS) - model(TOKENS)).max().item() < 2e-4


@each_kind
def test_the_head_in_chunks(make: Any, changes: dict[str, Any]) -> None:
    """Loss and gradient of the scorer that never keeps the logits are those of the whole model."""
    model, batch = trained(make, **changes), collate([example(i) for i in range(3)])
    plain = scorer(model, chunk=32)
    metrics, gradient = loss_and_gradient(model, sft(), batch, plain)
    expected, whole = loss_and_gradient(model, sft(), batch, evolve(plain, split=None))
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert distance(gradient, whole) < 1e-4
    assert token_logps(model, batch).shape == batch.targets.shape


# --- sizes --------------------------------------------------------------------------------------


def test_sizes() -> None:
    """α = scale · rank; PEFT's `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora`."""
    sizes = {
        path.rpartition("layers.")[2]: Size(rank_of(m), m.scale) for path, m in adapters_of(trained(dense, **PATTERNS)).items()
    }
    assert sizes["0.self_attn.q_proj"] == Size(6, 12.0 / 6) and sizes["0.self_attn.v_proj"] == Size(4, 3.0)
    assert sizes["1.self_attn.v_proj"] == Size(2, 6.0) and sizes["1.mlp.up_proj"] == Size(4, 7 / 4)
    stabilised = options(rslora=True, **PATTERNS)
    assert size_of("layers.0.q_proj", stabilised) == Size(6, 12.0 / math.sqrt(6))
    assert size_of("layers.0.k_proj", stabilised) == Size(4, 6.0)


def test_one_multiplier_of_all_is_written_as_it_is(tmp_path: Path) -> None:
    model = trained(dense, rslora=True)
    save(model, tmp_path, options(rslora=True))
    assert read_adapter_config(tmp_path)["lora_parameters"] == {"rank": 4, "dropout": 0.0, "scale": 6.0}
    assert same(snapshot(uniform(model)[0]), snapshot(model.trainable_parameters()))


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(0.1, 50)), min_size=2, max_size=2))
@settings(deadline=None, max_examples=20)
def test_there_and_back(sizes: list[tuple[int, float]]) -> None:
    """Sizes of the model, those of mlx-lm's file, those of the model."""
    pattern = tuple(f"{name}={rank}" for name, (rank, _) in zip(("q_proj", "o_proj"), sizes, strict=True))
    alphas = tuple(f"{name}={alpha}" for name, (_, alpha) in zip(("q_proj", "o_proj"), sizes, strict=True))
    model = trained(dense, rank_pattern=pattern, alpha_pattern=alphas)
    arrays, size = uniform(model)
    assert size is not None and len({a.shape[1] for name, a in arrays.items() if name.endswith("lora_a")}) == 1
    back = native(model, arrays, size.scale)
    assert distance(back, dict(tree_flatten(model.trainable_parameters()))) < 1e-6


# --- components ---------------------------------------------------------------------------------


def test_components_of_a_matrix() -> None:
    weight = mx.random.normal((20, 12), key=mx.random.key(0)) @ mx.diag(mx.array([2.0**-k for k in range(12)]))
    u, s, vt = components(weight, 3)
    exact = mx.linalg.svd(weight, stream=mx.cpu)
    assert mx.allclose(s, exact[1][:3], rtol=1e-4) and mx.allclose((u * s) @ vt, (exact[0][:, :3] * s) @ exact[2][:3], atol=1e-4)
    near = components(weight, 3, 6)
    assert mx.allclose(near[1], s, rtol=1e-3) and mx.allclose((near[0] * near[1]) @ near[2], (u * s) @ vt, atol=1e-2)


def test_components_train_as_published(eager: None) -> None:
    """Losses and products A B of plain LoRA on W - s·A₀B₀, from A₀ and B₀."""
    batches = [collate([example(4 * k + i) for i in range(4)]) for k in range(3)]
    ours = prepare(dense(), options(init_lora_weights="pissa")).train()
    plain = prepare(dense(), options()).train()
    for path, module in adapters_of(ours).items():
        theirs = adapters_of(plain)[path]
        theirs.lora_a, theirs.lora_b = module.lora_a, module.lora_b
        theirs.linear.weight = theirs.linear.weight - (3.0 * (module.lora_a @ module.lora_b)).T
    taken = [make_step(model, make_optimizer(Training(learning_rate=1e-3), 3), sft()) for model in (ours, plain)]
    for batch in batches:
        a, b = (step.measured(batch) for step in taken)
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_components_cancel_in_bfloat16() -> None:
    """Before the first step, in one product that adds up in float32: no rounding of the large parts is left."""

    def base() -> Any:
        model = dense()
        model.update(tree_map(lambda p: p.astype(mx.bfloat16), model.parameters()))
        return model

    with evaluating(model := prepare(base(), options(init_lora_weights="pissa"))):
        assert mx.array_equal(model(TOKENS), base()(TOKENS))


# --- mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "a pattern of nothing": ({"rank_pattern": ("query=3",)}, "query=3 matches none of the adapted modules"),
    "components with dora": ({"init_lora_weights": "pissa", "train_type": "dora"}, "needs --train-type lora and --dropout 0"),
    "components of an embedding": ({"init_lora_weights": "pissa", "lora_keys": ("embed_tokens",)}, "is not a linear layer"),
    "too many components": ({"init_lora_weights": "pissa", "rank": 33}, "has 32 components"),
    "ranks of whole weights": (
        {"rank_pattern": ("q_proj=3",), "train_type": "full"},
        "--rank-pattern is for adapters; use --train-type lora",
    ),
    "components and a file": ({"init_lora_weights": "pissa", "resume_adapter_file": "x"}, "omit --init-lora-weights"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        prepare(dense(), options(**changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": ("q_proj=0",)}, "--rank-pattern must be a list of module=number, such as q_proj=16, each a whole number"),
        ({"rank_pattern": ("q_proj=1.5",)}, "--rank-pattern must be"),
        ({"alpha_pattern": ("16",)}, "--alpha-pattern must be a list of module=number, such as q_proj=16, each a number above 0"),
        ({"alpha_pattern": ("(=16",)}, "--alpha-pattern must be"),
        ({"init_lora_weights": "olora"}, "--init-lora-weights must be default, pissa or pissa_niter_N"),
    ],
)
def test_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as raised:
        options(**changes)
    assert str(raised.value).startswith(message)


class Own(nn.Linear):
    """A linear layer that brings its own adapter, as afm7's fused projections do."""

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> nn.Module:
        adapter = nn.Module()
        adapter.linear, adapter.lora_a, adapter.lora_b = self, [mx.zeros((64, r))], [mx.zeros((r, 64))]
        return adapter


@pytest.mark.parametrize("changes", [{"rank_pattern": ("v_proj=2",)}, {"init_lora_weights": "pissa"}, {"qat": "4"}])
def test_adapters_of_another_kind(changes: dict[str, Any]) -> None:
    model = dense()
    model.layers[0].self_attn.o_proj = Own(64, 64, bias=False)
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.o_proj.* of the model's own kind"):
        prepare(model, options(**changes))


def test_a_tied_head() -> None:
    with pytest.raises(InputError, match="use embed_tokens instead of lm_head"):
        prepare(tied(), options(lora_keys=("lm_head",)))


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (experts, {}, r"mlx-lm has none for .*mlp\.switch_mlp\.gate_proj.* \(experts\); name the others, --lora-keys .*q_proj"),
        (quantized, {"lora_keys": ("embed_tokens",)}, r"model\.embed_tokens \(quantized embedding\); use --train-type lora"),
    ],
)
def test_where_there_is_no_dora(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(make(), options(train_type="dora", **changes))
