"""One flag per field of an attrs class, grouped in the help under the class's docstring; `--config` reads a YAML file."""

import functools
import gc
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_origin

import attrs
import typer
import yaml

from mlxlora import peers, settings
from mlxlora.blas import load_fast_blas
from mlxlora.config import Training
from mlxlora.errors import InputError
from mlxlora.launched import launched_rank

from .completion import completer

Command = Callable[..., None]

_CONFIG = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of options by name; flags win over it.")]
_TRAIN = Annotated[bool, typer.Option(f"--{settings.TRAIN}", hidden=True)]
_OFF = "no_"


def flags(starter: str | None = None, others: bool = False) -> Callable[[Command], Command]:
    """Replaces each attrs-typed parameter of a command by one flag per field.

    A value comes from its flag, else from the file of --config, else under --resume from the run that is continued, else
    from the starter's defaults, else from the field.

    Args:
        starter: mode of the bundled starter (sft, dpo, ...) that stands in where neither --model nor --data is given; an option
            `method` wins over it.
        others: whether the file of --config may have other options too, as that of a run.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        groups = {name: p.annotation for name, p in signature.parameters.items()}
        fields = settings.fields_of(*groups.values())

        trains = starter if Training in groups.values() and not others else None

        @functools.wraps(command)
        def run(ctx: typer.Context, config: str | None = None, **given: Any) -> None:
            told: list[str] = []
            named = settings.take(_of_peers(ctx, given), fields, trains, told.append) | _given(ctx, fields, given, trains)
            values = (settings.read(config, fields, not others, trains, named, told.append) if config else {}) | named
            for note in () if values.get("quiet") else told:
                typer.echo(f"note: {note}")
            if values.get("resume"):
                values = _of_run(fields, values) | values
            if starter:
                values = _with_starter(values.get("method", starter), fields, values)
            built = {name: settings.build(group, values) for name, group in groups.items()}
            load_fast_blas()
            _import_recipes()
            command(**built)

        parameters = _parameters([*groups.values()], trains)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _import_recipes() -> None:
    """Imports what commands run, without looking for garbage meanwhile: there is none, and looking takes 0.08 s."""
    gc.disable()
    try:
        import_module("mlxlora.recipes")
    finally:
        gc.enable()


def _parameters(groups: Sequence[type], command: str | None) -> list[inspect.Parameter]:
    """What Typer sees: the context, --config, every field of the groups and, where something is trained, the peers' flags."""
    own = [_parameter("ctx", inspect.Parameter.empty, typer.Context), _parameter("config", None, _CONFIG)]
    if Training in groups:
        own.append(_parameter(settings.TRAIN, False, _TRAIN))
    own += [_peer_flag(name) for name in peers.FLAGS if command and peers.of(_key(name), command)]
    return own + [flag for cls in groups for field in attrs.fields(cls) for flag in _flags(field, cls, command)]


def _key(name: str) -> peers.Key:
    found = peers.find(name)
    assert found is not None
    return found


def _peer_flag(name: str) -> inspect.Parameter:
    kind = bool if _key(name).switch else str | None
    return _parameter(name, False if kind is bool else None, Annotated[kind, typer.Option(_dashed(name), hidden=True)])


def _of_peers(ctx: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The peers' flags on the command line, read as YAML would."""
    named = {name: values[name] for name in peers.FLAGS if name in values and _is_given(ctx, name)}
    return {name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in named.items()}


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(field: attrs.Attribute, cls: type, command: str | None) -> list[inspect.Parameter]:
    """The flag of a field as the help shows it, and its other spellings, hidden."""
    kind, default = field.type, field.default
    if _is_tuple(field):
        kind, default = list[str] | None, None if default is None else list(default)
    shown = typer.Option(
        _spelling(field),
        help=field.metadata["help"].replace("[", "\\["),  # not markup
        rich_help_panel=inspect.getdoc(cls),
        metavar=_metavar(field),
        autocompletion=completer(cls.__name__, field.name),
    )
    hidden = [
        _parameter(alias, default, Annotated[kind, typer.Option(_dashed(alias), hidden=True)])
        for alias, name in _aliases(command).items()
        if name == field.name
    ]
    if field.default is False:  # a file may have switched it on
        hidden.append(_parameter(_OFF + field.name, False, Annotated[bool, typer.Option(_dashed(_OFF + field.name), hidden=True)]))
    return [_parameter(field.name, default, Annotated[kind, shown]), *hidden]


def _metavar(field: attrs.Attribute) -> str | None:
    """What stands for the value: nothing for a switch, commas for a list; None: the type's name."""
    if settings.plain_type(field.type) is bool:
        return ""
    return "<a,b,...>" if _is_tuple(field) else None


def _spelling(field: attrs.Attribute) -> str:
    """`--x`, or `--x/--no-x` for a switch that is not off by default."""
    both = settings.plain_type(field.type) is bool and field.default is not False
    return f"{_dashed(field.name)}/{_dashed(_OFF + field.name)}" if both else _dashed(field.name)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _aliases(command: str | None) -> dict[str, str]:
    return {alias: name for alias, name in {**settings.ALIASES, **peers.aliases(command)}.items() if "." not in alias}


def _is_tuple(field: attrs.Attribute) -> bool:
    return get_origin(settings.plain_type(field.type)) is tuple


def _given(ctx: typer.Context, fields: settings.Fields, values: Mapping[str, Any], command: str | None) -> dict[str, Any]:
    """The options named on the command line, of the types of their fields."""
    named = {}
    for name, value in values.items():
        if not _is_given(ctx, name) or name == settings.TRAIN or name in peers.FLAGS:
            continue
        option = name if name in fields else _aliases(command).get(name, name)
        if option in fields:
            named[option] = _split(fields[option], value) if _is_tuple(fields[option]) else value
        else:
            named[name.removeprefix(_OFF)] = False
    return named


def _split(field: attrs.Attribute, parts: list[str]) -> tuple[Any, ...]:
    """A flag given several times, with commas, or both."""
    try:
        return settings.coerce(",".join(parts), field.type)
    except ValueError as error:
        raise InputError(f"{_dashed(field.name)} must be {error}, got {','.join(parts)!r}") from None


def _of_run(fields: settings.Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the run in --adapter-path, which saved them, so that `--resume` needs no others."""
    file = Path(values.get("adapter_path", fields["adapter_path"].default)) / "config.yaml"
    named = {**values, "adapter_path": str(file.parent)}  # where the run is, not where it was
    saved = settings.read(file, fields, strict=False, given=named, stored=True) if file.is_file() else {}
    return {name: value for name, value in saved.items() if name != "overwrite"} | {"adapter_path": named["adapter_path"]}


def _with_starter(mode: str, fields: settings.Fields, values: dict[str, Any]) -> dict[str, Any]:
    """Fills in the bundled model, data and defaults where neither a model nor data was named."""
    missing = [name for name in ("model", "data") if values.get(name) is None]
    if len(missing) == 1:
        other = "data" if missing == ["model"] else "model"
        raise InputError(f"--{other} needs --{missing[0]}; with neither of them, the bundled starter is used")
    if not missing:
        return values
    from mlxlora import starter

    if not values.get("quiet") and not launched_rank():
        typer.echo("No --model and no --data: using the bundled starter, a tiny model and its data.")
    defaults = settings.read(starter.defaults(mode), fields, strict=False)
    return defaults | values | {"model": str(starter.model_path()), "data": str(starter.data_path(mode))}
