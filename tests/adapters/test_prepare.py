"""What is trained, and the files that it becomes: mlx-lm reads them, and a mistake is one line."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import orjson
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from mlxlora.adapters.files import mismatches, read_adapter_config, read_arrays, save
from mlxlora.adapters.prepare import load_weights, prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.errors import InputError
from tests.support.tiny import dense, experts, quantized, same, shaken, snapshot, tied

TOKENS = mx.array([[5, 3, 9, 1, 7, 2]])
KINDS = {
    "lora": (dense, {}),
    "lora of the last block": (dense, {"num_layers": 1}),
    "lora of some modules": (dense, {"lora_keys": ("self_attn.q_proj", "lm_head")}),
    "lora on four bits": (lambda: quantized(dense), {}),
    "lora on experts": (experts, {}),
    "lora on an embedding": (tied, {"lora_keys": ("model.embed_tokens",)}),
    "dora": (dense, {"train_type": "dora"}),
    "full": (dense, {"train_type": "full"}),
    "full, the last block": (dense, {"train_type": "full", "num_layers": 1}),
}


def options(**changes: Any) -> AdapterOptions:
    return AdapterOptions(**{"num_layers": -1, "rank": 4, "scale": 3.0} | changes)


@pytest.mark.parametrize(("make", "changes"), KINDS.values(), ids=KINDS.keys())
def test_mlx_lm_loads_what_is_saved(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    trained = shaken(prepare(make(), options(**changes)))
    save(trained, tmp_path, options(**changes), "some/model")
    loaded = load_adapters(make(), str(tmp_path))
    loaded.eval()
    weights = dict(tree_flatten(loaded.parameters()))
    assert all(mx.array_equal(weights[name], array) for name, array in tree_flatten(trained.parameters()))
    assert mx.allclose(loaded(TOKENS), trained(TOKENS), rtol=1e-5, atol=2e-5)  # ours adds the update in the product's kernel
    assert not mx.allclose(trained(TOKENS), make()(TOKENS), atol=1e-3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapters.safetensors"]


@pytest.mark.parametrize(("make", "changes"), KINDS.values(), ids=KINDS.keys())
def test_we_load_what_is_saved(make: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    trained, fresh = shaken(prepare(make(), options(**changes))), prepare(make(), options(**changes))
    save(trained, tmp_path, options(**changes))
    load_weights(fresh, tmp_path)
    assert same(snapshot(fresh.parameters()), snapshot(trained.parameters()))


def test_configuration_is_mlx_lms(tmp_path: Path) -> None:
    save(prepare(dense(), options(dropout=0.1)), tmp_path, options(dropout=0.1), "some/model")
    assert orjson.loads((tmp_path / "adapter_config.json").read_bytes()) == {
        "model": "some/model",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": 4, "dropout": 0.1, "scale": 3.0},
    }


def trainable(model: nn.Module) -> set[str]:
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_what_is_trainable() -> None:
    everything = {name for name, _ in tree_flatten(dense().parameters())}
    assert trainable(prepare(dense(), options(train_type="full"))) == everything
    last = {name for name in everything if name.startswith("model.layers.1.")}
    assert trainable(prepare(dense(), options(train_type="full", num_layers=1))) == last
    one = prepare(dense(), options(num_layers=1, lora_keys=("mlp.up_proj",)))
    assert trainable(one) == {"model.layers.1.mlp.up_proj.lora_a", "model.layers.1.mlp.up_proj.lora_b"}


def test_a_fresh_adapter_changes_nothing() -> None:
    assert mx.array_equal(prepare(dense(), options())(TOKENS), dense()(TOKENS))


# --- mistakes -----------------------------------------------------------------------------------

MISTAKES = {
    "more layers than the model has": (dense, {"num_layers": 3}, "--num-layers 3: the model has 2 layers; use 2 or -1 for all"),
    "an unknown module": (
        dense,
        {"lora_keys": ("self_attn.wq", "mlp.up_proj")},
        "--lora-keys: the model has no module self_attn.wq; ",
    ),
    "a module that mlx-lm cannot adapt": (dense, {"lora_keys": ("mlp",)}, "name other modules with --lora-keys"),
    "dora on experts": (experts, {"train_type": "dora"}, "--train-type dora: "),
    "quantized weights in full": (
        lambda: quantized(dense),
        {"train_type": "full"},
        "--train-type full cannot train quantized weights",
    ),
}


@pytest.mark.parametrize(("make", "changes", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_are_one_line(make: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        prepare(make(), options(**changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_an_unknown_module_lists_those_there_are() -> None:
    with pytest.raises(InputError, match=r"no module query; a block has .*self_attn\.q_proj"):
        prepare(dense(), options(lora_keys=("query",)))


def test_a_last_name_stands_for_its_paths(tmp_path: Path) -> None:
    """Written as paths, which is all that mlx-lm reads."""
    chosen = options(lora_keys=("q_proj", "mlp.up_proj"))
    model = prepare(dense(), chosen)
    save(model, tmp_path, chosen)
    assert read_adapter_config(tmp_path)["lora_parameters"]["keys"] == ["self_attn.q_proj", "mlp.up_proj"]
    assert all(".q_proj." in name or ".up_proj." in name for name, _ in tree_flatten(model.trainable_parameters()))


def test_the_first_mismatches_are_in_one_message(tmp_path: Path) -> None:
    save(prepare(dense(), options(rank=2, lora_keys=("mlp.up_proj", "mlp.gate_proj"))), tmp_path, options())
    with pytest.raises(InputError) as raised:
        load_weights(prepare(dense(), options(lora_keys=("mlp.up_proj", "mlp.down_proj"))), tmp_path)
    message = str(raised.value)
    assert "up_proj.lora_a has shape [64, 2], not [64, 4]" in message
    assert message.startswith(str(tmp_path)) and message.count("; ") == 2
    assert message.endswith(" and 9 more") and "\n" not in message


def test_mismatches_are_of_three_kinds() -> None:
    arrays = {"a": mx.zeros((2, 3)), "b": mx.zeros((1,))}
    wanted = {"a": mx.zeros((3, 2)), "c": mx.zeros((1,))}
    assert mismatches(arrays, wanted) == "a has shape [2, 3], not [3, 2]; b is not trainable in the model; c is missing"
    assert mismatches(arrays, arrays) == ""


def test_files_that_are_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; expected a safetensors file"):
        read_arrays(tmp_path / "nothing.safetensors")
    save(prepare(dense(), options()), tmp_path, options())
    file = tmp_path / "adapters.safetensors"
    whole = file.read_bytes()
    for content in (b"", b"text", whole[:20], whole[:-50]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="not a readable safetensors file"):
            read_arrays(file)
