"""Where the options of a command come from: its flags, a file, an earlier run, the bundled starter."""

from collections.abc import Collection, Mapping
from typing import Any

import attrs
from attrs import frozen

from mlxlora.config.config_file import ALIASES, METHOD, TRAIN, CommandLine, Reading, layered, read_config
from mlxlora.config.fields import dashed
from mlxlora.config.method_options import fields_of
from mlxlora.config.options import DataOptions, RowOptions
from mlxlora.config.values import coerce
from mlxlora.errors import InputError
from mlxlora.methods import METHODS, commands
from mlxlora.reporting.history import SETTINGS, read_settings
from mlxlora.training.run_folder import check_run
from mlxlora.utils.launch import launched_rank
from mlxlora.utils.output import echo, one_line_of
from mlxlora.utils.paths import checked_path

OFF = "no_"
"""Begins the name of a flag that switches an option off."""


@frozen
class Layers:
    """What a command takes.

    Attributes:
        fields: its options by name.
        groups: the groups that they are in.
        command: the training command; None: it does not train.
        starter: method whose bundled rows stand in where neither --model nor --data is given; None: none.
        strict: whether the file of --config may have no other options.
    """

    fields: Mapping[str, attrs.Attribute]
    groups: Collection[type]
    command: str | None
    starter: str | None
    strict: bool

    def reading(self, *, strict: bool) -> Reading:
        """How files become options."""
        return Reading(self.fields, self.command, strict, commands=commands())


@frozen
class Typed:
    """The flags that were given.

    Attributes:
        given: by parameter, as Typer read them.
        written: the options that are written as text: lists with commas, objects as JSON.
        others: flags that only mlx-lm and mlx-lm-lora have.
    """

    given: Mapping[str, Any]
    written: Collection[str]
    others: Mapping[str, Any]


def resolved(layers: Layers, typed: Typed, config: str | None) -> dict[str, Any]:
    """The options of a command.

    A flag wins over the file of --config, this over the run that --resume continues, this over the starter's defaults. A
    command that reads rows with the adapters of a run takes the run's rows if --data names none.

    Raises:
        InputError: an option that does not exist, or a value that it does not take.
    """
    notes: list[str] = []
    line = CommandLine(_options(typed, layers.fields), typed.others, [*typed.others, *typed.given])
    reading = attrs.evolve(layers.reading(strict=layers.strict), note=notes.append)
    values = layered(line, config, reading)
    for note in () if values.get("quiet") or launched_rank() else notes:
        echo(one_line_of(f"note: {note}"), err=bool(values.get("json")))
    if values.get("resume") and not values.get("overwrite"):  # the run itself refuses both
        values = _of_run(layers, values) | values
    if DataOptions in layers.groups and not layers.command and values.get("adapter_path"):
        return _rows_of_run(values, seeded="seed" in layers.fields) | values
    return _with_starter(values.get(METHOD, layers.starter), layers, values) if layers.starter else values


def _options(typed: Typed, fields: Mapping[str, attrs.Attribute]) -> dict[str, Any]:
    """The options that flags set, with the types of their fields."""
    named = {}
    for name, value in typed.given.items():
        option = name if name in fields else ALIASES.get(name, name)
        if option in fields:
            named[option] = _split(fields[option], value) if option in typed.written else value
        elif name != TRAIN:
            named[name.removeprefix(OFF)] = False
    if named.get("report_to") in (("none",), ("None",)):  # as in mlx-lm
        named["report_to"] = None
    return named


def _split(field: attrs.Attribute, given: str | list[str]) -> Any:
    """The object of a flag; or the values of one that was given several times, with commas, or both."""
    text = given if isinstance(given, str) else ",".join(given)
    try:
        return coerce(text, field.type)
    except ValueError as error:
        raise InputError(f"{dashed(field.name)} must be {error}, got {text!r}") from None


def _of_run(layers: Layers, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options that the run in --adapter-path stored, so that `--resume` needs no others."""
    file = checked_path(values.get("adapter_path", layers.fields["adapter_path"].default), "--adapter-path") / SETTINGS
    if file.is_file() or not launched_rank():  # other ranks may have no such folder
        check_run(file.parent, layers.command)
    named = {**values, "adapter_path": str(file.parent)}  # where the run is now
    reading = attrs.evolve(layers.reading(strict=False), command=None)
    saved = read_config(file, reading, named, stored=True) if file.is_file() else {}
    return {name: value for name, value in saved.items() if name != "overwrite"} | {"adapter_path": named["adapter_path"]}


def _rows_of_run(values: Mapping[str, Any], *, seeded: bool) -> dict[str, Any]:
    """The data of the run that wrote the adapters, with its options, if --data names none and the run's rows have text."""
    if values.get("data") is not None:
        return {}
    file = checked_path(values["adapter_path"], "--adapter-path") / SETTINGS
    run = read_settings(file)
    name = run.get(METHOD)
    method = METHODS.get(name) if isinstance(name, str) else None
    asks = bool(values.get("rewards") or values.get("judge_model"))  # prompts, which rows of any method may have
    if method is None or (method.kinds.kind(RowOptions) is not DataOptions and not asks):
        return {}
    system = {"system": run["system"]} if asks and isinstance(run.get("system"), str) else {}
    seed = {"seed": run["seed"]} if seeded and type(run.get("seed")) is int else {}
    return read_config(file, Reading(fields_of(DataOptions), strict=False), values, stored=True) | seed | system


def _with_starter(method: str, layers: Layers, values: dict[str, Any]) -> dict[str, Any]:
    """Fills in the bundled model, data and defaults where neither a model nor data was named."""
    missing = [name for name in ("model", "data") if values.get(name) is None]
    if len(missing) == 1:
        other = "data" if missing == ["model"] else "model"
        raise InputError(f"--{other} needs --{missing[0]}; with neither of them, the bundled starter is used")
    if not missing:
        return values
    from mlxlora import starter

    if not values.get("quiet") and not launched_rank():
        echo("No --model and no --data: using the bundled starter, a tiny model and its data.", err=bool(values.get("json")))
    defaults = read_config(starter.defaults(method), Reading(layers.fields, strict=False))
    return defaults | values | {"model": str(starter.model_path()), "data": str(starter.data_path(method))}
