"""The adapter card: what a run was, without where on this machine it was."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxlora.config.method_options import dump
from mlxlora.config.options import AdapterOptions, DataOptions, ModelOptions, Output, Training
from mlxlora.methods import METHODS, method_info
from mlxlora.reporting.card import Card, CardMore, card, portable, write_card
from mlxlora.reporting.history import Record, method_of

METRICS = [
    {"step": 0, "split": "valid", "loss": 2.0, "perplexity": 7.389},
    {"step": 10, "split": "train", "loss": 1.5, "tokens": 100},
    {"step": 10, "split": "valid", "loss": 1.0, "perplexity": 2.718},
    {"step": 20, "split": "valid", "loss": 1.25, "perplexity": 3.49},
    {"step": 20, "split": "test", "loss": 1.125, "perplexity": 3.08},
]


def config(method: str = "sft", model: str = "org/base", **options: Any) -> dict[str, Any]:
    groups = (
        *(kind() for kind in METHODS[method].kinds.kinds()),
        ModelOptions(model=model),
        DataOptions(data="/home/me/secret/rows.jsonl", mask_prompt=True),
        AdapterOptions(lora_keys=("self_attn.q_proj",), **options),
        Training(iters=20),
        Output(adapter_path="/home/me/adapters"),
    )
    return dump(*groups) | {"method": method}


def text_of(config: dict[str, Any], metrics: list[dict[str, Any]], rows: dict[str, int] | None = None) -> str:
    return card(Record("run", config, metrics), method_info(config), rows)


def test_what_it_says() -> None:
    text = text_of(config(), METRICS, {"train": 600, "valid": 100, "test": 0})
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    (results,) = fields.pop("model-index")
    assert fields == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "mlxlora", "lora", "sft"],
    }
    assert results == {
        "name": "LoRA adapters for org/base",
        "results": [
            {
                "task": {"type": "text-generation"},
                "dataset": {"name": "rows.jsonl", "type": "rows.jsonl", "split": "test"},
                "metrics": [{"type": "loss", "value": 1.125}, {"type": "perplexity", "value": 3.08}],
            }
        ],
    }
    assert "by supervised fine-tuning on rows.jsonl (600 rows, 100 valid)." in body
    assert "mlx_lm.generate --model org/base --adapter-path ." in body
    assert "| `iters` | `20` |" in body and "| `mask_prompt` | `True` |" in body and "`rank`" not in body
    assert "| metric | before (step 0) | best (step 10) | last (step 20) | test (step 20) |" in body
    assert "| loss | 2 | 1 | 1.25 | 1.125 |" in body
    assert "/home" not in text and "secret" not in text


def test_samples_time_parameters_and_a_command_that_works() -> None:
    facts = {"trained": "LoRA of rank 8, 2.88M parameters (0.48%)", "time": "12:34"}
    answers = [{"prompt": "2 | 2?", "before": "<b>5", "after": "4"}]
    told = Record("run", config() | {"model": "models/mine/best"}, METRICS)
    text = card(told, more=CardMore(facts=facts, answers=answers))
    assert "Trained: LoRA of rank 8, 2.88M parameters (0.48%). Time: 12:34." in text
    assert "| 2 \\| 2? | &lt;b&gt;5 | 4 |" in text
    assert "mlxlora generate --adapter-path . --prompt" in text and "mlx_lm.generate" not in text


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    assert method_of(config(method)) == method
    assert f"- {method}\n" in text_of(config(method), [])


def test_a_run_says_what_it_is() -> None:
    assert method_of(config("orpo") | {"method": "dpo"}) == "dpo"
    assert method_of(config("sft") | {"method": None}) == method_of({"method": ["dpo"]}) == ""


def test_a_stopped_run_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config()), encoding="utf-8")
    report = Card(tmp_path, {"train": 7}, method_info(config()))
    report.finish({"stopped": "after step 3"})
    assert "on rows.jsonl (7 rows). The run was stopped after step 3." in (tmp_path / "README.md").read_text(encoding="utf-8")
    report.finish({"steps": 20})
    assert "stopped" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_hub_gets_the_best_validation_where_there_is_no_test() -> None:
    front = text_of(config(), [*METRICS[:-1], {"step": 25, "split": "valid", "loss": None}]).split("---\n", 2)[1]
    (result,) = yaml.safe_load(front)["model-index"][0]["results"]
    assert result["dataset"]["split"] == "valid" and result["metrics"][0] == {"type": "loss", "value": 1.0}
    assert "model-index" not in text_of(config(), METRICS[1:2]), "a training loss is no result"


def test_other_runs() -> None:
    full = text_of(config(train_type="full"), [])
    assert "# Weights for org/base" in full and "base_model_relation: finetune" in full and "## Metrics" not in full
    assert "DoRA adapters, trained" in text_of(config(train_type="dora"), METRICS[1:2])
    assert "| loss | 1.5 |" in text_of(config(), METRICS[1:2])
    local = text_of(config(model="/home/me/models/tiny"), [])
    assert "# LoRA adapters for tiny" in local and "base_model:" not in local
    assert "a custom objective" in text_of({"model": None, "data": None}, [])


def test_a_pipe_does_not_break_the_table() -> None:
    assert "| `mine.py:a\\|b` |" in text_of(config() | {"objective": "mine.py:a|b"}, [])


def test_a_card_of_a_persons_own_is_kept(tmp_path: Path) -> None:
    write_card(tmp_path, text_of(config(), METRICS))
    file = tmp_path / "README.md"
    write_card(tmp_path, text_of(config(train_type="dora"), METRICS))
    assert "DoRA" in file.read_text()
    file.write_text("# My project\n")
    write_card(tmp_path, text_of(config(), METRICS))
    assert file.read_text() == "# My project\n" and list(tmp_path.iterdir()) == [file]


def test_only_paths_are_shortened() -> None:
    kept = ["/", "~", "a/b", "", None, 3, True, "1/2 of all"]
    assert portable(kept) == kept
    assert portable({"data": "../data", "model": "me/work/m"}) == {"data": "data", "model": "m"}
    assert portable({"x": ("/a/b.py:objective",)}) == {"x": ["b.py:objective"]}
