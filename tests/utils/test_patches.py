"""Whatever mlxlora changes on a model in place, `restore` undoes."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import base, llama, qwen3

from mlxlora.adapters.prepare import disabled, prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import collate
from mlxlora.models.attention import attend, hook
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.models.logprobs import scorer
from mlxlora.models.modes import computing, round_weights
from mlxlora.models.neftune import noisy
from mlxlora.models.row_layouts import mask_axes, use_windows
from mlxlora.utils.patches import Slot, converted, overridden, restore, set_class, subclass
from tests.models.test_attention import MODELS
from tests.support.ranks import ended, launched
from tests.support.tiny import dense, example

TOKENS = mx.array([[1, 2, 3, 4]])
PLAIN = base.scaled_dot_product_attention


def halved(model: nn.Module) -> dict[str, mx.array]:
    return {
        name: 0.5 * array
        for name, array in dict(tree_flatten(model.parameters())).items()
        if "q_proj." in name and name.endswith("weight")
    }


def windowed(model: nn.Module) -> None:
    use_windows(model, model)


PATCHES: dict[str, Callable[[nn.Module], Any]] = {
    "checkpointing": checkpointed,
    "noise": lambda model: noisy(model, 5.0),
    "attention": hook,
    "mask axes": mask_axes,
    "windows": windowed,
    "rounding": lambda model: round_weights(model, halved),
    "scoring": lambda model: scorer(model)(collate([example(0)])),
}


def looks(model: nn.Module) -> list[Any]:
    """Classes and attributes of every module: what a patch could have changed besides parameters."""
    return [(type(m), sorted(m.__dict__)) for _, m in sorted(model.named_modules(), key=lambda item: item[0])]


def computed(model: nn.Module) -> np.ndarray:
    with computing(model, model.trainable_parameters()):
        return np.array(model(TOKENS))


@pytest.mark.parametrize("names", [[name] for name in PATCHES] + [list(PATCHES), list(PATCHES)[::-1]], ids="+".join)
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_restore_undoes(architecture: str, names: list[str]) -> None:
    model = MODELS[architecture]().train()
    before, logits = looks(model), computed(model)
    for name in names:
        PATCHES[name](model)
    assert looks(model) != before
    assert restore(model) is model
    assert looks(model) == before
    np.testing.assert_array_equal(computed(model), logits)


def test_a_model_that_was_never_patched_stays_as_it_is() -> None:
    model = dense()
    before = looks(model)
    assert looks(restore(model)) == before


def test_paths_of_parameters_stay() -> None:
    model, plain = checkpointed(noisy(dense(), 5.0)), dense()
    assert [name for name, _ in tree_flatten(model.parameters())] == [name for name, _ in tree_flatten(plain.parameters())]


def test_a_function_of_an_architecture_stays_replaced_while_a_model_needs_it() -> None:
    function = llama.scaled_dot_product_attention
    models = [dense(), dense()]
    for model in (*models, models[0]):
        hook(model)
        assert llama.scaled_dot_product_attention is attend
    restore(models[0])
    assert llama.scaled_dot_product_attention is attend
    restore(models[1])
    restore(models[1])
    assert llama.scaled_dot_product_attention is function


def test_other_architectures_keep_their_function() -> None:
    model = dense()
    before = qwen3.scaled_dot_product_attention
    hook(model)
    assert qwen3.scaled_dot_product_attention is before and base.scaled_dot_product_attention is PLAIN
    restore(model)


def test_a_copy_has_its_own_patches() -> None:
    model = checkpointed(prepare(dense(), AdapterOptions(num_layers=-1, dropout=0.5)))
    copy = deepcopy(model)
    restore(model)
    assert type(copy.layers[0]) is not type(model.layers[0])  # type: ignore[union-attr]
    before = looks(restore(copy))
    assert before == looks(model)


def test_patches_nest() -> None:
    """A class on top of another class, and the way back to the first one."""
    module = nn.Linear(2, 2)
    for factor in (2.0, 3.0):
        cls = type(module)
        set_class(module, subclass(cls, {"__call__": lambda self, x, cls=cls, factor=factor: factor * cls.__call__(self, x)}))
    x = mx.ones((1, 2))
    patched = module(x)
    assert type(module).__name__ == "Linear" and type(module).__module__ == nn.Linear.__module__
    assert type(restore(module)) is nn.Linear
    np.testing.assert_allclose(patched, 6.0 * module(x), rtol=1e-6)


def test_an_undo_sees_the_module_before_its_class_is_restored() -> None:
    module, seen = nn.Linear(2, 2), []
    set_class(module, subclass(nn.Linear, {"extra": 1}), undo=lambda m: seen.append(m.extra))
    restore(module)
    assert seen == [1]


def test_slots_hold_values_for_a_while() -> None:
    slot: Slot[int] = Slot("number", 0)
    module = nn.Linear(2, 2)
    assert slot.get(module) == 0
    with slot.holding(module, 1), pytest.raises(ZeroDivisionError), slot.holding(module, 2):
        assert slot.get(module) == 2
        raise ZeroDivisionError
    assert slot.get(module) == 0
    assert "number" not in module and not any("number" in name for name, _ in tree_flatten(module.parameters()))


def test_an_override_ends_with_its_block() -> None:
    module = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), overridden([module], lambda cls: {"__call__": lambda self, x: x}):
        assert module(7) == 7
        raise ZeroDivisionError
    assert type(module) is nn.Linear


def test_a_converted_module_has_the_contents_and_no_patches() -> None:
    class Other(nn.Linear):
        pass

    module = checkpointed_dropout()
    new = converted(module, Other)
    assert type(new) is Other and new["weight"] is module["weight"]
    new.freeze()
    assert module._no_grad == set() and restore(new) is new and type(new) is Other


def checkpointed_dropout() -> nn.Module:
    module = nn.Linear(2, 2)
    set_class(module, subclass(nn.Linear, {}))
    return module


def test_the_model_without_adapters_is_not_rounded() -> None:
    model = prepare(dense(), AdapterOptions(num_layers=-1))
    plain = computed(model)
    round_weights(model, halved)
    assert np.abs(computed(model) - plain).max() > 1e-3
    with disabled(model):
        np.testing.assert_array_equal(computed(model), plain)


SLICED = """
import sys
import mlx.core as mx
sys.path.insert(0, sys.argv[1])
from tests.support.tiny import dense
from mlxlora.distributed.ranks import current_ranks
from mlxlora.distributed.sharding import is_sharded, shard
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.utils.patches import restore
from mlx.utils import tree_flatten
model, plain = dense(), dense()
model.lm_head.bias = mx.array(1.0)  # a number, not a row: its shape is ()
before = [(type(m), sorted(m.__dict__)) for m in plain.modules()]
checkpointed(model)
shard(model, current_ranks())
assert is_sharded(model) and any(a.ndim > 2 for _, a in tree_flatten(model.parameters()))
restore(model)
assert not is_sharded(model) and [(type(m), sorted(m.__dict__)) for m in model.modules()] == before
whole, expected = (dict(tree_flatten(m.parameters())) for m in (model, plain))
assert all(mx.array_equal(whole[name], array).item() for name, array in expected.items())
assert whole["lm_head.bias"].shape == () and whole["lm_head.bias"].item() == 1.0
tokens = mx.array([[1, 2, 3]])
assert mx.allclose(model(tokens), plain(tokens) + 1.0, atol=1e-5).item()
"""


@pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend")
def test_slices_of_parameters_become_whole(tmp_path: Path) -> None:
    for code, output in ended(launched(tmp_path, 2, SLICED, Path(__file__).resolve().parents[2])):
        assert code == 0, output
