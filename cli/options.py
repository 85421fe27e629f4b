"""One flag per field of an attrs class, grouped in the help under the class's docstring; `--config` reads a YAML file.

The flags of mlx-lm and mlx-lm-lora are taken out of a command line before Typer reads it.
"""

import functools
import gc
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, get_origin

import attrs
import typer
import yaml

from mlxlora.config import config_file as settings
from mlxlora.config import mlx_lm_compat as peers
from mlxlora.config.fields import dashed, panel_of, plain_type
from mlxlora.config.options import DataOptions, Training
from mlxlora.errors import InputError
from mlxlora.reporting.history import SETTINGS, read_settings
from mlxlora.training.run_folder import check_run
from mlxlora.utils.blas import load_fast_blas
from mlxlora.utils.launch import launched_rank

from .completion import completer

Command = Callable[..., None]

_CONFIG = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of options by name; flags win over it.")]
_TRAIN = Annotated[bool, typer.Option(f"--{settings.TRAIN}", hidden=True)]
_MODEL = "Model folder or hub name. Without --model and --data the bundled starter is trained."
_OFF = "no_"
_PEERS = "peers"  # where a context has the flags of peers


def flags(
    starter: str | None = None, others: bool = False, texts: Mapping[str, str | None] | None = None
) -> Callable[[Command], Command]:
    """Replaces each attrs-typed parameter of a command by one flag per field.

    A value comes from its flag, else from the file of --config, else under --resume from the run that is continued, else
    from the starter's defaults, else from the field. What scores rows with adapters takes those of their run where none are named.

    Args:
        starter: mode of the bundled starter (sft, dpo, ...) that stands in where neither --model nor --data is given; an option
            `method` wins over it.
        others: whether the file of --config may have other options too, as that of a run.
        texts: the help of options that are something else in this command; None: it has no such flag.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        groups = {name: p.annotation for name, p in signature.parameters.items()}
        fields = settings.fields_of(*groups.values())

        trains = command.__name__.replace("_", "-") if Training in groups.values() else None
        helps = ({"model": _MODEL} if trains and starter else {}) | dict(texts or {})

        @functools.wraps(command)
        def run(ctx: typer.Context, config: str | None = None, **given: Any) -> None:
            told: list[str] = []
            typed = _typed(ctx, fields, given)
            if peers.LISTING in typed.others:
                _list_rewards()
                return
            values = settings.layered(typed, config, fields, not others, trains, told.append)
            for note in () if values.get("quiet") or launched_rank() else told:
                typer.echo(f"note: {note}")
            if values.get("resume") and not values.get("overwrite"):  # with both, the recipe says that there is no such thing
                values = _of_run(fields, values, trains) | values
            if DataOptions in groups.values() and not trains and values.get("adapter_path"):
                values = _rows_of_run(values, "seed" in fields) | values
            elif starter:
                values = _with_starter(values.get("method", starter), fields, values)
            built = {name: settings.build(group, values) for name, group in groups.items()}
            load_fast_blas()
            _import_recipes()
            command(**built)

        parameters = _parameters([*groups.values()], helps)
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _import_recipes() -> None:
    """Imports what commands run, without looking for garbage meanwhile: there is none, and looking takes 0.08 s."""
    gc.disable()
    try:
        import_module("mlxlora.methods")
    finally:
        gc.enable()


def _parameters(groups: Sequence[type], helps: Mapping[str, str | None]) -> list[inspect.Parameter]:
    """What Typer sees: the context, --config and every field of the groups that the command has a flag for."""
    own = [_parameter("ctx", inspect.Parameter.empty, typer.Context), _parameter("config", None, _CONFIG)]
    if Training in groups:
        own.append(_parameter(settings.TRAIN, False, _TRAIN))
    return own + [flag for cls in groups for field in attrs.fields(cls) for flag in _flags(field, cls, helps)]


def without_peers(ctx: typer.Context, own: Collection[str], args: Sequence[str]) -> list[str]:
    """The arguments of a training command without the flags that peers have and it has not, which the context keeps.

    Raises:
        InputError: such a flag has no value, or one too many.
    """
    if ctx.info_name not in peers.TAKERS:
        return list(args)
    found, left, rest = ctx.meta.setdefault(_PEERS, {}), [], list(args)
    while rest and rest[0] != "--":
        flag, equals, value = (argument := rest.pop(0)).partition("=")
        name = flag[2:].replace("-", "_")
        key = peers.flag(name) if flag.startswith("--") and flag not in own else None
        if key is None:
            left.append(argument)
        elif key.switch and not equals:
            found[name] = True
        elif key.switch or not (equals or (rest and not rest[0].startswith("--"))):
            raise InputError(f"{flag} {'takes no' if key.switch else 'needs a'} value; see `mlxlora {ctx.info_name} --help`")
        else:
            found[name] = _value(key, value if equals else rest.pop(0))
    return left + rest


def _value(key: peers.Key, text: str) -> Any:
    """What was typed, read as YAML would be where it is no option, which says of which type it is."""
    try:
        return text if key.option or key.turned else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _list_rewards() -> None:
    from mlxlora.rollouts.reward_functions import BUILT_IN

    typer.echo("\n".join(sorted(BUILT_IN)))


def usage(error: Any) -> str:
    """An error of Typer's in one line, without what pydantic puts before it."""
    text = error.format_message().rstrip(".").replace("Value error, ", "")
    named = re.search(r"--train-type': '([\w-]+)'", text)
    if named and (command := peers.command_of(named[1])):
        text += f"; that is a command: `mlxlora {command}`"
    return text


