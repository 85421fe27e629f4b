"""`mlxlora sweep`."""

from collections.abc import Sequence
from itertools import product
from typing import Annotated, Any

import attrs
import typer

from mlxlora.config.config_file import ALIASES
from mlxlora.config.fields import dashed, is_list, is_mapping
from mlxlora.config.method_options import fields_of
from mlxlora.errors import InputError, choose
from mlxlora.methods import METHODS
from mlxlora.utils.context import assigned
from mlxlora.utils.output import echo_written

from .train import COLLECTED

_FOLDER = "sweep"
_ONE = {"model", "data", "adapter_path", "objective", "reward_file", "system", "chat_template", "resume_adapter_file"}
"""Options of text that may have commas."""


def sweep(
    ctx: typer.Context,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="The training command, such as sft.")],
) -> None:
    """Train with every combination of values: any option of METHOD takes several, such as --rank 4,16 --learning-rate 1e-5,1e-4.

    One run after the other, each in a folder of --adapter-path (default: sweep), with a page that compares them. The same command
    again continues a sweep that was interrupted.
    """
    row = choose(METHODS, method, "METHOD")
    fixed, several = _several(ctx.args, fields_of(*row.kinds.kinds()))
    folder, fixed = _folder(fixed)
    chosen = [dict(zip(several, values, strict=True)) for values in product(*several.values())]
    groups = [_groups(ctx, method, [*fixed, *(part for flag, value in some.items() for part in (flag, value))]) for some in chosen]
    from mlxlora.training.sweep import folder_name, run_all

    names = [ALIASES.get(name, name) for name in (flag[2:].replace("-", "_") for flag in several)]
    runs = {}
    for parts in groups:
        options = {field.name: getattr(part, field.name) for part in parts for field in attrs.fields(type(part))}
        varied = {name: options[name] for name in names}
        runs[folder_name(varied)] = (varied, options)
    done = run_all(row, runs, folder)
    best = ", ".join(f"{name} {done.best[name]}" for name in names)
    echo_written("best", done.best["adapters"], best)
    echo_written("report", done.page)


def _several(args: Sequence[str], fields: dict[str, attrs.Attribute]) -> tuple[list[str], dict[str, list[str]]]:
    """The arguments that all runs have, and the values of the flags that have several.

    Raises:
        InputError: no flag has.
    """
    rest, fixed, several = list(args), [], {}
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        name = ALIASES.get(name := flag[2:].replace("-", "_"), name)
        field = fields.get(name)
        may_vary = field is not None and name not in _ONE and not is_list(field.type) and not is_mapping(field.type)
        value = value if equals else (rest[0] if rest and may_vary else "")
        if flag.startswith("--") and may_vary and "," in value:
            rest = rest if equals else rest[1:]
            several[dashed(name)] = value.split(",")
        else:
            fixed.append(f"{flag}{equals}{value}" if equals else flag)
    if not several:
        raise InputError("sweep: nothing varies; give an option several values, such as --rank 4,16")
    return fixed, several


def _folder(args: list[str]) -> tuple[str, list[str]]:
    """The value of --adapter-path, and the other arguments."""
    for place, arg in enumerate(args):
        if arg == "--adapter-path" and place + 1 < len(args):
            return args[place + 1], args[:place] + args[place + 2 :]
        if arg.startswith("--adapter-path="):
            return arg.partition("=")[2], args[:place] + args[place + 1 :]
    return _FOLDER, args


def _groups(ctx: typer.Context, method: str, args: list[str]) -> tuple[Any, ...]:
    """The options that a command line of the method comes to."""
    assert ctx.parent is not None
    from typer.main import get_command

    from . import app

    collected: list[tuple[Any, ...]] = []
    with assigned(COLLECTED, collected):
        get_command(app).commands[method].main(args, prog_name=f"mlxlora {method}", standalone_mode=False)  # type: ignore[attr-defined]
    if not collected:
        raise InputError(f"sweep: `mlxlora {method}` was not going to train")
    return collected[0]
