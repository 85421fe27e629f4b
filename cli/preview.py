"""`mlxlora preview`."""

from typing import Literal

import attrs
from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.options import BaseOptions, DataOptions, PairData, PromptData, RowOptions

from .options import flags

METHODS = {**dict.fromkeys(("sft", "distill"), DataOptions), **dict.fromkeys(("dpo", "orpo", "cpo"), PairData), "kto": RowOptions}
METHODS |= dict.fromkeys(("grpo", "online-dpo", "gkd"), PromptData)
_TEXTS = {
    "model": "Model folder or hub name. Without --model and --data rows of the bundled starter are shown.",
    **dict.fromkeys(("shuffle", "token_cache", "packing")),
}


@group("Preview")
class PreviewOptions(DataOptions):
    """Whose rows are shown, and how they are read."""

    method: Literal["sft", "dpo", "orpo", "cpo", "kto", "grpo", "online-dpo", "distill", "gkd"] = option(
        "sft", "Whose rows; the file of a run says it."
    )
    num: int = option(3, "Rows to show.", v.ge(1))
    prompt_truncation: Literal["right", "left"] = option("right", "Of over-long pairs, what is cut: right or left.")
    nll_on_prompt: bool = option(False, "orpo: the NLL covers prompts too.")
    system: str | None = option(None, "grpo, online-dpo, gkd: system message of rows that bring none.")


@flags(starter="sft", others=True, texts=_TEXTS)
def preview(model: BaseOptions, options: PreviewOptions) -> None:
    """Show the first rows as a model will see them, which tokens are scored, and what is cut or dropped."""
    from mlxlora.methods import look
    from mlxlora.models.loading import load_tokenizer
    from mlxlora.reporting.preview import show_preview

    kind = METHODS[options.method]
    data = kind(**{field.name: getattr(options, field.name) for field in attrs.fields(kind) if hasattr(options, field.name)})
    show_preview(look(options.method, load_tokenizer(model), data, nll_on_prompt=options.nll_on_prompt), options.num)
