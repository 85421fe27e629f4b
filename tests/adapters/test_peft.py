"""Adapters in peft's format: the same numbers there and back, and the same logits through peft and through its formula."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file

from mlxlora.adapters.files import save
from mlxlora.adapters.fuse import fuse
from mlxlora.adapters.peft import _check_exportable, _checkpoint_names, _scale, alpha, from_peft, to_peft
from mlxlora.adapters.prepare import attach, load, load_weights, prepare
from mlxlora.config.options import AdapterOptions, ModelOptions
from mlxlora.errors import InputError
from mlxlora.models.initialize import init_model
from tests.support.tiny import LLAMA, MOE, byte_tokenizer, shaken

TOKENS = [[5, 3, 9, 1, 7, 2]]
QWEN3 = LLAMA | {"model_type": "qwen3", "max_position_embeddings": 128, "rope_theta": 1e4, "tie_word_embeddings": True}
LLAMAS = LLAMA | {"attention_bias": True, "mlp_bias": False}
ARCHITECTURES = {
    "llama": (LLAMAS, "LlamaForCausalLM"),
    "qwen3": (QWEN3, "Qwen3ForCausalLM"),
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora of the last block": {"num_layers": 1},
    "lora of some modules": {"lora_keys": ("self_attn.q_proj", "mlp.down_proj"), "rank": 3, "scale": 0.07},
    "dora": {"train_type": "dora"},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of each architecture."""
    root = tmp_path_factory.mktemp("bases")
    byte_tokenizer().save_pretrained(root / "tokenizer")
    for name, (config, architecture) in ARCHITECTURES.items():
        file = root / f"{name}.json"
        file.write_text(json.dumps(config | {"vocab_size": 288, "architectures": [architecture], "initializer_range": 0.2}))
        init_model(file, root / "tokenizer", root / name, 1, "float32")
    return {name: root / name for name in ARCHITECTURES}


