"""Architectures of mlx-lm: a dozen are examined here, all of them by benchmarks/architectures.py, which writes a table."""

import sys
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import mlx.core as mx
import mlx_lm.models
import pytest
from attrs import evolve
from mlx_lm.tuner.utils import load_adapters

from mlxlora.adapters.files import save
from mlxlora.adapters.lora import adapters_of
from mlxlora.adapters.prepare import prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.architectures import examine, explain  # noqa: E402
from benchmarks.small import NESTED, PARTS, SPECIAL, UNADAPTED, architectures, build  # noqa: E402

TOKENS = mx.array([[1, 2, 3]])
SEVERAL = [
    *("llama", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "mixtral", "olmo2", "cohere", "starcoder2"),
    *("gpt2", "minicpm", "deepseek_v3", "jamba", "falcon_h1", "recurrent_gemma", "afm7"),
]


@pytest.mark.parametrize("name", SEVERAL)
def test_every_claim_holds(name: str) -> None:
    result = examine(name)
    assert [result.lora, result.dora, result.disabled, result.checkpoint] == ["yes"] * 4, result.remark
    assert result.split not in ("", "no", "full logits"), result.remark
    assert set(result.faster.split(", ")) <= {"rows", "prompts", "packing", "chunks", "recurrence"}, result.remark
    assert "rows" in result.faster


READ = {"gemma3n": ("prediction_coefs", "correction_coefs"), "kimi_k3": ("mlp_res_proj", "self_attention_res_proj")}


@pytest.mark.parametrize("name", READ)
def test_layers_that_a_model_reads_itself_get_no_adapter(name: str, tmp_path: Path) -> None:
    """By mlx-lm's choice they would, and the forward pass would fail; the files that mlx-lm loads name the others."""
    options = AdapterOptions(num_layers=-1, rank=2)
    model = prepare(build(name), options)
    model(TOKENS)
    assert not [path for path in adapters_of(model) if path.endswith(READ[name])]
    save(model, str(tmp_path), options, name)
    assert adapters_of(load_adapters(build(name), str(tmp_path))).keys() == adapters_of(model).keys()
    for key in READ[name]:
        with pytest.raises(
            InputError, match=rf"^--lora-keys: the model reads the weights of [\w.]*{key} itself, .*; omit the key$"
        ):
            prepare(build(name), evolve(options, lora_keys=(key,)))


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_that_is_read_as_the_output_layer_gets_no_adapter(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECIAL, "minicpm", SPECIAL.get("minicpm", {}) | {"tie_word_embeddings": tied})
    options = AdapterOptions(num_layers=-1, rank=2, lora_keys=("embed_tokens",))
    with pytest.raises(InputError, match="embed_tokens itself") if tied else nullcontext():
        prepare(build("minicpm"), options)(TOKENS)


def test_the_same_seed_builds_the_same_weights() -> None:
    first, second = (build("llama").parameters()["lm_head"]["weight"] for _ in range(2))
    assert (first == second).all().item()


def test_no_module_is_left_out() -> None:
    every = {module.name for module in iter_modules(mlx_lm.models.__path__)}
    assert set(architectures()) == every - PARTS
    assert every >= PARTS
    assert not [name for name in PARTS if hasattr(import_module(f"mlx_lm.models.{name}"), "ModelArgs")]
    assert {*SPECIAL, *NESTED, *UNADAPTED} <= every | set(NESTED.values()), "a special case of no architecture"


def test_the_table_names_every_architecture_and_every_reason() -> None:
    lines = (ROOT / "benchmarks" / "ARCHITECTURES.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]
    assert sorted(row[0] for row in rows) == sorted(architectures())
    assert not [row for row in rows if "no" in row[1:7] and not row[7]]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(1), "a package that is not installed"),
        (RuntimeError("[metal_kernel] No Metal back-end."), "Metal kernel"),
        (ValueError("[gather_axis] Cannot calculate VJP with respect to indices."), "no gradient"),
        (ValueError("[eval] Attempting to eval an array during function transformations"), "evaluates arrays"),
        (AssertionError("the loss does not fall"), "the loss does not fall"),
        (KeyError("rope"), "KeyError"),
    ],
)
def test_failures_are_classified(error: BaseException, told: str) -> None:
    assert told in explain(error)
