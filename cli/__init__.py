"""The command line: `mlxlora COMMAND`, one small module per command. Importing a command imports no mlx."""

import atexit
import gc
import sys
from collections.abc import Callable
from copy import copy
from typing import Annotated, Any, NoReturn

import typer

from mlxlora import __version__
from mlxlora.errors import InputError, RunError, SharedError
from mlxlora.utils.launch import launched_rank
from mlxlora.utils.output import echo, guard_streams, say

from .chat import chat
from .command import Command
from .compare import compare
from .doctor import doctor
from .eval import evaluate
from .export import export
from .flags import usage
from .fuse import fuse
from .generate import generate
from .import_ import import_adapters
from .init import init
from .merge import merge
from .nearest import with_nearest
from .preview import preview
from .push import push
from .report import report
from .sweep import sweep
from .train import TRAINING

_UsageError: Any = typer.BadParameter.__mro__[1]  # click's; raised for unknown flags and values that do not parse

app = typer.Typer(
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["--help", "-h"]},
    epilog="Start with `mlxlora sft`: without options it trains a bundled model. Then `mlxlora sft --help`.",
)

_TRAINED = "--model mlx-community/Qwen3-0.6B-4bit --data my-data"
_COMMANDS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    "Train": {
        **TRAINING,
        "sweep": (sweep, f"sft {_TRAINED} --learning-rate 1e-5,1e-4 --rank 4,16"),
        "init": (init, "--config-file config.json --tokenizer some-model --output new-model --dtype bfloat16"),
    },
    "Inspect": {
        "preview": (preview, f"{_TRAINED} --mask-prompt --num 5"),
        "generate": (generate, '--adapter-path adapters --prompt "What is MLX?" --max-tokens 200'),
        "chat": (chat, '--adapter-path adapters --system "You are brief."'),
        "eval": (evaluate, f"{_TRAINED} --adapter-path adapters --mask-prompt --split test"),
        "compare": (compare, "--adapter-path adapters --data my-data --num 5"),
        "report": (report, "adapters adapters-2 --output comparison.html"),
        "doctor": (doctor, ""),
    },
    "Share": {
        "fuse": (fuse, "--adapter-path adapters --save-path fused"),
        "push": (push, "adapters me/my-adapters"),
        "export": (export, "--adapter-path adapters --peft adapters-peft"),
        "import": (import_adapters, "--model Qwen/Qwen3-0.6B --peft adapters-peft --adapter-path adapters"),
        "merge": (merge, "adapters-a adapters-b --weights 0.5,0.5 --save-path merged"),
    },
}
for _panel, _commands in _COMMANDS.items():
    for _name, (_command, _example) in _commands.items():
        app.command(
            _name,
            cls=Command,
            rich_help_panel=_panel,
            epilog=f"Example: mlxlora {_name} {_example}".rstrip(),
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True} if _command is sweep else None,
        )(_command)


def _version(asked: bool) -> None:
    if asked:
        echo(f"mlxlora {__version__}")
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
    """Runs the command line; prints one line on stderr for a user's mistake (exit code 2) or a failed run (exit code 1)."""
    guard_streams()
    atexit.register(gc.freeze)  # saves 0.15 s at exit, which the interpreter spends on searching transformers for garbage
    try:
        code = _named(sys.argv[1:2])(prog_name="mlxlora", standalone_mode=False)
    except SharedError as error:
        from mlxlora.distributed.ranks import current_ranks

        _fail(str(error), 1, said_elsewhere=not current_ranks().says(error))
    except (InputError, RunError) as error:
        _fail(with_nearest(str(error)), 1 if isinstance(error, RunError) else 2)
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "mlxlora"
        _fail(f"{usage(error)}; see `{command} --help`", 2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    else:
        sys.exit(code or 0)


def _named(names: list[str]) -> typer.Typer:
    """The app with the named command alone, because Typer takes 0.06 s to build all commands."""
    only = copy(app)
    only.registered_commands = [command for command in app.registered_commands if command.name in names] or app.registered_commands
    return only


def _fail(message: str, code: int, *, said_elsewhere: bool = False) -> NoReturn:
    """Prints the message, once for ranks that fail together, and exits."""
    rank = launched_rank()
    if not said_elsewhere:
        say(f"mlxlora: error: {f'rank {rank}: ' if rank else ''}{message}")
    sys.exit(code)
