"""Callbacks: functions and objects that a run calls, that stop it, and whose errors leave a run that resumes."""

import orjson
import pytest
from mlx_lm.tuner.callbacks import TrainingCallback

import mlxlora as ml
from mlxlora.errors import InputError, RunError
from mlxlora.reporting.callbacks import Callbacks
from mlxlora.reporting.reporter import Reporter

ROWS = {name: [{"prompt": f"add {i}.", "completion": str(i + 2)} for i in range(8)] for name in ("train", "valid")}
FAST = {"iters": 6, "batch_size": 2, "num_layers": 1, "quiet": True, "data": ROWS, "steps_per_report": 4, "steps_per_eval": 3}

pytestmark = pytest.mark.usefixtures("eager")


class Everything:
    """Writes down what it is told."""

    def __init__(self):
        self.seen = []

    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *values: self.seen.append((name.removeprefix("on_"), *values))


def trained(model_folder, folder, *callbacks, **options):
    return ml.sft(model=model_folder, adapter_path=folder, callbacks=callbacks, **FAST | options)


def lines(folder):
    timed = ("tokens_per_second", "peak_memory_gb")
    rows = [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_one_callback_needs_no_list():
    """As one reward needs none."""
    steps, everything = [], Everything()
    for alone in (lambda step, metrics: steps.append(step), everything):
        Callbacks(alone).step(3, {})
    assert steps == [3] and ("step", 3, {}) in everything.seen
    with pytest.raises(InputError, match=r"^callbacks: expected functions \(step, metrics\) or objects .*, got int 3$"):
        Callbacks(3)


def test_every_event(model_folder, tmp_path):
    everything, steps = Everything(), []
    trained(model_folder, tmp_path / "a", everything, lambda step, metrics: steps.append((step, metrics)), save_every=4)
    told = [
        (event, values[0] if event not in ("start", "end", "train_loss_report") else None) for event, *values in everything.seen
    ]
    told = [event for event in told if "report" not in event[0]]
    assert told == [
        ("start", None),
        ("evaluate", 0),
        ("step", 1),
        ("step", 2),
        ("evaluate", 3),
        ("sample", 3),
        ("step", 3),
        ("step", 4),
        ("checkpoint", 4),
        ("step", 5),
        ("evaluate", 6),
        ("step", 6),
        ("checkpoint", 6),
        ("end", None),
    ]
    assert [step for step, _ in steps] == list(range(1, 7))
    assert all(metrics.keys() >= {"loss", "grad_norm", "learning_rate", "nll"} for _, metrics in steps)
    reported = [row["loss"] for row in lines(tmp_path / "a") if row["split"] == "train"]
    assert reported[0] == pytest.approx(sum(metrics["loss"] for _, metrics in steps[:4]) / 4)
    paths = [values[1] for event, *values in everything.seen if event == "checkpoint"]
    assert all(path.is_dir() for path in paths)


def test_callbacks_change_no_number(model_folder, tmp_path):
    trained(model_folder, tmp_path / "a")
    trained(model_folder, tmp_path / "b", lambda step, metrics: None)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


class Theirs(TrainingCallback):
    """As mlx-lm's trainer calls it."""

    def __init__(self):
        self.train, self.valid = [], []

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.valid.append(val_info)


def test_callbacks_of_mlx_lm(model_folder, tmp_path):
    theirs = Theirs()
    trained(model_folder, tmp_path / "a", theirs)
    assert [info["iteration"] for info in theirs.train] == [4, 6]
    assert [info["iteration"] for info in theirs.valid] == [0, 3, 6]
    names = {"iteration", "train_loss", "learning_rate", "iterations_per_second", "tokens_per_second", "trained_tokens"}
    assert all(info.keys() == names | {"peak_memory"} for info in theirs.train)
    assert all(info.keys() == {"iteration", "val_loss", "val_time"} for info in theirs.valid)


@pytest.mark.parametrize(("event", "last"), [("on_step", 2), ("on_evaluate", 3), ("on_sample", 3), ("on_checkpoint", 5), (None, 2)])
def test_false_stops_after_a_checkpoint(model_folder, tmp_path, event, last):
    def stop(step, *_):
        return step < 2 if event in ("on_step", None) else step == 0

    stopper = type("Stopper", (), {event: staticmethod(stop)})() if event else stop
    how = {"save_every": 5}
    done = trained(model_folder, tmp_path / "a", stopper, **how)
    assert done["steps"] == last and done["stopped_early"].endswith("returned False")
    assert (tmp_path / "a" / "checkpoints" / f"{last:07d}").is_dir()
    trained(model_folder, tmp_path / "a", resume=True, **how)
    trained(model_folder, tmp_path / "b", **how)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    weights = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


class Broken:
    """Raises at one event."""

    def __init__(self, event):
        setattr(self, event, self.fail)

    def fail(self, *_):
        raise ZeroDivisionError("by zero")


@pytest.mark.parametrize(
    ("event", "steps"), [("on_start", 0), ("on_step", 1), ("on_evaluate", 0), ("on_checkpoint", 4), ("on_end", 6)]
)
def test_an_error_leaves_a_run_that_resumes(model_folder, tmp_path, event, steps):
    message = rf"^callback Broken\.{event} raised ZeroDivisionError: by zero \(.*test_callbacks\.py:\d+\)$"
    with pytest.raises(RunError, match=message) as raised:
        trained(model_folder, tmp_path / "a", Broken(event), save_every=4)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    saved = sorted(path.name for path in (tmp_path / "a" / "checkpoints").iterdir())
    assert saved[-1] == f"{steps:07d}"
    trained(model_folder, tmp_path / "a", resume=True, save_every=4)
    trained(model_folder, tmp_path / "b", save_every=4)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_a_reporter_is_a_callback(model_folder, tmp_path):
    class Mine(Reporter):
        def __init__(self):
            self.rows = []

        def record(self, row):
            self.rows.append(row["split"])

    assert ml.Reporter is Reporter
    mine = Mine()
    trained(model_folder, tmp_path / "a", mine)
    assert mine.rows == ["valid", "valid", "train", "train", "valid"]


@pytest.mark.parametrize("wrong", [3, Everything, "print"])
def test_what_is_no_callback(model_folder, tmp_path, wrong):
    with pytest.raises(InputError, match=r"^callbacks: "):
        trained(model_folder, tmp_path / "a", wrong)
    assert not (tmp_path / "a").exists()
