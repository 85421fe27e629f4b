"""Trackers get the configuration and every record; whatever they do, training goes on."""

import sys
import types

import pytest
import yaml

import mlxlora as ml
from mlxlora import starter
from mlxlora.reporting.trackers import Tracker

OPTIONS = {"model": str(starter.model_path()), "data": str(starter.data_path("sft")), "mask_prompt": True, "answers": 0}
OPTIONS |= {"iters": 4, "num_layers": 1, "batch_size": 4, "val_batches": 1, "steps_per_report": 2}
HOSTED = ("wandb", "swanlab", "trackio")


class Hosted(types.ModuleType):
    """Stands in for wandb and its like; what is called is kept."""

    def __init__(self, name, fails=""):
        super().__init__(name)
        self.calls, self.fails, self.__spec__ = [], fails, types.SimpleNamespace()

    def _called(self, what, *args, **kwargs):
        self.calls.append((what, args, kwargs))
        if what == self.fails:
            raise ConnectionError("no\nnetwork")

    def init(self, **kwargs):
        self._called("init", **kwargs)

    def log(self, values, step):
        self._called("log", values, step)

    def finish(self):
        self._called("finish")


class Writer:
    """Stands in for tensorboardX's."""

    last = None

    def __init__(self, folder):
        Writer.last = self
        self.folder, self.scalars, self.texts, self.closed = folder, [], {}, False

    def add_text(self, name, text):
        self.texts[name] = text

    def add_scalar(self, *scalar):
        self.scalars.append(scalar)

    def close(self):
        self.closed = True


@pytest.fixture
def installed(monkeypatch):
    def put(name, **options):
        module = Hosted(name, **options)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return put


@pytest.mark.parametrize("name", HOSTED)
def test_hosted(name, installed, tmp_path, eager, monkeypatch):
    module = installed(name)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    ml.sft(**OPTIONS, report_to=(name,), adapter_path=str(tmp_path / "run-7"))
    (_, _, begun), *logged, (last, _, _) = module.calls
    assert begun["project"] == "mine" and "run-7" in begun.values() and last == "finish"
    assert begun["config"] == yaml.safe_load((tmp_path / "run-7" / "config.yaml").read_text())
    assert [args[1] for _, args, _ in logged] == [0, 2, 4, 4]
    assert "valid/loss" in logged[0][1][0] and "train/grad_norm" in logged[1][1][0]
    assert all(isinstance(value, float) for _, args, _ in logged for value in args[0].values())


def test_tensorboard(installed, tmp_path, eager, monkeypatch):
    module = installed("tensorboardX")
    module.SummaryWriter = Writer
    ml.sft(**OPTIONS, report_to=("tensorboard",), adapter_path=str(tmp_path))
    writer = Writer.last
    assert writer.folder == str(tmp_path / "tensorboard") and writer.closed and "iters: 4" in writer.texts["configuration"]
    assert {(name, step) for name, _, step in writer.scalars} >= {("train/loss", 2), ("valid/loss", 0), ("valid/loss", 4)}


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_is_one_warning(fails, installed, tmp_path, eager, capsys):
    module, other = installed("wandb", fails=fails), installed("trackio")
    results = ml.sft(**OPTIONS, report_to=("wandb", "trackio"), adapter_path=str(tmp_path))
    out = capsys.readouterr().out
    assert results["steps"] == 4 and out.count("--report-to wandb") == 1
    assert "warning: --report-to wandb: no network; mlxlora sends nothing more to it" in out
    assert [call[0] for call in module.calls].count(fails) == 1 and other.calls[-1][0] == "finish"


def test_ctrl_c_is_not_a_trackers_failure(tmp_path, monkeypatch):
    module = Hosted("wandb")
    module.init = lambda **_: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(KeyboardInterrupt):
        Tracker("wandb", tmp_path, print).start({})


def test_a_run_that_never_started_is_not_closed(tmp_path):
    Tracker("wandb", tmp_path, pytest.fail).finish({})


def test_what_is_no_number_is_not_sent(installed, tmp_path):
    module = installed("wandb")
    tracker = Tracker("wandb", tmp_path, pytest.fail)
    tracker.start({})
    tracker.record({"step": 1, "split": "train", "loss": 1, "note": "x", "kl": None})
    assert module.calls[-1][1] == ({"train/loss": 1.0}, 1)


@pytest.mark.parametrize(("name", "package"), [(n, n) for n in HOSTED] + [("tensorboard", "tensorboardX")])
def test_a_missing_package_is_told_before_anything_is_loaded(name, package, tmp_path, mlxlora, monkeypatch):
    monkeypatch.setattr("mlxlora.training.startup.find_spec", lambda _: None)
    monkeypatch.setattr("mlxlora.data.sources.load_rows", None)
    done = mlxlora("sft", "--report-to", name, "--adapter-path", tmp_path / "a")
    assert done.code == 2
    assert done.err == f"mlxlora: error: --report-to {name} needs {package}: pip install 'mlxlora[{name}]'\n"


def test_an_unknown_tracker(mlxlora):
    done = mlxlora("sft", "--report-to", "wandb,comet")
    assert done.code == 2 and "--report-to must be a list of wandb, swanlab, trackio, tensorboard" in done.err


def test_a_dry_run_tells_no_tracker(installed, tmp_path, eager):
    module = installed("wandb")
    ml.sft(**OPTIONS, report_to=("wandb",), dry_run=True, adapter_path=str(tmp_path / "a"))
    assert not module.calls and not (tmp_path / "a").exists()