def _typed(ctx: typer.Context, fields: settings.Fields, values: Mapping[str, Any]) -> settings.Typed:
    """The command line."""
    others = ctx.meta.get(_PEERS, {})
    return settings.Typed(_given(ctx, fields, values), others, [*others, *(name for name in values if _is_given(ctx, name))])


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(field: attrs.Attribute, cls: type, helps: Mapping[str, str | None]) -> list[inspect.Parameter]:
    """The flag of a field as the help shows it, and its other spellings, hidden; none where the command has no use for it."""
    text = helps.get(field.name, field.metadata["help"])
    if text is None:
        return []
    kind, default = field.type, field.default
    if _is_tuple(field):
        kind, default = list[str] | None, None if default is None else list(default)
    shown = typer.Option(
        _spelling(field),
        help=text.replace("[", "\\["),  # not markup
        rich_help_panel=panel_of(cls),
        metavar=_metavar(field),
        autocompletion=completer(cls.__name__, field.name),
    )
    hidden = [
        _parameter(alias, default, Annotated[kind, typer.Option(dashed(alias), hidden=True)])
        for alias, name in settings.ALIASES.items()
        if name == field.name and "." not in alias
    ]
    if field.default is False:  # a file may have switched it on
        off = _OFF + field.name
        hidden.append(_parameter(off, False, Annotated[bool, typer.Option(dashed(off), hidden=True)]))
    return [_parameter(field.name, default, Annotated[kind, shown]), *hidden]


def _metavar(field: attrs.Attribute) -> str | None:
    """What stands for the value: nothing for a switch, commas for a list; None: the type's name."""
    if plain_type(field.type) is bool:
        return ""
    return "<a,b,...>" if _is_tuple(field) else None


def _spelling(field: attrs.Attribute) -> str:
    """`--x`, or `--x/--no-x` for a switch that is not off by default."""
    flag = dashed(field.name)
    both = plain_type(field.type) is bool and field.default is not False
    return f"{flag}/{dashed(_OFF + field.name)}" if both else flag


def _is_tuple(field: attrs.Attribute) -> bool:
    return get_origin(plain_type(field.type)) is tuple


def _given(ctx: typer.Context, fields: settings.Fields, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options named on the command line, of the types of their fields."""
    named = {}
    for name, value in values.items():
        if not _is_given(ctx, name) or name == settings.TRAIN:
            continue
        option = name if name in fields else settings.ALIASES.get(name, name)
        if option in fields:
            named[option] = _split(fields[option], value) if _is_tuple(fields[option]) else value
        else:
            named[name.removeprefix(_OFF)] = False
    if named.get("report_to") in (("none",), ("None",)):  # as mlx-lm has it
        named["report_to"] = None
    return named


def _split(field: attrs.Attribute, parts: list[str]) -> tuple[Any, ...]:
    """A flag given several times, with commas, or both."""
    try:
        return settings.coerce(",".join(parts), field.type)
    except ValueError as error:
        raise InputError(f"{dashed(field.name)} must be {error}, got {','.join(parts)!r}") from None


def _of_run(fields: settings.Fields, values: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """The options of the run in --adapter-path, which saved them, so that `--resume` needs no others."""
    file = Path(values.get("adapter_path", fields["adapter_path"].default)) / SETTINGS
    if file.is_file() or not launched_rank():  # other ranks may have no such folder
        check_run(file.parent, method)
    named = {**values, "adapter_path": str(file.parent)}  # where the run is, not where it was
    saved = settings.read(file, fields, strict=False, given=named, stored=True) if file.is_file() else {}
    return {name: value for name, value in saved.items() if name != "overwrite"} | {"adapter_path": named["adapter_path"]}


def _rows_of_run(values: Mapping[str, Any], seeded: bool) -> dict[str, Any]:
    """Where no data is named, that of the run which left the adapters, with its options, if it is rows of `sft`."""
    if values.get("data") is not None:
        return {}
    file = Path(values["adapter_path"]) / SETTINGS
    run = read_settings(file)
    if run.get(settings.METHOD) not in ("sft", "distill"):
        return {}
    seed = {"seed": run["seed"]} if seeded and type(run.get("seed")) is int else {}
    return settings.read(file, settings.fields_of(DataOptions), strict=False, given=values, stored=True) | seed


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
