"""`mlxlora compare`."""

import json
from collections.abc import Sequence
from typing import Any

import typer
from attrs import asdict, frozen
from attrs import validators as v

from mlxlora.config import ModelOptions, option
from mlxlora.errors import InputError

from .options import flags


@frozen
class CompareOptions:
    """Comparison"""

    adapter_path: tuple[str, ...] = option((), "Folder of adapters; may be given several times.")
    prompt: str | None = option(None, "What to answer.")
    data: str | None = option(None, "Rows whose prompts to answer, of their test split if there is one.")
    num: int = option(5, "How many of these rows.", v.ge(1))
    system: str | None = option(None, "System message of prompts that bring none.")
    max_tokens: int = option(256, "Most tokens of an answer.", v.ge(1))
    temperature: float = option(0.0, "Temperature of sampling; 0 = always the likeliest token.", v.ge(0))
    top_p: float = option(1.0, "Sample among the likeliest tokens that together have this probability.", v.gt(0), v.le(1))
    seed: int = option(0, "Seed of sampling.", v.ge(0))
    use_chat_template: bool | None = option(None, "Wrap plain prompts in the chat template; default: if the tokenizer has one.")
    json: bool = option(False, "Print JSON, one object a prompt.")


@flags()
def compare(model: ModelOptions, comparison: CompareOptions) -> None:
    """Answers of a model and of its adapters to the same prompts, side by side."""
    if (comparison.prompt is None) == (comparison.data is None):
        raise InputError("name either --prompt or --data")
    if not comparison.adapter_path:
        raise InputError("--adapter-path is missing: one or more folders of adapters")
    from mlxlora import comparison as library
    from mlxlora.recipes import base_of, load

    network, tokenizer = load(base_of(model, comparison.adapter_path[0]))
    how = {name: getattr(comparison, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    found = library.compare(network, tokenizer, comparison.adapter_path, _questions(comparison, tokenizer), **how)
    if comparison.json:
        for row in found:
            typer.echo(json.dumps(asdict(row), ensure_ascii=False))
    else:
        _print(found)


def _questions(comparison: CompareOptions, tokenizer: Any) -> list[Any]:
    from mlxlora.comparison import question, read_questions
    from mlxlora.formats import Row

    how: dict[str, Any] = {"use_chat_template": comparison.use_chat_template, "system": comparison.system}
    if comparison.data is not None:
        return read_questions(comparison.data, tokenizer, comparison.num, **how)
    return [question(Row({"prompt": comparison.prompt}, "--prompt", 1), tokenizer, **how)]


def _print(rows: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    expected = any(row.expected for row in rows)
    table = Table(show_lines=True)
    for name in ("prompt", *(["expected"] if expected else []), *rows[0].answers):
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        cells = (row.prompt, *([row.expected] if expected else []), *row.answers.values())
        table.add_row(*(Text(_printable(cell)) for cell in cells))
    Console(highlight=False).print(table)


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
