"""Sweeps: every combination once, the model loaded once, finished runs not run again, the best one marked."""

from pathlib import Path

import orjson
import pytest

import mlxlora as ml
from mlxlora.errors import InputError
from mlxlora.models import loading
from mlxlora.training.run_folder import read_settings

ROWS = {name: [{"prompt": f"add {i}.", "completion": str(i + 2)} for i in range(8)] for name in ("train", "valid")}
FAST = {"iters": 2, "batch_size": 2, "num_layers": 1, "quiet": True, "answers": 0, "data": ROWS}
OVER = {"learning_rate": [1e-2, 1e-4], "rank": [2, 4]}

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def loads(monkeypatch):
    """How often a model is loaded."""
    seen = []
    real = loading.load_with_config
    monkeypatch.setattr(loading, "load_with_config", lambda *values: seen.append(1) or real(*values))
    return seen


def test_every_combination(model_folder, tmp_path, loads):
    done = ml.sweep(ml.sft, OVER, model=model_folder, adapter_path=tmp_path / "s", **FAST)
    assert len(loads) == 1
    assert [(row["learning_rate"], row["rank"]) for row in done] == [(1e-2, 2), (1e-2, 4), (1e-4, 2), (1e-4, 4)]
    assert done.best["best_valid_loss"] == min(row["best_valid_loss"] for row in done)
    assert done[3]["adapters"].endswith("s/learning_rate=0.0001,rank=4") and read_settings_of(done[3])["rank"] == 4
    ml.sft(model=model_folder, adapter_path=tmp_path / "alone", learning_rate=1e-4, rank=4, **FAST)
    assert weights(tmp_path / "alone") == weights(done[3]["adapters"])
    page = (tmp_path / "s" / "report.html").read_text()
    assert page.count("★ best: ") >= 1 and done.page == str(tmp_path / "s" / "report.html")


def read_settings_of(row):
    return read_settings(Path(row["adapters"]) / "config.yaml")


def weights(folder):
    return (Path(folder) / "adapters.safetensors").read_bytes()


def test_what_is_finished_is_not_run_again(model_folder, tmp_path, loads):
    calls = []

    def counted(**options):
        calls.append(options["adapter_path"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ml.sft(**options)

    with pytest.raises(KeyboardInterrupt):
        ml.sweep(counted, OVER, model=model_folder, adapter_path=tmp_path / "s", **FAST)
    done = ml.sweep(counted, OVER, model=model_folder, adapter_path=tmp_path / "s", **FAST)
    assert len(calls) == 5 and len(done) == 4
    again = ml.sweep(counted, OVER, model=model_folder, adapter_path=tmp_path / "s", **FAST)
    assert len(calls) == 5 and list(again) == list(done)
    assert orjson.loads((tmp_path / "s" / "sweep.json").read_bytes()).keys() == {
        f"learning_rate={rate},rank={rank}" for rate in (0.01, 0.0001) for rank in (2, 4)
    }


def test_an_interrupted_run_is_resumed(model_folder, tmp_path):
    def stopped(step, metrics):
        return step < 1

    over = {"rank": [2]}
    ml.sft(model=model_folder, adapter_path=tmp_path / "s" / "rank=2", rank=2, callbacks=[stopped], **FAST)
    done = ml.sweep(ml.sft, over, model=model_folder, adapter_path=tmp_path / "s", **FAST)
    ml.sft(model=model_folder, adapter_path=tmp_path / "alone", rank=2, **FAST)
    assert done[0]["steps"] == 2 and weights(done[0]["adapters"]) == weights(tmp_path / "alone")


def test_a_name_is_no_method():
    with pytest.raises(InputError, match=r"^sweep: the method must be a function such as mlxlora.sft, got str 'sft'$"):
        ml.sweep("sft", {"rank": [2, 4]})  # type: ignore[arg-type]


@pytest.mark.parametrize("over", [{}, {"rank": 4}, {"rank": []}, {"optimizer": "adam"}])
def test_what_does_not_vary(over, tmp_path):
    with pytest.raises(InputError, match=r"^sweep: "):
        ml.sweep(ml.sft, over, adapter_path=tmp_path / "s")


def test_the_command(mlxlora, model_folder, tmp_path, loads):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, ROWS["train"])))
    start = ("sweep", "sft", "--model", model_folder, "--data", tmp_path / "rows.jsonl", "--adapter-path", tmp_path / "s")
    how = ("--iters", 2, "--batch-size", 2, "--num-layers=1", "--quiet", "--answers", 0, "--lora-keys", "q_proj,v_proj")
    done = mlxlora(*start, *how, "--lr", "1e-2,1e-4", "--rank=2,4")
    assert done.code == 0, done.err
    assert len(loads) == 1 and (tmp_path / "s" / "learning_rate=0.01,rank=2" / "adapters.safetensors").is_file()
    *_, best, page = done.out.splitlines()
    assert best.startswith(f"best    {tmp_path / 's' / 'learning_rate=0.01,rank='}") and "(learning_rate 0.01, rank" in best
    assert page == f"report  {tmp_path / 's' / 'report.html'}"
    assert read_settings(tmp_path / "s" / "learning_rate=0.01,rank=2" / "config.yaml")["lora_keys"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sft", "--rank", 4), "sweep: nothing varies; give an option several values, such as --rank 4,16"),
        (("sftt", "--rank", "4,8"), "--METHOD must be one of sft, dpo, orpo, cpo, kto, grpo, online-dpo, distill, gkd, got 'sftt'"),
        (("sft", "--rank", "4,x", "--model", "m", "--data", "d"), "Invalid value for '--rank': Input should be a valid integer"),
        (("sft", "--ranks", "4,8", "--rank", "1,2"), "No such option: --ranks; did you mean --rank?"),
    ],
)
def test_mistakes(mlxlora, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = mlxlora("sweep", *arguments)
    assert done.code == 2 and message in done.err
