"""One flag per field of an attrs class, grouped in the help under the class's docstring; `--config` reads a YAML file."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

import attrs
import typer

from mlxlora import settings
from mlxlora.blas import load_fast_blas
from mlxlora.config import Training
from mlxlora.errors import InputError

Command = Callable[..., None]

_CONFIG = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of options by name; flags win over it.")]
_TRAIN = Annotated[bool, typer.Option(f"--{settings.TRAIN}", hidden=True)]
_OFF = "no_"


def flags(starter: str | None = None) -> Callable[[Command], Command]:
    """Replaces each attrs-typed parameter of a command by one flag per field.

    A value comes from its flag, else from the file of --config, else under --resume from the run that is continued, else
    from the starter's defaults, else from the field.

    Args:
        starter: mode of the bundled starter (sft, dpo, ...) that stands in where neither --model nor --data is given.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        groups = {name: p.annotation for name, p in signature.parameters.items()}
        fields = settings.fields_of(*groups.values())

        @functools.wraps(command)
        def run(ctx: typer.Context, config: str | None = None, **given: Any) -> None:
            named = _given(ctx, fields, given)
            values = (settings.read(config, fields) if config else {}) | named
            if values.get("resume"):
                values = _of_run(fields, values) | values
            if starter:
                values = _with_starter(starter, fields, values)
            built = {name: settings.build(group, values) for name, group in groups.items()}
            load_fast_blas()
            command(**built)

        parameters = _parameters([*groups.values()])
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameters(groups: Sequence[type]) -> list[inspect.Parameter]:
    """What Typer sees: the context, --config and every field of the groups."""
    own = [_parameter("ctx", inspect.Parameter.empty, typer.Context), _parameter("config", None, _CONFIG)]
    if Training in groups:
        own.append(_parameter(settings.TRAIN, False, _TRAIN))
    return own + [flag for cls in groups for field in attrs.fields(cls) for flag in _flags(field, cls)]


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(field: attrs.Attribute, cls: type) -> list[inspect.Parameter]:
    """The flag of a field as the help shows it, and its other spellings, hidden."""
    kind, default = field.type, field.default
    if _is_tuple(field):
        kind, default = list[str] | None, None if default is None else list(default)
    shown = typer.Option(_spelling(field), help=field.metadata["help"], rich_help_panel=inspect.getdoc(cls))
    hidden = [
        _parameter(alias, default, Annotated[kind, typer.Option(_dashed(alias), hidden=True)]) for alias in _aliases(field.name)
    ]
    if field.default is False:  # a file may have switched it on
        hidden.append(_parameter(_OFF + field.name, False, Annotated[bool, typer.Option(_dashed(_OFF + field.name), hidden=True)]))
    return [_parameter(field.name, default, Annotated[kind, shown]), *hidden]


def _spelling(field: attrs.Attribute) -> str:
    """`--x`, or `--x/--no-x` for a switch that is not off by default."""
    both = settings.plain_type(field.type) is bool and field.default is not False
    return f"{_dashed(field.name)}/{_dashed(_OFF + field.name)}" if both else _dashed(field.name)


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")


def _aliases(name: str) -> list[str]:
    return [alias for alias, target in settings.ALIASES.items() if target == name and "." not in alias]


def _is_tuple(field: attrs.Attribute) -> bool:
    return get_origin(settings.plain_type(field.type)) is tuple


def _given(ctx: typer.Context, fields: settings.Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options named on the command line, of the types of their fields."""
    named = {}
    for name, value in values.items():
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name == settings.TRAIN:
            continue
        option = settings.ALIASES.get(name, name)
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
    saved = settings.read(file, fields, strict=False) if file.is_file() else {}
    return {name: value for name, value in saved.items() if name != "overwrite"}


def _with_starter(mode: str, fields: settings.Fields, values: dict[str, Any]) -> dict[str, Any]:
    """Fills in the bundled model, data and defaults where neither a model nor data was named."""
    missing = [name for name in ("model", "data") if values.get(name) is None]
    if len(missing) == 1:
        other = "data" if missing == ["model"] else "model"
        raise InputError(f"--{other} needs --{missing[0]}; with neither of them, the bundled starter is used")
    if not missing:
        return values
    from mlxlora import starter

    if not values.get("quiet"):
        typer.echo("No --model and no --data: using the bundled starter, a tiny model and its data.")
    defaults = settings.read(starter.defaults(mode), fields, strict=False)
    return defaults | values | {"model": str(starter.model_path()), "data": str(starter.data_path(mode))}
