"""Fused models: the logits of base and adapters, and a warning where quantisation would take them away again."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import load as load_with_mlx_lm

from mlxlora.adapters.files import save
from mlxlora.adapters.fuse import QuantizedUpdate, fuse, merged, warning
from mlxlora.adapters.prepare import load, prepare
from mlxlora.config.options import AdapterOptions, ModelOptions
from mlxlora.errors import InputError
from mlxlora.models.initialize import init_model
from tests.support.tiny import LLAMA, byte_tokenizer, dense, experts, quantized, same, shaken, tied

TOKENS = mx.array([[5, 3, 9, 1, 7, 2]])
KINDS = {
    "lora": (dense, {}),
    "lora on an embedding that is also the head": (tied, {"lora_keys": ("model.embed_tokens",)}),
    "lora on experts": (experts, {}),
    "lora on four bits": (quantized, {}),
    "dora": (dense, {"train_type": "dora"}),
    "dora on four bits": (quantized, {"train_type": "dora"}),
}


def options(**changes: Any) -> AdapterOptions:
    return AdapterOptions(**{"num_layers": -1, "rank": 4, "scale": 3.0} | changes)


@pytest.mark.parametrize(("make", "changes"), KINDS.values(), ids=KINDS.keys())
def test_same_logits(make: Any, changes: dict[str, Any]) -> None:
    model = shaken(prepare(make(), options(**changes))).eval()
    wanted = model(TOKENS)
    whole, config, rounding = merged(model, {"quantization": {"bits": 4}}, dequantize=True)
    assert mx.abs(whole(TOKENS) - wanted).max().item() < 1e-4 < 1e-2 < mx.abs(make()(TOKENS) - wanted).max().item()
    assert rounding is None and config == {}
    assert not [name for name, _ in tree_flatten(whole.parameters()) if "lora" in name or "scales" in name]


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_weights_keep_their_type(kind: str) -> None:
    model = dense()
    model.update(tree_map(lambda weight: weight.astype(mx.bfloat16), model.parameters()))
    for make in (lambda: model, lambda: quantized(lambda: model)):
        whole, *_ = merged(shaken(prepare(make(), options(train_type=kind))), {})
        assert {weight.dtype for _, weight in tree_flatten(whole.parameters())} <= {mx.bfloat16, mx.uint32}


def scaled(model: Any, factor: float) -> Any:
    """The adapters made larger or smaller."""
    for _, module in model.named_modules():
        if "lora_b" in module:
            module.lora_b = module.lora_b * factor
    return model


@pytest.mark.parametrize(("bits", "small", "large"), [(4, 0.02, 0.3), (8, 0.0015, 0.03)])
def test_small_updates_vanish_in_the_steps(bits: int, small: float, large: float) -> None:
    """On quantized weights, rounding removes an update below half a step and keeps one of several steps."""

    def rounded(factor: float) -> QuantizedUpdate:
        mx.random.seed(0)
        base = dense()
        nn.quantize(base, group_size=32, bits=bits)
        *_, rounding = merged(scaled(shaken(prepare(base, options())), factor), {})
        assert rounding is not None
        return rounding

    size = rounded(1.0).size
    lost, left = (rounded(wanted / size) for wanted in (small, large))
    assert abs(lost.size / small - 1) < 0.03 and lost.kept < 0.4 and lost.noise > 1
    assert (
        warning(lost).startswith("quantization rounds the update away: ")
        and "% of it is left" in warning(lost)
        and "\n" not in warning(lost)
    )
    assert "it becomes 1.6 times as large; use --dequantize" in warning(QuantizedUpdate(kept=1.6, noise=9.0, size=0.001))
    assert abs(left.kept - 1) < 0.1 and left.noise < 0.6 and warning(left) == ""


def test_quantizing_what_was_not_quantized_keeps_updates() -> None:
    """Weights off the grid round by chance, up as often as an update asks for it."""
    model = scaled(shaken(prepare(dense(), options())), 0.1)
    _, config, rounding = merged(model, {}, quantize="4")
    assert rounding is not None and rounding.kept > 0.9 and warning(rounding) == ""
    assert config["quantization"] == {"group_size": 64, "bits": 4, "mode": "affine"}


# --- files --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama that mlx-lm can convert to GGUF."""
    root = tmp_path_factory.mktemp("base")
    byte_tokenizer().save_pretrained(root / "tokenizer")
    (root / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 288, "max_position_embeddings": 128}))
    init_model(root / "config.json", root / "tokenizer", root / "model", 0, "float32")
    (root / "model" / "generation_config.json").write_text('{"temperature": 0.5}')
    return root / "model"


