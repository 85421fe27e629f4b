"""One flag for each option of a command, under the heading of its group; `--config` reads a YAML file."""

import functools
import gc
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import attrs
import typer
import yaml

from mlxlora.config import mlx_lm_compat as compat
from mlxlora.config.config_file import ALIASES, TRAIN
from mlxlora.config.fields import dashed, flag_type, is_list, is_mapping, panel_of, plain_type
from mlxlora.config.method_options import build, fields_of
from mlxlora.config.mlx_lm_keys import Key
from mlxlora.config.options import Training
from mlxlora.errors import InputError
from mlxlora.methods import METHODS, Method, commands
from mlxlora.utils.environment import set_up_mlx
from mlxlora.utils.output import echo

from .completion import completer
from .layers import OFF, Layers, Typed, resolved
from .nearest import nearest_command, nearest_flag, with_nearest

_CONFIG = Annotated[str | None, typer.Option("--config", "-c", help="YAML file of options by name; flags win over it.")]
_TRAIN = Annotated[bool, typer.Option(f"--{TRAIN}", hidden=True)]
_MODEL = "Model folder or hub name. Without --model and --data the bundled starter is trained."
_PEERS = "peers"  # key of the flags of mlx-lm and mlx-lm-lora in a context
_HEAVY = "mlxlora.training.session"


def flags(
    starter: str | None = None,
    others: bool = False,
    texts: Mapping[str, str | None] | None = None,
    method: Method[Any, Any] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces each parameter of a command, which is a group of options, by one flag for each option.

    `layers.resolved` says where a value comes from without a flag.

    Args:
        starter: method whose bundled rows stand in where neither --model nor --data is given; an option `method` wins over it.
        others: whether the file of --config may have other options too, as the file of a run has.
        texts: the help of options with another meaning in this command; None: the command has no such flag.
        method: trained by the command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        groups = {name: p.annotation for name, p in inspect.signature(command, eval_str=True).parameters.items()}
        fields = fields_of(*groups.values())
        stand_in = method.name if method and method.starter.runs else starter
        helps = ({"model": _MODEL} if method and stand_in else {}) | dict(texts or {})
        layers = Layers(fields, tuple(groups.values()), method.name if method else None, stand_in, strict=not others)

        @functools.wraps(command)
        def run(ctx: typer.Context, config: str | None = None, **given: Any) -> None:
            typed = _typed(ctx, fields, given)
            if compat.LISTING in typed.others:
                _list_rewards()
                return
            values = resolved(layers, typed, config)
            built = {name: build(group, values) for name, group in groups.items()}
            set_up_mlx()
            _import_heavy()
            command(**built)

        parameters = _parameters([*groups.values()], helps)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _import_heavy() -> None:
    """Imports what commands run with the garbage collector off; a collection finds nothing here and takes 0.08 s."""
    gc.disable()
    try:
        import_module(_HEAVY)
    finally:
        gc.enable()


def _list_rewards() -> None:
    from mlxlora.rollouts.reward_functions import BUILT_IN

    echo("\n".join(sorted(BUILT_IN)))


def usage(error: Any) -> str:
    """An error of Typer's in one line, without pydantic's prefix."""
    text = with_nearest(error.format_message().rstrip(".").replace("Value error, ", ""))
    params = error.ctx.command.params if error.ctx else ()
    if (flag := getattr(error, "option_name", "")) and "No such option" in text:
        known = [name for param in params for name in param.opts if name.startswith("--")]
        text = f"No such option: {flag}{nearest_flag(flag, known)}"
    if unknown := re.fullmatch(r"No such command '([^']*)'.*", text):
        text = f"No such command '{unknown[1]}'{nearest_command(unknown[1], error.ctx.command.list_commands(error.ctx))}"
    named = re.search(r"--train-type': '([\w-]+)'", text)
    if named and (command := commands().named(named[1])):
        text += f"; that is a command: `mlxlora {command}`"
    return text


# --- what Typer sees ----------------------------------------------------------------------------


def _parameters(groups: Sequence[type], helps: Mapping[str, str | None]) -> list[inspect.Parameter]:
    """The context, --config and a flag for each field of the groups that the command uses."""
    own = [_parameter("ctx", inspect.Parameter.empty, typer.Context), _parameter("config", None, _CONFIG)]
    if Training in groups:
        own.append(_parameter(TRAIN, False, _TRAIN))
    return own + [flag for cls in groups for field in fields_of(cls).values() for flag in _flags(field, cls, helps)]


def _parameter(name: str, default: Any, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(field: attrs.Attribute, cls: type, helps: Mapping[str, str | None]) -> list[inspect.Parameter]:
    """The flag of a field as the help shows it, and its other spellings, hidden; none if the command does not use it."""
    text = helps.get(field.name, field.metadata["help"])
    if text is None:
        return []
    kind, default = flag_type(field.type), field.default
    if is_list(field.type):
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
        for alias, name in ALIASES.items()
        if name == field.name and "." not in alias
    ]
    if field.default is False:  # a file may have switched it on
        off = OFF + field.name
        hidden.append(_parameter(off, False, Annotated[bool, typer.Option(dashed(off), hidden=True)]))
    return [_parameter(field.name, default, Annotated[kind, shown]), *hidden]


def _metavar(field: attrs.Attribute) -> str | None:
    """What the help shows for the value: nothing for a switch, commas for a list; None: the name of the type."""
    if plain_type(field.type) is bool:
        return ""
    return "<a,b,...>" if is_list(field.type) else None


def _spelling(field: attrs.Attribute) -> str:
    """`--x`, or `--x/--no-x` for a switch that is not off by default."""
    flag = dashed(field.name)
    both = plain_type(field.type) is bool and field.default is not False
    return f"{flag}/{dashed(OFF + field.name)}" if both else flag


# --- what was typed -----------------------------------------------------------------------------


def without_peers(ctx: typer.Context, own: Collection[str], args: Sequence[str]) -> list[str]:
    """Takes the flags that only mlx-lm and mlx-lm-lora have out of a training command's arguments, and stores them in the context.

    Raises:
        InputError: such a flag has no value, or one too many.
    """
    if ctx.info_name not in METHODS:
        return list(args)
    found, left, rest = ctx.meta.setdefault(_PEERS, {}), [], list(args)
    while rest and rest[0] != "--":
        flag, equals, value = (argument := rest.pop(0)).partition("=")
        name = flag[2:].replace("-", "_")
        key = compat.flag(name) if flag.startswith("--") and flag not in own else None
        if key is None:
            left.append(argument)
        elif key.switch and not equals:
            found[name] = rest.pop(0).lower() == "true" if rest and rest[0].lower() in ("true", "false") else True
        elif key.switch or not (equals or (rest and not rest[0].startswith("--"))):
            raise InputError(f"{flag} {'takes no' if key.switch else 'needs a'} value; see `mlxlora {ctx.info_name} --help`")
        else:
            found[name] = _value(key, value if equals else rest.pop(0))
    return left + rest


def _value(key: Key, text: str) -> Any:
    """The value of a peer's flag: text for an option, which knows its type, else as YAML reads it."""
    try:
        return text if key.option or key.convert else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _typed(ctx: typer.Context, fields: Mapping[str, attrs.Attribute], values: Mapping[str, Any]) -> Typed:
    """The flags that were given, as Typer read them, and those of peers."""
    given = {name: value for name, value in values.items() if _is_given(ctx, name)}
    written = {name for name, field in fields.items() if is_list(field.type) or is_mapping(field.type)}
    return Typed(given, written, ctx.meta.get(_PEERS, {}))


def _is_given(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