def trained(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter folder that a run might have left."""
    options = AdapterOptions(**{"num_layers": -1, "rank": 4, "scale": 3.0} | changes)
    model, _ = load(ModelOptions(model=str(base)))
    save(shaken(prepare(model, options)), folder, options, str(base))
    return folder


def logits(base: Path, adapters: Path) -> np.ndarray:
    model, *_ = load_model(base)
    return np.array(attach(model, adapters)(mx.array(TOKENS))[0])


def model_of(base: Path) -> ModelOptions:
    return ModelOptions(model=str(base))


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_there_and_back(name: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    before = trained(bases[name], tmp_path / "adapters", **changes)
    modules = to_peft(model_of(bases[name]), before, tmp_path / "peft")
    assert from_peft(tmp_path / "peft", ModelOptions(), tmp_path / "back") == modules
    old, new = (load_file(folder / "adapters.safetensors") for folder in (before, tmp_path / "back"))
    assert old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (before, tmp_path / "back"))
    assert {k: sorted(v) if k == "keys" else v for k, v in old["lora_parameters"].items()} == new["lora_parameters"]
    assert old | {"lora_parameters": 0} == new | {"lora_parameters": 0}


@given(st.integers(1, 10**6), st.integers(-6, 3), st.integers(1, 1024))
@settings(deadline=None, max_examples=300)
def test_scale_survives(digits: int, exponent: int, rank: int) -> None:
    """One of up to six digits, whatever the rank."""
    scale = float(f"{digits}e{exponent}")
    assert _scale("", rank, {"lora_alpha": alpha(scale, rank)}) == scale


def adapted(weight: np.ndarray, module: str, file: dict[str, np.ndarray], config: dict[str, Any]) -> np.ndarray:
    """The weight that peft makes of one, from its files: W + α/r B A, for DoRA with rows of length m."""
    a, b = (file[f"base_model.model.{module}.{part}.weight"] for part in ("lora_A", "lora_B"))
    whole = weight + config["lora_alpha"] / config["r"] * (b @ a)
    if not config["use_dora"]:
        return whole
    length = file[f"base_model.model.{module}.lora_magnitude_vector"]
    return length[:, None] * whole / np.linalg.norm(whole, axis=1, keepdims=True)


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
def test_formula(changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    adapters = trained(bases["llama"], tmp_path / "adapters", **changes)
    modules = to_peft(model_of(bases["llama"]), adapters, tmp_path / "peft")
    file, config = (
        load_file(tmp_path / "peft/adapter_model.safetensors"),
        json.loads((tmp_path / "peft/adapter_config.json").read_text()),
    )
    paths = sorted({key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in file})
    assert len(paths) == modules
    model, *_ = load_model(bases["llama"])
    named: dict[str, Any] = dict(model.named_modules())
    for path in paths:
        named[path].weight = mx.array(adapted(np.array(named[path].weight), path, file, config))
    assert np.abs(np.array(model(mx.array(TOKENS))[0]) - logits(bases["llama"], adapters)).max() < 1e-4


@pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore")
def test_peft_reads_it(name: str, changes: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch and peft")
    peft = pytest.importorskip("peft", reason="needs torch and peft")
    from transformers import AutoModelForCausalLM

    adapters = trained(bases[name], tmp_path / "adapters", **changes)
    to_peft(model_of(bases[name]), adapters, tmp_path / "peft")
    base = AutoModelForCausalLM.from_pretrained(bases[name], dtype=torch.float32)
    with torch.no_grad():
        plain = base(torch.tensor(TOKENS)).logits[0].numpy()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()(torch.tensor(TOKENS)).logits[0].numpy()
    ours = logits(bases[name], adapters)
    error = np.abs(theirs - ours).max()
    print(f"{name}: logits differ by {error:.1e} of {np.abs(ours).max():.1f}")
    assert error < 1e-4 < 1e-2 < np.abs(theirs - plain).max()


@pytest.mark.parametrize(
    "more", [{}, {"use_rslora": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"mlp.up_proj": 5}}]
)
@pytest.mark.filterwarnings("ignore")
def test_we_read_pefts(more: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch and peft")
    peft = pytest.importorskip("peft", reason="needs torch and peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(bases["qwen3"], dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(base, config)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "peft")
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(TOKENS)).logits[0].numpy()
    assert from_peft(tmp_path / "peft", model_of(bases["qwen3"]), tmp_path / "adapters") == 4
    assert np.abs(theirs - logits(bases["qwen3"], tmp_path / "adapters")).max() < 1e-4


# --- mistakes -----------------------------------------------------------------------------------


def refused(call: Any, *arguments: Any, **named: Any) -> str:
    """The one line that a mistake is."""
    with pytest.raises(InputError) as raised:
        call(*arguments, **named)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_quantized_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    base, small = model_of(bases["llama"]), tmp_path / "small"
    fuse(base, str(trained(bases["llama"], tmp_path / "any")), small, quantize="4")
    adapters = trained(small, tmp_path / "adapters", train_type="dora")
    assert to_peft(model_of(small), adapters, tmp_path / "peft") == 14
    assert from_peft(tmp_path / "peft", model_of(small), tmp_path / "back") == 14
    old, new = (load_file(folder / "adapters.safetensors") for folder in (adapters, tmp_path / "back"))
    assert old.keys() == new.keys() and all(np.array_equal(old[k], new[k]) for k in old)


def moe_folder(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "moe.json").write_text(json.dumps(MOE | {"vocab_size": 288}))
    init_model(tmp_path / "moe.json", tmp_path / "tokenizer", tmp_path / "moe", 1, "float32")
    return tmp_path / "moe"


def test_what_peft_does_not_have(bases: dict[str, Path], tmp_path: Path) -> None:
    def exported(base: Path, name: str, **changes: Any) -> str:
        return refused(to_peft, model_of(base), trained(base, tmp_path / name, **changes), tmp_path / "peft")

    assert "mlp.switch_mlp.down_proj: peft has no equivalent of" in exported(moe_folder(tmp_path), "experts")
    assert "model.embed_tokens: peft has no" in exported(bases["qwen3"], "tied", lora_keys=("model.embed_tokens",))
    assert "not LoRA or DoRA adapters (fine_tune_type full)" in exported(bases["llama"], "full", train_type="full")
    assert not (tmp_path / "peft").exists()


def test_modules_that_transformers_names_otherwise(bases: dict[str, Path], tmp_path: Path) -> None:
    adapters, base = trained(bases["llama"], tmp_path / "adapters"), shutil.copytree(bases["llama"], tmp_path / "original")
    weights = load_file(base / "model.safetensors")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert to_peft(model_of(base), adapters, tmp_path / "peft") == 14
    renamed = {name.replace("q_proj", "query"): weight for name, weight in weights.items()}
    save_file(renamed, base / "other.safetensors", {"format": "pt"})
    (base / "model.safetensors").rename(base / "weights")
    (base / "other.safetensors").rename(base / "model-other.safetensors")
    assert _checkpoint_names(str(base)) == renamed.keys()
    model, _ = load(model_of(bases["llama"]), str(adapters))
    paths = {path: module for path, module in model.named_modules() if "lora_a" in module}
    said = refused(_check_exportable, paths, renamed.keys(), {})
    assert said.startswith("model.layers.") and "q_proj: the checkpoint has no" in said


def changed(folder: Path, copy: Path, config: dict[str, Any], rename: Any = str) -> Path:
    shutil.copytree(folder, copy)
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    save_file(
        {rename(k): v for k, v in load_file(folder / "adapter_model.safetensors").items()}, copy / "adapter_model.safetensors"
    )
    return copy


BROKEN: dict[str, Any] = {
    "another method": ({"peft_type": "IA3"}, str, "peft_type is 'IA3'; mlx-lm has LORA"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, str, "init_lora_weights pissa_niter_4 changes the base"),
    "an embedding": ({}, lambda k: k.replace("lora_A.weight", "lora_embedding_A"), "lora_embedding_A is not LoRA or DoRA"),
    "half a module": ({}, lambda k: k.replace("0.self_attn.q_proj.lora_B", "0.self_attn.wq.lora_B"), "needs two matrices"),
    "an unknown module": ({}, lambda k: k.replace("q_proj", "query"), "it has no module model.layers.1.self_attn.query"),
    "another shape": ({}, lambda k: k.replace("k_proj", "X").replace("q_proj", "k_proj").replace("X", "q_proj"), "has shape"),
}


@pytest.mark.parametrize(("config", "rename", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_mlx_lm_does_not_have(config: Any, rename: Any, message: str, bases: dict[str, Path], tmp_path: Path) -> None:
    to_peft(model_of(bases["llama"]), trained(bases["llama"], tmp_path / "adapters"), tmp_path / "peft")
    broken = changed(tmp_path / "peft", tmp_path / "broken", config, rename)
    assert message in refused(from_peft, broken, model_of(bases["llama"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_peft_is_no_adapter_path(mlxlora: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    """Each way to name adapters says how to convert them."""
    to_peft(model_of(bases["llama"]), trained(bases["llama"], tmp_path / "adapters"), tmp_path / "peft")
    remedy = f"{tmp_path / 'peft'}: these adapters are in the format of peft; convert them with `mlxlora import --peft"
    named = ("--model", bases["llama"], "--adapter-path", tmp_path / "peft")
    for command in (("generate", "--prompt", "a", *named), ("generate", "--prompt", "a", *named[2:]), ("fuse", *named)):
        done = mlxlora(*command)
        assert done.code == 2 and remedy in done.err and done.err.count("\n") == 1
    model, _ = load(model_of(bases["llama"]))
    weights = tmp_path / "peft/adapter_model.safetensors"
    assert remedy in refused(load_weights, prepare(model, AdapterOptions()), weights)


@pytest.mark.parametrize(("name", "saved"), [("llama", "model.embed_tokens"), ("llama", "lm_head"), ("qwen3", "lm_head")])
def test_a_saved_embedding_has_to_be_that_of_the_base(name: str, saved: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = model_of(bases[name])
    modules = to_peft(base, trained(bases[name], tmp_path / "adapters"), tmp_path / "peft")
    file = tmp_path / "peft/adapter_model.safetensors"
    arrays, weights = load_file(file), load_file(bases[name] / "model.safetensors")
    own = weights.get(f"{saved}.weight", weights["model.embed_tokens.weight"])
    save_file(arrays | {f"base_model.model.{saved}.weight": own}, file)
    assert from_peft(tmp_path / "peft", base, tmp_path / "same") == modules
    save_file(arrays | {f"base_model.model.{saved}.weight": own + 1}, file)
    assert f"{saved} differs from the base" in refused(from_peft, tmp_path / "peft", base, tmp_path / "other")
    save_file(arrays | {f"base_model.model.{saved}.weight": own[:-1].copy()}, file)
    assert f"{saved} has shape [287, 64]" in refused(from_peft, tmp_path / "peft", base, tmp_path / "other")


def test_folders_in_use(bases: dict[str, Path], tmp_path: Path) -> None:
    base, adapters = model_of(bases["llama"]), trained(bases["llama"], tmp_path / "adapters")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "exists and is not empty" in refused(to_peft, base, adapters, tmp_path / "mine")
    assert "would delete something else" in refused(to_peft, base, adapters, tmp_path / "mine", overwrite=True)
    assert "is read from there" in refused(to_peft, base, adapters, tmp_path, overwrite=True)
    assert "is a file" in refused(to_peft, base, adapters, tmp_path / "mine" / "thesis.tex")
    for _ in range(2):
        assert to_peft(base, adapters, tmp_path / "peft", overwrite=True)


def test_commands(mlxlora: Any, bases: dict[str, Path], tmp_path: Path) -> None:
    adapters = trained(bases["llama"], tmp_path / "adapters")
    done = mlxlora("export", "--adapter-path", adapters, "--peft", tmp_path / "peft", "--base-model", "org/base")
    assert done.code == 0 and "(14 modules)" in done.out
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert "base_model: org/base" in (tmp_path / "peft/README.md").read_text()
    named = ("--model", bases["llama"], "--peft", tmp_path / "peft", "--adapter-path", tmp_path / "back")
    assert mlxlora("import", *named).code == 0
    assert "exists and is not empty" in mlxlora("import", *named).err
    assert "--peft is missing" in mlxlora("export", "--adapter-path", adapters).err
    assert "--peft is missing" in mlxlora("import").err
    assert "no adapters there" in mlxlora("export", "--adapter-path", tmp_path, "--peft", tmp_path / "x").err
