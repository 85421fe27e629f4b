"""--dry-run: what a run needs is told from real steps, for every method, and nothing is written."""

import pytest

from mlxlora import starter
from mlxlora.data.batching import Order
from mlxlora.errors import InputError
from mlxlora.methods import METHODS
from mlxlora.training.dry_run import representative_batches
from tests.support.starter import FEW

RUNNABLE = [name for name, row in METHODS.items() if row.starter.runs]
SAMPLED = ("grpo", "online-dpo")


@pytest.fixture
def tried(monkeypatch, tmp_path, eager):
    """A dry run of the starter in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))

    def run(method, **options):
        small = {"batch_size": 4, "iters": 8, "max_seq_length": 64, "num_layers": 1, "use_chat_template": method != "sft"}
        small |= {"max_completion_length": 4, "group_size": 2, "rewards": ("accuracy",)} if method in SAMPLED else {}
        names = {"model": str(starter.model_path()), "data": str(starter.data_path(method)), "dry_run": True}
        return METHODS[method](**{**small, **names, **options})

    return run


@pytest.mark.parametrize("method", RUNNABLE)
def test_every_method(method, tried, tmp_path, capsys):
    needs = tried(method)
    out = capsys.readouterr().out
    rows = {"kto": 2 * FEW}.get(method, FEW)
    assert (needs["rows"], needs["steps"], needs["steps_per_epoch"]) == (rows, 8, rows // 4)
    assert 0 < needs["trainable"] < needs["parameters"] and needs["seconds"] > 0 and 0 < needs["peak"] < needs["limit"]
    assert (needs["seconds_reference"] > 0) == (method in ("dpo", "kto"))
    assert (needs["completion_length"] is not None) == (method in SAMPLED)
    for word in ("num_layers  ", "trainable parameters", "estimated time", "fits                  yes", "nothing (--dry-run)"):
        assert word in out
    assert not (tmp_path / "adapters").exists()


def test_an_earlier_run_stays(tried, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapters.safetensors").write_bytes(b"mine")
    tried("sft")
    assert [(file.name, file.read_bytes()) for file in folder.iterdir()] == [("adapters.safetensors", b"mine")]


def test_what_does_not_fit_comes_with_advice(tried, capsys):
    tried("sft", memory_limit=0.001)
    out = capsys.readouterr().out
    assert (
        "no. Try, in this order: --grad-checkpoint, a smaller --max-seq-length, --quantize 4" in out
        and "a higher --memory-limit" in out
    )
    assert "computed in 4 parts" in out
    tried("sft", memory_limit=0.001, grad_checkpoint=True, micro_batch="2", train_type="full")
    first = "no. Try, in this order: --micro-batch 1, a smaller --max-seq-length, --train-type lora in place of full, fewer"
    assert first in capsys.readouterr().out


def test_epochs_accumulation_and_packing(tried):
    needs = tried("sft", epochs=2.0, grad_accumulation_steps=2)
    assert (needs["steps"], needs["steps_per_epoch"]) == (FEW // 4, FEW // 8)
    assert tried("sft", packing=True)["rows"] < FEW


def test_several_steps_on_one_batch_of_completions(tried):
    assert tried("grpo", num_iterations=2, epochs=1.0)["steps_per_epoch"] == 2 * FEW // 4


def test_all_options_on_request(tried, capsys):
    tried("sft", show_config=True)
    out = capsys.readouterr().out
    assert "weight_decay: 0.0\n" in out and "options other than the defaults" not in out


def test_mistakes_are_told(tried):
    with pytest.raises(InputError, match="--keep-best needs validation"):
        tried("sft", keep_best=True, val_batches=0)


def test_the_longest_rows_and_a_batch_of_the_mean_size():
    rows = Order(tuple([10] * 30 + [500] * 2), 4)
    longest, typical = representative_batches(rows)
    assert {30, 31} <= set(longest) and len(longest) == 4
    assert not {30, 31} & set(typical)
