"""Training runs of TRL, reproduced through the command line: every step's loss and gradient norm, and the first batch."""

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest
from attrs import frozen
from mlx_lm.tokenizer_utils import load as load_tokenizer

from mlxlora.config.options import DataOptions
from mlxlora.data import sources
from tests.support.paths import SHARED

PARITY = SHARED / "parity"
RTOL = 1e-4
pytestmark = pytest.mark.skipif(not PARITY.exists(), reason=f"needs {PARITY}")

FULL = ("--train-type", "full", "--num-layers", -1)
LORA = ("--train-type", "lora", "--num-layers", -1, "--rank", 4, "--scale", 2)
SETTINGS = (
    "--optimizer",
    "adamw",
    "--learning-rate",
    1e-3,
    "--max-grad-norm",
    0,
    "--no-shuffle",
    "--steps-per-report",
    1,
    "--answers",
    0,
)


@frozen
class Case:
    """A recorded run and the flags that repeat it.

    Attributes:
        name: of the run in curves.json.
        command: of the command line.
        flags: those that say what is trained on.
    """

    name: str
    command: str
    flags: tuple[Any, ...] = ()


CASES = [
    Case("sft_pc_completion_only", "sft", ("--mask-prompt",)),
    Case("sft_pc_full_sequence", "sft"),
    Case("sft_pc_completion_only_ga2", "sft", ("--mask-prompt",)),
    Case("sft_pc_completion_only_max_length96", "sft", ("--mask-prompt", "--max-seq-length", 96)),
    Case("sft_pc_dft", "sft", ("--mask-prompt", "--loss-type", "dft")),
    Case("sft_messages_assistant_only", "sft", ("--mask-prompt",)),
    Case("sft_messages_full_sequence", "sft"),
    Case("lora_sft", "sft", ("--mask-prompt",)),
    Case("dpo_sigmoid", "dpo"),
    Case("dpo_hinge", "dpo", ("--loss-type", "hinge")),
    Case("dpo_ipo", "dpo", ("--loss-type", "ipo")),
    Case("dpo_sigmoid_ga2", "dpo"),
    Case("dpo_sigmoid_max_length96", "dpo", ("--max-seq-length", 96)),
    Case("dpo_sigmoid_conversational", "dpo"),
    Case("dpo_rpo_sigmoid1_sft1", "dpo", ("--loss-type", "sigmoid+nll")),
    Case("cpo_sigmoid", "cpo"),
    Case("cpo_simpo", "cpo", ("--loss-type", "simpo")),
    Case("orpo", "orpo", ("--nll-on-prompt",)),
    Case("lora_dpo_sigmoid", "dpo"),
    Case("lora_orpo", "orpo", ("--nll-on-prompt",)),
]


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all cases: runs of the same rows have the same reference."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_step_is_trls(case: Case, tmp_path: Path, cache_folder: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's float32 numbers within its own rounding error, and its float64 numbers."""
    monkeypatch.setenv("MLXLORA_CACHE", str(cache_folder))
    run = curves()[case.name]
    outcome = mlxlora(case.command, *_flags(run), *_trained(run, tmp_path), *case.flags, "--adapter-path", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    records = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    for name in ("loss", "grad_norm"):
        ours = [r[name] for r in records]
        np.testing.assert_allclose(ours, run[name], rtol=RTOL + run["noise_floor"][f"max_rel_{name}"], err_msg=name)
        np.testing.assert_allclose(ours, run[f"{name}_f64"], rtol=RTOL, err_msg=f"{name}_f64")


@pytest.mark.parametrize("case", [case for case in CASES if case.command == "sft"], ids=lambda case: case.name)
def test_first_batch_is_trls(case: Case) -> None:
    run = curves()[case.name]
    data = DataOptions(data=str(PARITY / run["data"]), **_options(case.flags))
    source = sources.rows(data)
    items = sources.tokenize(source, sources.load_rows(data, 0), load_tokenizer(PARITY / "tiny_llama"))["train"].items
    assert len(items) == run["rows_after_preparation"]
    recorded = [row for batch in run["first_step_batches"] for row in zip(*_columns(batch), strict=True)]
    for item, (ids, labels, attention) in zip(items, recorded, strict=False):
        length = sum(attention)
        assert item.tokens.tolist() == ids[:length]
        assert item.loss_mask.tolist() == [t > 0 and label != -100 for t, label in enumerate(labels[:length])]


@cache
def curves() -> dict[str, Any]:
    """The recorded runs by name."""
    return {run["name"]: run for run in orjson.loads((PARITY / "curves.json").read_bytes())["runs"]}


def _flags(run: dict[str, Any]) -> tuple[Any, ...]:
    config = run["config"]
    return (
        *("--model", PARITY / "tiny_llama", "--data", PARITY / run["data"], *SETTINGS),
        *("--iters", config["max_steps"], "--batch-size", config["per_device_train_batch_size"]),
        *("--grad-accumulation-steps", config["gradient_accumulation_steps"]),
    )


def _trained(run: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """The flags of what is trained; PEFT's initial adapters become a file of mlx-lm's."""
    if not run["lora"]:
        return FULL
    arrays = mx.load(str(PARITY / run["lora"]["init"]))
    names = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}
    ours = {name.replace(theirs, mine): a.T for name, a in arrays.items() for theirs, mine in names.items() if theirs in name}
    mx.save_safetensors(str(folder / "init.safetensors"), ours)
    return *LORA, "--resume-adapter-file", folder / "init.safetensors"


def _options(flags: tuple[Any, ...]) -> dict[str, Any]:
    """Those of a case's flags that are options of the data."""
    options: dict[str, Any] = {"mask_prompt": "--mask-prompt" in flags}
    if "--max-seq-length" in flags:
        options["max_seq_length"] = flags[flags.index("--max-seq-length") + 1]
    return options


def _columns(batch: dict[str, Any]) -> tuple[Any, ...]:
    return batch["input_ids"], batch["labels"], batch["attention_mask"]
