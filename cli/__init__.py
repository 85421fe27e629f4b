"""The command line: `mlxlora COMMAND`, one small module per command; none imports mlx before it runs."""

import atexit
import gc
import sys
from typing import Annotated, Any, NoReturn

import typer

from mlxlora import __version__
from mlxlora.errors import InputError, RunError

from .compare import compare
from .cpo import cpo
from .distill import distill
from .doctor import doctor
from .dpo import dpo
from .eval import evaluate
from .export import export
from .fuse import fuse
from .generate import generate
from .gkd import gkd
from .grpo import grpo
from .importing import import_adapters
from .init import init
from .kto import kto
from .online_dpo import online_dpo
from .orpo import orpo
from .preview import preview
from .push import push
from .report import report
from .sft import sft

_UsageError: Any = typer.BadParameter.__mro__[1]  # unknown flags, values that do not parse

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, rich_markup_mode="rich")
app.command("sft")(sft)
app.command("distill")(distill)
app.command("gkd")(gkd)
app.command("dpo")(dpo)
app.command("orpo")(orpo)
app.command("cpo")(cpo)
app.command("kto")(kto)
app.command("grpo")(grpo)
app.command("online-dpo")(online_dpo)
app.command("preview")(preview)
app.command("report")(report)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("compare")(compare)
app.command("fuse")(fuse)
app.command("export")(export)
app.command("import")(import_adapters)
app.command("push")(push)
app.command("init")(init)
app.command("doctor")(doctor)


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
    atexit.register(gc.freeze)  # the interpreter searches all of transformers for garbage as it ends, for 0.15 s
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
