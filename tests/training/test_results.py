"""What a run returns: a mapping of results, and the model with what one does next."""

import math
import sys
import types

import mlx.core as mx
import mlx_lm
import numpy as np
import orjson
import pytest

import mlxlora as ml
from mlxlora.errors import InputError
from mlxlora.reporting.notebook import Live, in_notebook

ROWS = [{"prompt": f"add {i}.", "completion": str(i + 2)} for i in range(8)]
PAIRS = [{"prompt": f"add {i}.", "chosen": str(i + 2), "rejected": "no"} for i in range(8)]
FAST = {"iters": 4, "batch_size": 2, "num_layers": 1, "quiet": True, "steps_per_report": 2, "answers": 0, "learning_rate": 1e-2}
SPLITS = {"train": ROWS, "valid": ROWS[:4], "test": ROWS[4:]}

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def run(model_folder, tmp_path):
    return ml.sft(model=model_folder, data=SPLITS, adapter_path=tmp_path / "run", steps_per_eval=2, test=True, **FAST)


def arrays(folder):
    return {name: np.array(array) for name, array in mx.load(f"{folder}/adapters.safetensors").items()}  # type: ignore[union-attr]


def equal(a, b):
    return arrays(a).keys() == arrays(b).keys() and all(np.array_equal(arrays(a)[n], arrays(b)[n]) for n in arrays(a))


def test_a_mapping_of_unrounded_numbers(run):
    assert [*run] == [
        "steps",
        "shapes_compiled",
        "seconds",
        "best_valid_loss",
        "test_loss",
        "test_perplexity",
        "adapters",
        "report",
    ]
    assert {**run}["steps"] == run["steps"] == 4 and len(run) == 8 and "steps" in run
    assert run["best valid loss"] == run["best_valid_loss"] != round(run["best_valid_loss"], 4)
    assert run["test_loss"] == next(row["loss"] for row in run.history if row["split"] == "test")
    assert run["adapters"] == run.adapter_path and repr(run).startswith("RunResult({'steps': 4, ")
    with pytest.raises(KeyError):
        run["nonesuch"]


def test_history(run, monkeypatch):
    places = [(row["step"], row["split"]) for row in run.history]
    assert places == [(0, "valid"), (2, "train"), (2, "valid"), (4, "train"), (4, "valid"), (4, "test")]
    assert run.best["loss"] == run["best_valid_loss"] and run.best["step"] in (2, 4)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(
        InputError, match=r"^to_frame needs pandas: pip install 'mlxlora\[pandas\]'; \.history has the same as a list$"
    ):
        run.to_frame()
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=tuple))
    assert run.to_frame() == tuple(run.history)


def test_the_best_validation_of_a_sampled_run_is_that_of_the_highest_reward(run, tmp_path):
    rows = [{"step": step, "split": "valid", "reward": reward} for step, reward in ((0, 0.9), (2, 0.25), (4, 0.75), (6, 0.5))]
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert run.best == {"step": 4, "split": "valid", "reward": 0.75}


def test_the_model_answers(run):
    answer = run.generate("add 3.", max_tokens=4)
    assert answer == mlx_lm.generate(run.model, run.tokenizer, "add 3.", max_tokens=4) and not run.model.training
    assert isinstance(run.generate("add 3.", max_tokens=4, temperature=1.0), str)
    with pytest.raises(InputError, match=r"^prompt:0: .*chat template"):
        run.generate([{"role": "user", "content": "hi"}])


def test_evaluating_other_rows(run):
    found = run.evaluate(ROWS[4:])
    assert found["loss"] == pytest.approx(run["test_loss"], abs=1e-6)
    assert found["perplexity"] == pytest.approx(run["test_perplexity"], rel=1e-5)
    assert run.evaluate(SPLITS) == run.evaluate({"train": ROWS[4:]})


def test_evaluating_preferences(model_folder, tmp_path):
    """With the reference that the run had."""
    data = {"train": PAIRS, "valid": PAIRS[:4]}
    run = ml.dpo(model=model_folder, data=data, adapter_path=tmp_path / "run", steps_per_eval=4, **FAST)
    assert run.evaluate(PAIRS[:4])["loss"] == pytest.approx(run["best_valid_loss"], abs=1e-6)
    again = ml.dpo(model=(run.model, run.tokenizer), data=data, adapter_path=tmp_path / "again", steps_per_eval=4, **FAST)
    assert again.evaluate(PAIRS[:4])["loss"] == pytest.approx(again["best_valid_loss"], abs=1e-6)


