"""Activations that are computed again give the same numbers, keep less, and can be undone."""

import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations, gpt_oss, qwen3
from mlx_lm.models.activations import swiglu

from benchmarks.small import build
from mlxlora import AdapterOptions, prepare
from mlxlora.data.batching import collate
from mlxlora.models.activations import Recomputed, hook_activations, recomputed_activations
from mlxlora.objectives.supervised import sft
from mlxlora.utils.patches import restore
from tests.support.tiny import LLAMA, dense, distance, experts, loss_and_gradient, shaken, softcapped
from tests.support.tiny import example as random_example

ROWS = [random_example(seed) for seed in range(3)]


def sinks() -> nn.Module:
    config = LLAMA | {"model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
    return gpt_oss.Model(gpt_oss.ModelArgs.from_dict(config | {"layer_types": ["sliding_attention", "full_attention"]}))


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": dense, "gemma2": softcapped, "experts": experts, "gpt_oss": sinks}


def trained(make: Callable[[], nn.Module]) -> nn.Module:
    mx.random.seed(0)
    return shaken(prepare(make(), AdapterOptions(num_layers=-1, rank=4)))


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(MODELS[name])
    loss, gradient = loss_and_gradient(model, sft(), collate(ROWS))
    restore(model)
    monkeypatch.setattr("mlxlora.models.row_layouts.hook_activations", lambda _: None)
    expected, plain = loss_and_gradient(trained(MODELS[name]), sft(), collate(ROWS))
    assert loss["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert distance(gradient, plain) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_restoring_a_model_gives_its_functions_back(name: str) -> None:
    first, second = trained(MODELS[name]), trained(MODELS[name])
    module = next(sys.modules[type(m).__module__] for m in first.modules() if "mlx_lm.models" in type(m).__module__)
    before = dict(vars(module))
    for model in (first, second, first):
        hook_activations(model)
    assert module.nn is not nn and module.nn.silu(mx.array(1.0)).item() == nn.silu(mx.array(1.0)).item()
    restore(first)
    assert module.nn is not nn  # the second model still needs it
    restore(second)
    assert dict(vars(module)) == before


def test_only_the_inputs_are_kept() -> None:
    """Not the sigmoid and the silu."""
    size = 1 << 18

    def peak(function: Any) -> int:
        def steps(gate: mx.array, x: mx.array) -> mx.array:
            for _ in range(10):
                gate = function(gate, x)
            return gate.sum()

        given = [mx.random.normal((size,), key=mx.random.key(seed)) for seed in (0, 1)]
        mx.eval(given)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        with recomputed_activations():
            mx.eval(mx.grad(steps, argnums=(0, 1))(*given))
        return (mx.get_peak_memory() - before) // (4 * size)

    assert peak(Recomputed(swiglu)) < peak(swiglu)  # not a model's, which may be hooked


def test_other_arguments_than_arrays_pass() -> None:
    scaled = Recomputed(lambda x, factor=1.0: factor * mx.square(x))
    with recomputed_activations():
        assert mx.grad(lambda x: scaled(x, factor=3.0))(mx.array(2.0)).item() == 12
        assert mx.grad(lambda x: scaled(x, 2.0))(mx.array(2.0)).item() == 8


def test_models_of_other_architectures_train_after_one_another() -> None:
    """None replaces what the Python module of another one uses, or imports later."""
    models = {name: build(name) for name in ("gpt_oss", "gemma4_text", "qwen3", "gemma2", "llama", "phi3")}
    for model in models.values():
        loss_and_gradient(prepare(model, AdapterOptions(num_layers=-1, rank=4)), sft(), collate(ROWS))
    gate, x = mx.random.normal((2, 8), key=mx.random.key(0))
    exact = nn.silu(gate) * x
    assert mx.allclose(mx.compile(qwen3.swiglu, shapeless=True)(gate, x), exact) and mx.allclose(swiglu(gate, x), exact)
    assert not isinstance(swiglu, Recomputed) and not isinstance(activations.swiglu_oai, Recomputed)
    for model in models.values():
        restore(model)


def test_only_scoring_recomputes() -> None:
    """Elsewhere a hooked model computes as mlx-lm's does, so it can be compiled for all shapes."""
    model = trained(dense)
    hook_activations(model)
    gate = mx.random.normal((2, 8), key=mx.random.key(0))
    called = sys.modules[type(model.layers[0].mlp).__module__].swiglu
    assert isinstance(called, Recomputed)
    assert mx.allclose(mx.compile(called, shapeless=True)(gate, gate), nn.silu(gate) * gate)
    with recomputed_activations(), pytest.raises(ValueError, match="output shapes"):
        mx.eval(mx.compile(lambda g: called(g, g), shapeless=True)(gate))
    restore(model)
