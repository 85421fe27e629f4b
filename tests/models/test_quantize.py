"""Quantized while loaded, a model is what a converted one is. Rounded in training, it is what it will be, and loses less by it."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm import convert
from mlx_lm import load as load_with_mlx_lm

import mlxlora as ml
from mlxlora.adapters.files import read_adapter_config
from mlxlora.adapters.fuse import merged
from mlxlora.adapters.lora import adapters_of, base_of_adapter, update_of
from mlxlora.adapters.prepare import base_of, disabled, prepare
from mlxlora.config.options import AdapterOptions, DPOOptions, ModelOptions, Training
from mlxlora.data.batching import collate
from mlxlora.errors import InputError
from mlxlora.models.initialize import init_model
from mlxlora.models.loading import load_with_config
from mlxlora.models.logprobs import scorer
from mlxlora.models.modes import computing, evaluating
from mlxlora.models.quantize import QUANTIZATIONS, quantize_as
from mlxlora.objectives.objective import Objective
from mlxlora.objectives.preference import dpo, orpo
from mlxlora.objectives.supervised import sft
from mlxlora.training.optimizers import make_optimizer
from mlxlora.training.other_models import cached_reference
from mlxlora.training.step import make_step
from tests.support.tiny import (
    LLAMA,
    byte_tokenizer,
    dense,
    example,
    experts,
    loss_and_gradient,
    quantized,
    same,
    shaken,
    snapshot,
    text_rows,
    tied,
)

TOKENS = mx.array([[5, 3, 9, 1, 7, 2]])
FORMATS = tuple(QUANTIZATIONS)


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_rows(tmp_path_factory.mktemp("rows"), longest=4, train=12, valid=4, test=4)


def run(folder: Path, model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    few = {"iters": 3, "batch_size": 2, "num_layers": 1, "answers": 0, "val_batches": 1, "quiet": True, "learning_rate": 1e-3}
    return ml.sft(model=str(model), data=str(data), adapter_path=str(folder), **(few | changes))


# --- as it is loaded ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_converted_model(form: str, model_folder: Path, tmp_path: Path) -> None:
    how = {f"q_{name}": value for name, value in QUANTIZATIONS[form].items()}
    convert(str(model_folder), str(tmp_path / "converted"), quantize=True, **how)
    theirs, *_ = load_with_mlx_lm(str(tmp_path / "converted"))
    ours, _, config = load_with_config(ModelOptions(model=str(model_folder), quantize=form))  # type: ignore[arg-type]
    assert weights(ours).keys() == weights(theirs).keys()
    assert all(mx.array_equal(array, weights(theirs)[name]) for name, array in weights(ours).items())
    assert config["quantization"] == json.loads((tmp_path / "converted" / "config.json").read_text())["quantization"]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_it_trains_as_a_converted_model(kind: str, model_folder: Path, data: Path, tmp_path: Path, eager: None) -> None:
    convert(str(model_folder), str(tmp_path / "converted"), quantize=True, q_bits=4)
    run(tmp_path / "ours", model_folder, data, quantize="4", train_type=kind)
    run(tmp_path / "theirs", tmp_path / "converted", data, train_type=kind)
    ours, theirs = (mx.load(str(tmp_path / name / "adapters.safetensors")) for name in ("ours", "theirs"))
    assert same(snapshot(ours), snapshot(theirs))


def test_what_is_left_says_so(mlxlora: Any, model_folder: Path, data: Path, tmp_path: Path, eager: None) -> None:
    """Without --model the base is as it was trained on; with it, as it says."""
    adapters = tmp_path / "adapters"
    run(adapters, model_folder, data, quantize="4")
    assert read_adapter_config(adapters)["quantize"] == "4"
    assert "quantized to 4 bits as it was loaded (`--quantize 4`)" in (adapters / "README.md").read_text()
    assert base_of(ModelOptions(), adapters) == ModelOptions(model=str(model_folder), quantize="4")
    assert base_of(ModelOptions(model="other"), adapters) == ModelOptions(model="other")
    model, *_ = load_with_mlx_lm(str(model_folder), adapter_path=str(adapters))
    assert mx.isfinite(model(TOKENS)).all().item()
    asked = ("generate", "--adapter-path", adapters, "--prompt", "abc", "--max-tokens", 4)
    first, second = (mlxlora(*asked, *more) for more in ((), ("--model", model_folder, "--quantize", 4)))
    assert first.out.splitlines()[-1] == second.out.splitlines()[-1] and first.code == second.code == 0
    loss_mask = mlxlora("eval", "--model", model_folder, "--quantize", "4", "--data", data, "--adapter-path", adapters)
    assert loss_mask.code == 0, loss_mask.err
    assert loss_mask.out != mlxlora("eval", "--model", model_folder, "--data", data, "--adapter-path", adapters).out
    assert mlxlora("fuse", "--adapter-path", adapters, "--save-path", tmp_path / "fused").code == 0
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["quantization"]["bits"] == 4


def test_the_model_is_never_whole_in_memory(tmp_path: Path) -> None:
    """Weight after weight: what is held at most is the result and one matrix."""
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 288, "hidden_size": 512, "intermediate_size": 1024}))
    init_model(tmp_path / "config.json", tmp_path / "tokenizer", tmp_path / "model", 0, "bfloat16")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model, _ = ml.load(ModelOptions(model=str(tmp_path / "model"), quantize="4"))
    assert mx.get_peak_memory() - before < 0.6 * size and model


def test_references_of_both_are_kept_apart(model_folder: Path) -> None:
    plain, small = (cached_reference(ModelOptions(model=str(model_folder), quantize=form), DPOOptions()) for form in (None, "4"))  # type: ignore[arg-type]
    assert plain.cache != small.cache
    other = [cached_reference(ModelOptions(model="x", quantize=form), DPOOptions(reference_model_path="y")) for form in (None, "4")]  # type: ignore[arg-type]
    assert other[0].cache == other[1].cache, "another model is loaded as it is"


def test_what_cannot_be_quantized(model_folder: Path, tmp_path: Path) -> None:
    convert(str(model_folder), str(tmp_path / "converted"), quantize=True, q_bits=8)
    with pytest.raises(InputError, match=r"--quantize 4: the model is quantized already \(8 bits\); leave --quantize out"):
        ml.load(ModelOptions(model=str(tmp_path / "converted"), quantize="4"))
    with pytest.raises(InputError, match="--quantize must be one of 2, 3, 4, 5, 6, 8, mxfp4, mxfp8, nvfp4, got '7'"):
        ModelOptions(model="x", quantize="7")  # type: ignore[arg-type]


# --- in training --------------------------------------------------------------------------------

AWARE: dict[str, Any] = {
    "full": (dense, {"train_type": "full"}),
    "full, the last block": (dense, {"train_type": "full", "num_layers": 1}),
    "lora": (dense, {}),
    "lora on an embedding that is also the head": (tied, {"lora_keys": ("all-linear", "embed_tokens")}),
    "lora on experts": (experts, {}),
    "lora from components": (dense, {"init_lora_weights": "pissa"}),
}
each_kind = pytest.mark.parametrize(("make", "changes"), AWARE.values(), ids=AWARE.keys())


def aware(make: Any, form: str = "4", **changes: Any) -> nn.Module:
    chosen = AdapterOptions(**{"num_layers": -1, "rank": 4, "scale": 3.0, "qat": form} | changes)
    return shaken(prepare(make(), chosen), 0.02).eval()


@pytest.mark.parametrize("form", FORMATS)
@each_kind
def test_the_model_computes_as_it_will(make: Any, changes: dict[str, Any], form: str) -> None:
    """The logits of the model that was fused and quantized; its own weights stay."""
    model = aware(make, form, **changes)
    before, exact = snapshot(model.parameters()), model(TOKENS)
    with evaluating(model):
        logits = model(TOKENS)
        mx.eval(logits)
    assert same(snapshot(model.parameters()), before) and mx.array_equal(model(TOKENS), exact)
    plain = make()
    plain.load_weights([(name, array) for name, array in weights(fused(model)).items()])
    whole, _ = quantize_as(plain, {}, form)
    error = mx.abs(logits - whole(TOKENS)).max().item()
    assert error < 1e-3 * mx.abs(exact).max().item() < mx.abs(logits - exact).max().item() or (form in ("6", "8") and error < 5e-3)


def fused(model: nn.Module) -> nn.Module:
    """W + ΔW; PiSSA's start is taken away from W."""
    bases = []
    for path, m in adapters_of(model).items():
        base = base_of_adapter(m)
        base.weight = base.weight + update_of(m)
        bases.append((path, base))
    model.update_modules(tree_unflatten(bases))
    return model