def test_evaluating_weights_whose_beginning_is_gone(model_folder, tmp_path):
    """Full training alone changes them; what continued them has kept where it began."""
    how = {name: value for name, value in FAST.items() if name != "iters"} | {"train_type": "full", "iters": 1, "val_batches": 1}
    run = ml.dpo(model=model_folder, data={"train": PAIRS, "valid": PAIRS[:2]}, adapter_path=tmp_path / "run", **how)
    with pytest.raises(InputError, match=r"^evaluate: the loss compares with the weights before training, which are gone; name a"):
        run.evaluate(PAIRS)
    again = ml.dpo(model=(run.model, run.tokenizer), data=PAIRS, adapter_path=tmp_path / "again", **how)
    assert again.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and again.evaluate(PAIRS)["loss"] < math.log(2)


def test_saving_and_fusing(run, tmp_path, model_folder):
    assert run.save(tmp_path / "copy") == str(tmp_path / "copy") and equal(tmp_path / "copy", run.adapter_path)
    fused, tokenizer = mlx_lm.load(run.fuse(tmp_path / "fused"))  # type: ignore[misc]
    tokens = mx.array([tokenizer.encode("add 3.")])
    assert mx.allclose(fused(tokens), run.model(tokens), atol=1e-4)


def test_resuming(run, model_folder, tmp_path):
    longer = run.resume(iters=8)
    whole = ml.sft(
        model=model_folder, data=SPLITS, adapter_path=tmp_path / "whole", steps_per_eval=2, test=True, **FAST | {"iters": 8}
    )
    assert longer["steps"] == 8 and equal(longer.adapter_path, whole.adapter_path)
    with pytest.raises(InputError, match=r"--resume: rank was 8 and is 4"):
        longer.resume(rank=4)


def test_the_best_model_is_kept(model_folder, tmp_path):
    data = {"train": ROWS, "valid": [{"prompt": "zzz", "completion": "qqq"}]}
    run = ml.sft(
        model=model_folder, data=data, adapter_path=tmp_path / "a", keep_best=True, steps_per_eval=1, **FAST | {"iters": 8}
    )
    assert run.evaluate(data["valid"])["loss"] == pytest.approx(run["best_valid_loss"], abs=1e-6)


def test_a_run_of_a_custom_objective(model_folder, tmp_path):
    model, tokenizer = ml.load(str(model_folder))
    run = ml.run(model, tokenizer, ml.nll(), ml.rows(ROWS), ml.Training(iters=2, batch_size=2), adapter_path=str(tmp_path / "a"))
    assert run.model is model and run.resume(iters=3)["steps"] == 3


def test_a_dry_run_has_no_model(model_folder, tmp_path):
    dry = ml.sft(model=model_folder, data=ROWS, adapter_path=tmp_path / "a", dry_run=True, **FAST)
    assert dry["steps"] == 4 and dry["peak"] > 0
    for use in (lambda: dry.model, lambda: dry.history, lambda: dry.resume(iters=5)):
        with pytest.raises(InputError, match=r"^a dry run trains nothing"):
            use()


def test_a_notebook_shows_a_run(run):
    html = run._repr_html_()
    assert html.startswith('<iframe srcdoc="&lt;!doctype html&gt;') and html.count("<") == 2 and "best valid loss" in html


def test_a_picture_that_changes(model_folder, tmp_path, monkeypatch, capsys):
    shown = []
    display = types.ModuleType("IPython.display")
    display.HTML = lambda html: html  # type: ignore[attr-defined]
    display.display = lambda html, display_id: shown.append((html, display_id, False))  # type: ignore[attr-defined]
    display.update_display = lambda html, display_id: shown.append((html, display_id, True))  # type: ignore[attr-defined]
    ipython = types.ModuleType("IPython")
    shell = type("ZMQInteractiveShell", (), {"kernel": 1})()
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert in_notebook()
    ml.sft(model=model_folder, data=SPLITS, adapter_path=tmp_path / "a", **FAST | {"quiet": False})
    assert [again for *_, again in shown] == [False, *[True] * (len(shown) - 1)] and len({name for _, name, _ in shown}) == 1
    last = shown[-1][0]
    assert "step 4 of 4" in last and "valid loss" in last and last.count("<svg") == 1
    assert "step 2/4" not in capsys.readouterr().out
    shell = type("TerminalInteractiveShell", (), {})()
    assert not in_notebook()


def test_the_picture_escapes_what_it_shows():
    pictures = []
    live = Live(lambda html, again: pictures.append(html))
    live.progress(1, 2)
    live.record({"step": 1, "split": "<b>", "loss": 1.0})
    assert "<b>" not in pictures[0] and orjson.dumps(pictures)
