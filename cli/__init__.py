"""The command line: `mlxlora COMMAND`, one small module per command; none imports mlx before it runs."""

import sys
from typing import Annotated, Any, NoReturn

import typer

from mlxlora import __version__
from mlxlora.errors import InputError, RunError

from .cpo import cpo
from .dpo import dpo
from .eval import evaluate
from .generate import generate
from .grpo import grpo
from .init import init
from .orpo import orpo
from .sft import sft

_UsageError: Any = typer.BadParameter.__mro__[1]  # unknown flags, values that do not parse

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="rich")
app.command("sft")(sft)
app.command("dpo")(dpo)
app.command("orpo")(orpo)
app.command("cpo")(cpo)
app.command("grpo")(grpo)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("init")(init)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mlxlora {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Fine-tune language models on MLX."""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr (exit code 2), a failed run another (exit code 1)."""
    try:
        code = app(prog_name="mlxlora", standalone_mode=False)
    except (InputError, RunError) as error:
        _fail(str(error), 1 if isinstance(error, RunError) else 2)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "mlxlora"
        _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    else:
        sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"mlxlora: error: {message}", err=True)
    sys.exit(code)