def test_the_gradient_passes_straight_through() -> None:
    """That of the rounded weights, at them."""
    batch, model, plain = collate([example(i) for i in range(3)]), aware(dense, train_type="full"), dense()
    with computing(model, model.trainable_parameters()) as parameters:
        plain.update(parameters)
    _, wanted = loss_and_gradient(plain, sft(), batch)
    step = make_step(model, make_optimizer(Training(), 1), sft())
    found, _ = step.backward(batch, sft().counts(batch))
    found = dict(tree_flatten(step.trained.unpack(found)))
    assert all(mx.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-6) for name in wanted)


def test_the_reference_is_not_rounded() -> None:
    model = aware(dense)
    with disabled(model), evaluating(model):
        assert mx.array_equal(model(TOKENS), dense()(TOKENS))


STEPS = 22
OBJECTIVES = {"sft": sft(), "dpo": dpo(beta=0.3), "orpo": orpo(beta=0.3)}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_quantizing_loses_less(name: str, kind: str, eager: None) -> None:
    """The loss of the quantized model after the same steps, with and without."""
    losses = {form: _quantized_loss(OBJECTIVES[name], kind, form) for form in (None, "4")}
    assert losses["4"] < 0.9 * losses[None], losses


def _quantized_loss(objective: Objective, kind: str, form: str | None) -> float:
    mx.random.seed(0)
    batch = collate([example(i, reference=True) for i in range(8)])
    chosen = AdapterOptions(train_type=kind, num_layers=-1, rank=8, scale=4.0, qat=form)  # type: ignore[arg-type]
    model = prepare(dense(), chosen).train()
    step = make_step(model, make_optimizer(Training(learning_rate=3e-3), STEPS), objective)
    for _ in range(STEPS):
        step(batch)
    whole, *_ = merged(model.eval(), {}, quantize="4")
    with evaluating(whole):
        return objective(*scorer(whole)(batch))[0].item()


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (quantized, {}, "--qat 4: the model is quantized; omit --quantize or use a model that is not"),
        (dense, {"train_type": "dora"}, "--qat 4 goes with --train-type lora or full"),
    ],
)
def test_where_it_cannot_be(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepare(make(), AdapterOptions(qat="4", num_layers=-1, **changes))


def test_a_run_with_it(model_folder: Path, data: Path, tmp_path: Path, eager: None) -> None:
    for kind in ("lora", "full"):
        run(tmp_path / kind, model_folder, data, qat="4", train_type=kind, test=True)
        rows = [json.loads(line) for line in (tmp_path / kind / "metrics.jsonl").read_text().splitlines()]
        assert all(np.isfinite(row["loss"]) for row in rows)
        model, *_ = load_with_mlx_lm(str(model_folder), adapter_path=str(tmp_path / kind))
        assert mx.isfinite(model(TOKENS)).all().item()