@pytest.fixture
def adapters(base: Path, tmp_path: Path) -> Path:
    """A folder that a run might have left; its update is small."""
    model, _ = load(ModelOptions(model=str(base)))
    save(scaled(shaken(prepare(model, options())), 0.003), tmp_path / "adapters", options(), str(base))
    return tmp_path / "adapters"


def test_a_model_is_named_by_its_folder_or_by_options(base: Path, adapters: Path, tmp_path: Path) -> None:
    for name, model in (("folder", str(base)), ("options", ModelOptions(model=str(base)))):
        fuse(model, str(adapters), tmp_path / name)
    one, other = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("folder", "options"))
    assert same(one, other)


def test_a_folder_that_mlx_lm_loads(mlxlora: Any, base: Path, adapters: Path, tmp_path: Path) -> None:
    done = mlxlora(
        "fuse", "--adapter-path", adapters, "--save-path", tmp_path / "fused", "--gguf", tmp_path / "gguf" / "model.gguf"
    )
    assert done.code == 0 and not done.err, done
    model, tokenizer, *_ = load_with_mlx_lm(str(tmp_path / "fused"))
    wanted, _ = load(ModelOptions(model=str(base)), str(adapters))
    assert mx.abs(model(TOKENS) - wanted(TOKENS)).max().item() < 1e-4
    assert tokenizer.encode("hello") == load_with_mlx_lm(str(base))[1].encode("hello")
    assert (tmp_path / "fused" / "generation_config.json").is_file()
    assert str(tmp_path) not in (tmp_path / "fused" / "README.md").read_text()
    gguf = mx.load(str(tmp_path / "gguf" / "model.gguf"))
    assert gguf["blk.1.ffn_up.weight"].shape == (128, 64)
    assert [path.name for path in (tmp_path / "gguf").iterdir()] == ["model.gguf"]


def test_quantized_bases(mlxlora: Any, base: Path, adapters: Path, tmp_path: Path) -> None:
    def fused(model: Path, name: str, *more: object) -> Any:
        return mlxlora("fuse", "--model", model, "--adapter-path", adapters, "--save-path", tmp_path / name, *more)

    small = fused(base, "small", "--quantize", "4")
    assert small.code == 0 and "quantization keeps" in small.out and not small.err
    again = fused(tmp_path / "small", "again")
    assert again.code == 0 and "quantization rounds the update away" in again.err and again.err.count("\n") == 1
    assert again.err.strip().endswith("use --dequantize")
    dense = fused(tmp_path / "small", "dense", "--dequantize")
    assert dense.code == 0 and "quantising" not in dense.out + dense.err
    assert "quantization" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    wanted, _ = load(ModelOptions(model=str(tmp_path / "small")), str(adapters))
    model, *_ = load_with_mlx_lm(str(tmp_path / "dense"))
    assert mx.abs(model(TOKENS) - wanted(TOKENS)).max().item() < 1e-4
    other = fused(tmp_path / "small", "other", "--quantize", "mxfp4")
    assert other.code == 0 and load_with_mlx_lm(str(tmp_path / "other"))[0](TOKENS).shape == (1, 6, 288)
    assert json.loads((tmp_path / "other" / "config.json").read_text())["quantization"]["mode"] == "mxfp4"
    assert "--gguf needs weights that are not quantized; use --dequantize" in fused(tmp_path / "small", "x", "--gguf", "x.gguf").err


def test_mistakes(base: Path, adapters: Path, tmp_path: Path) -> None:
    def refused(*arguments: Any, **named: Any) -> str:
        with pytest.raises(InputError) as raised:
            fuse(ModelOptions(model=str(base)), *arguments, **named)
        return str(raised.value)

    assert "exclude each other" in refused(str(adapters), tmp_path / "x", dequantize=True, quantize="4")
    assert "--quantize must be one of 2, 3" in refused(str(adapters), tmp_path / "x", quantize="5.5")
    assert "is read from there" in refused(str(adapters), base, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "exists and is not empty" in refused(str(adapters), tmp_path / "mine")
    assert "would delete something else" in refused(str(adapters), tmp_path / "mine", overwrite=True)
    assert "no adapters there" in refused(str(tmp_path / "nothing"), tmp_path / "x")
    assert not (tmp_path / "x").exists()
