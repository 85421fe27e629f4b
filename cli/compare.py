"""`mlxlora compare`."""

from collections.abc import Sequence
from typing import Any

from attrs import asdict
from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.options import ModelOptions
from mlxlora.errors import InputError
from mlxlora.utils.output import echo, json_line

from .flags import flags
from .generate import BASE, Answering


@group("Comparison")
class CompareOptions(Answering):
    """What adapters are asked."""

    adapter_path: tuple[str, ...] = option((), "Folder of adapters; repeat the flag for several.")
    prompt: str | None = option(None, "The prompt to answer.")
    data: str | None = option(None, "Rows with prompts to answer; of a folder, the test split if there is one.")
    num: int = option(5, "Number of rows.", v.ge(1))
    json: bool = option(False, "Print JSON, one object per prompt.")


@flags(texts={"model": BASE})
def compare(model: ModelOptions, comparison: CompareOptions) -> None:
    """Compare the answers of a model and of its adapters to the same prompts."""
    if (comparison.prompt is None) == (comparison.data is None):
        raise InputError("use either --prompt or --data")
    if not comparison.adapter_path:
        raise InputError("--adapter-path is missing: name one or more folders of adapters")
    from mlxlora.adapters.prepare import base_of, load
    from mlxlora.rollouts import compare as library

    network, tokenizer = load(base_of(model, comparison.adapter_path[0]))
    how = library.Generation(comparison.max_tokens, comparison.temperature, comparison.top_p, comparison.seed)
    found = library.compare(network, tokenizer, comparison.adapter_path, _questions(comparison, network, tokenizer), how)
    if comparison.json:
        for row in found:
            echo(json_line(asdict(row)))
    else:
        _print(found)


def _questions(comparison: CompareOptions, network: Any, tokenizer: Any) -> list[Any]:
    from mlxlora.data.prompts import question, read_questions
    from mlxlora.data.rows import Row
    from mlxlora.models.modes import vocabulary

    how: dict[str, Any] = {"use_chat_template": comparison.use_chat_template, "system": comparison.system}
    how["vocabulary"] = vocabulary(network)
    if comparison.data is not None:
        return read_questions(comparison.data, tokenizer, comparison.num, **how)
    return [question(Row({"prompt": comparison.prompt}, "--prompt", 1), tokenizer, **how)]


def _print(rows: Sequence[Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    from mlxlora.errors import printable
    from mlxlora.utils.console import safe_console

    expected = any(row.expected for row in rows)
    table = Table(show_lines=True)
    for name in ("prompt", *(["expected"] if expected else []), *rows[0].answers):
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        cells = (row.prompt, *([row.expected] if expected else []), *row.answers.values())
        table.add_row(*(Text(printable(cell)) for cell in cells))
    safe_console().print(table)
