"""`mlxlora preview`."""

from typing import Literal

from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.method_options import fields_of
from mlxlora.config.options import BaseOptions, DataOptions
from mlxlora.methods import METHODS
from mlxlora.utils.output import echo, json_line

from .flags import flags

_Name = Literal[tuple(METHODS)]  # type: ignore[valid-type]
_TEXTS = {
    "model": "Model folder or hub name. Without --model and --data: rows of the bundled starter.",
    **dict.fromkeys(("shuffle", "token_cache", "packing")),
}


@group("Preview")
class PreviewOptions(DataOptions):
    """Whose rows are shown, and how they are read."""

    method: _Name = option("sft", "Method whose rows to show; default: that of the --config file.")  # type: ignore[valid-type]
    num: int = option(3, "Rows to show.", v.ge(1))
    json: bool = option(False, "Print JSON, one object a row.")
    prompt_truncation: Literal["right", "left"] = option("right", "Pairs that are too long: what to cut, right or left.")
    nll_on_prompt: bool = option(False, "orpo: the NLL covers prompts too.")
    system: str | None = option(None, "grpo, online-dpo, gkd: system message for rows that have none.")


@flags(starter="sft", others=True, texts=_TEXTS)
def preview(model: BaseOptions, options: PreviewOptions) -> None:
    """Show the first rows as the model will see them, which tokens are trained, and which rows are cut or dropped."""
    from mlxlora.models.loading import load_tokenizer
    from mlxlora.reporting.preview import row_objects, show_preview

    method = METHODS[options.method]
    chosen = {name: getattr(options, name) for name in fields_of(*method.kinds.kinds()) if hasattr(options, name)}
    found = method.preview(load_tokenizer(model), **chosen)
    if not options.json:
        show_preview(found, options.num)
        return
    for row in row_objects(found, options.num):
        echo(json_line(row))
