"""Experiment trackers as reporters. A tracker that fails is dropped with one warning; training goes on."""

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import reason
from .reporter import Reporter, Values, numbers


class Tracker(Reporter):
    """Sends the configuration and every record to one backend until it fails.

    Args:
        name: wandb, swanlab, trackio or tensorboard.
        directory: of the run; its name is the run's name in the tracker.
        warn: receives one message if the backend fails.
    """

    def __init__(self, name: str, directory: str | Path, warn: Callable[[str], None]) -> None:
        self._name, self._directory, self._warn = name, Path(directory), warn
        self._open: Any = None
        self._failed = False

    def start(self, config: Values) -> None:
        self._try(lambda: setattr(self, "_open", _BACKENDS[self._name](self._name, self._directory, config)))

    def record(self, row: Values) -> None:
        values = {f"{row['split']}/{name}": float(value) for name, value in numbers(row).items()}
        self._try(lambda: self._open.log(values, row["step"]))

    def finish(self, summary: Values) -> None:
        self._try(lambda: self._open and self._open.close())

    def _try(self, action: Callable[[], Any]) -> None:
        """Runs an action; any exception is the tracker's problem (its network, account or disk) and turns it off."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:
            self._failed = True
            self._warn(f"--report-to {self._name}: {reason(error)}; mlxlora sends nothing more to it")


class _Hosted:
    """wandb and trackers with its interface: init, log, finish."""

    def __init__(self, name: str, directory: Path, config: Mapping[str, Any]) -> None:
        self._module = import_module(name)
        project = config.get("project_name") or os.environ.get(f"{name.upper()}_PROJECT", "mlxlora")
        self._module.init(project=project, config=dict(config), **{_RUN_NAME[name]: directory.name})

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self) -> None:
        self._module.finish()


_RUN_NAME = {"wandb": "name", "trackio": "name", "swanlab": "experiment_name"}


class _TensorBoard:
    """Writes event files to the folder of the run, for `tensorboard --logdir`."""

    def __init__(self, _: str, directory: Path, config: Mapping[str, Any]) -> None:
        self._writer = import_module("tensorboardX").SummaryWriter(str(directory / "tensorboard"))
        self._writer.add_text("configuration", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


_BACKENDS: dict[str, Callable[[str, Path, Mapping[str, Any]], Any]] = {
    "wandb": _Hosted,
    "swanlab": _Hosted,
    "trackio": _Hosted,
    "tensorboard": _TensorBoard,
}
