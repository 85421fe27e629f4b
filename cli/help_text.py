"""The help of a command: the options that most runs need, the most used first; `--help-all` shows all, grouped."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlxlora.config.fields import choices

ALL = "--help-all"
LIMIT = 25  # options of a method's short help: two screens of 24 lines at 80 columns

_LINE = 50  # characters of a help text beside the flags at 80 columns

_FIRST = (
    *("model", "data", "adapter_path", "iters", "epochs", "batch_size", "learning_rate", "max_seq_length"),
    *("mask_prompt", "use_chat_template"),
)
_OWN = (
    *("rewards", "reward_file", "judge_model", "teacher_model", "divergence", "group_size", "max_completion_length"),
    *("beta", "loss_type"),
)
_OWN_PANELS = ("Objective", "Rewards", "Sampling")
_NEXT = (
    *("train_type", "rank", "num_layers", "quantize", "lr_schedule", "grad_checkpoint", "steps_per_eval", "keep_best"),
    *("resume", "overwrite", "dry_run"),
)
_MORE = ("grad_accumulation_steps", "warmup", "valid_fraction", "optimizer", "test", "seed", "save_every", "steps_per_report")
_LAST = ("config", "help")


def most_used(options: Mapping[str, Any]) -> list[Any]:
    """The options of a training command that most runs need, the most used first: of all methods, of its own, of all methods."""
    first, later = ([name for name in names if name in options] for names in (_FIRST, _NEXT))
    panel = [name for name, option in options.items() if option.rich_help_panel in _OWN_PANELS]
    own = sorted(panel, key=lambda name: _OWN.index(name) if name in _OWN else len(_OWN) + _OWN_PANELS.index(_panel(options[name])))
    room = LIMIT - len(first) - len(later)
    chosen = [*first, *own[: min(room, len(_OWN))], *later]
    chosen += [name for name in _MORE if name in options][: LIMIT - len(chosen)]
    return [options[name] for name in chosen]


def write_help(ctx: Any, command: Any, *, short: bool) -> None:
    """Prints the help of a command; nothing in it is cut, and no line is longer than the terminal.

    Args:
        ctx: of the command.
        command: its options, its docstring and its example.
        short: whether to show the most used options only.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    shown = [p for p in command.get_params(ctx) if not p.hidden]
    named = {p.name: p for p in shown}
    pieces = " ".join(command.collect_usage_pieces(ctx))
    console.print(Text.assemble("Usage: ", (f"{ctx.command_path} {pieces}", "bold")))
    console.print(Text(f"{command.help or ''}\n".lstrip()))
    last = [named[name] for name in _LAST if name in named]
    if short:
        _print_options(console, "", [*most_used(named), named["config"]], short=True)
        console.print(Text(f"{ALL} shows all {len(shown) - len(last)} options."))
    else:
        for title, options in _grouped([*(p for p in shown if p not in last), *last]):
            _print_options(console, title, options)
    if command.epilog:
        console.print(Text(command.epilog, overflow="fold"), soft_wrap=not console.is_terminal)


def _grouped(options: Sequence[Any]) -> Iterator[tuple[str, list[Any]]]:
    """The options by panel, in the order of the panels; arguments first."""
    panels: dict[str, list[Any]] = {}
    for option in options:
        panels.setdefault(_panel(option), []).append(option)
    yield from sorted(panels.items(), key=lambda entry: entry[0] != "Arguments")


def _panel(option: Any) -> str:
    return option.rich_help_panel or ("Options" if option.opts[0].startswith("-") else "Arguments")


def _print_options(console: Any, title: str, options: Sequence[Any], *, short: bool = False) -> None:
    from rich.table import Table
    from rich.text import Text

    if not options:
        return
    if title:
        console.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    grid.add_column(no_wrap=True, min_width=18)
    grid.add_column(overflow="fold")
    for option in options:
        text = _first_clause(_described(option)) if short else _described(option)
        grid.add_row(Text(f" {_spelled(option)}", style="cyan"), Text.assemble(text, (_values(option, text), "dim")))
    console.print(grid)
    if not short:
        console.print()


def _spelled(option: Any) -> str:
    """`-c, --config`; for a switch that is on by default, both spellings."""
    if not option.opts[0].startswith("-"):
        return option.metavar or option.name.upper()
    short = [name for name in option.opts if not name.startswith("--")]
    long = [name for name in option.opts if name.startswith("--")]
    return ", ".join([*short, *long]) + "".join(f" / {name}" for name in option.secondary_opts)


def _described(option: Any) -> str:
    return (option.help or "").replace("\\[", "[")  # escaped for Typer's markup


def _first_clause(text: str) -> str:
    """A short text, else its first sentence, without its full stop; of more than a line, what stands before a semicolon or bracket.

    >>> _first_clause("Steps between two validations; 0 = only after the last step.")
    'Steps between two validations'
    """
    sentence = (text if len(text) <= 85 else text.split(". ")[0]).rstrip(".")
    clause = sentence if len(sentence) <= _LINE else sentence.split("; ")[0]
    return clause if len(clause) <= _LINE else re.sub(r" \([^)]*\)$", "", clause)


def _values(option: Any, text: str) -> str:
    """The choices that the text does not name, and the default, such as ` (lora, dora, full) [lora]`; words do not break."""
    names = list(map(str, offered(option)))
    named = set(re.findall(r"\w+", text))
    missing = "" if named.issuperset(names) else f" ({', '.join(names)})"
    default = option.default
    if getattr(option, "is_flag", False) or callable(default) or default in (None, "", [], ()):
        return missing
    return f"{missing} [{','.join(map(str, default)) if isinstance(default, list | tuple) else default}]"


def offered(option: Any) -> Sequence[Any]:
    """The choices of an option; where Typer keeps them depends on its version."""
    described = getattr(option, "type_descriptor", None)
    return choices(described.annotation) if described else getattr(option.type, "choices", ())
