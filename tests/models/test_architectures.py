"""Architectures of mlx-lm: a dozen are examined here, all of them by benchmarks/architectures.py, which writes a table."""

import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import mlx_lm.models
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.architectures import examine, explain  # noqa: E402
from benchmarks.small import NESTED, PARTS, SPECIAL, UNADAPTED, architectures, build  # noqa: E402

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
