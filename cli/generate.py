"""`mlxlora generate`."""

import sys
from collections.abc import Iterator
from typing import Any

from attrs import evolve
from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.options import ModelOptions
from mlxlora.errors import InputError
from mlxlora.utils.output import echo

from .flags import flags

BASE = "Model folder or hub name; default: the model that the adapters were trained on, quantized as it was."


@group("Generation")
class Answering:
    """How answers are generated."""

    system: str | None = option(None, "System message, for a model with a chat template.")
    max_tokens: int = option(256, "Maximum number of tokens to generate.", v.ge(1))
    temperature: float = option(0.0, "Temperature of sampling; 0 = always the likeliest token.", v.ge(0))
    top_p: float = option(1.0, "Sample among the likeliest tokens that together have this probability.", v.gt(0), v.le(1))
    seed: int = option(0, "Seed of sampling.", v.ge(0))
    use_chat_template: bool | None = option(None, "Wrap plain prompts in the chat template; default: if the tokenizer has one.")


@group("Generation")
class Generation(Answering):
    """What to generate."""

    adapter_path: str | None = option(None, "Folder of adapters; default: the model as it is.")
    prompt: str | None = option(None, "Text to continue or answer; - reads it from standard input.")
    top_k: int = option(0, "Sample among this many likeliest tokens; 0 = all.", v.ge(0))
    min_p: float = option(0.0, "Sample among tokens at least this likely, relative to the likeliest.", v.ge(0), v.le(1))
    draft_model: str | None = option(None, "A small model with the same vocabulary that proposes tokens: the same answer, sooner.")


@flags(texts={"model": f"{BASE[:-1]}; without adapters the bundled starter."})
def generate(model: ModelOptions, generation: Generation) -> None:
    """Generate text from a prompt, with or without adapters."""
    if generation.prompt is None:
        raise InputError("--prompt is missing; give the text, or - to read it from standard input")
    for text in _stream(_model(model, generation), generation):
        echo(text, end="")
    echo()


def _model(model: ModelOptions, generation: Generation) -> ModelOptions:
    """--model, else the model that the adapters were trained on, else the starter."""
    if model.model is None and generation.adapter_path is None:
        from mlxlora import starter

        return evolve(model, model=str(starter.model_path()))
    from mlxlora.adapters.prepare import base_of

    return base_of(model, generation.adapter_path or "")


def _stream(model: ModelOptions, generation: Generation) -> Iterator[str]:
    import mlx.core as mx
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    from mlxlora.adapters.prepare import load
    from mlxlora.data.prompts import question
    from mlxlora.data.rows import Row
    from mlxlora.models.modes import vocabulary

    network, tokenizer = load(model, generation.adapter_path)
    mx.random.seed(generation.seed)
    sampler = make_sampler(generation.temperature, generation.top_p, generation.min_p, top_k=generation.top_k)
    text = sys.stdin.read() if generation.prompt == "-" else generation.prompt
    row = Row({"prompt": text}, "--prompt", 1)
    how: dict[str, Any] = {
        "use_chat_template": generation.use_chat_template,
        "system": generation.system,
        "vocabulary": vocabulary(network),
    }
    prompt = question(row, tokenizer, **how).tokens
    more: dict[str, Any] = {"draft_model": _draft(generation.draft_model, model, tokenizer)} if generation.draft_model else {}
    for response in stream_generate(network, tokenizer, prompt, generation.max_tokens, sampler=sampler, **more):
        yield response.text


def _draft(name: str, model: ModelOptions, tokenizer: Any) -> Any:
    from mlxlora.training.other_models import loader

    return loader(model, name, "--draft-model")(tokenizer)
