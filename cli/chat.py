"""`mlxlora chat`."""

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.options import ModelOptions
from mlxlora.errors import InputError
from mlxlora.utils.output import echo

from .flags import flags
from .generate import BASE

_HELP = "q: quit, r: forget the conversation, h: help"


@group("Chat")
class ChatOptions:
    """Who answers, and how."""

    adapter_path: str = option("adapters", "Folder of adapters.")
    only_adapters: bool = option(False, "Answer with the adapters only, not also without them.")
    system: str | None = option(None, "System message.")
    max_tokens: int = option(256, "Longest answer, tokens.", v.ge(1))
    temperature: float = option(0.0, "Temperature of sampling; 0 = always the likeliest token.", v.ge(0))
    top_p: float = option(1.0, "Sample among the likeliest tokens that together have this probability.", v.gt(0), v.le(1))
    seed: int = option(0, "Seed of sampling.", v.ge(0))


@flags(texts={"model": BASE})
def chat(model: ModelOptions, chatting: ChatOptions) -> None:
    """Chat with a model without and with its adapters: both answer each message, each in its own conversation."""
    from mlxlora.adapters.prepare import attached, base_of, load

    network, tokenizer = load(base_of(model, chatting.adapter_path))
    if not tokenizer.has_chat_template:
        raise InputError(f"{chatting.adapter_path}: its model has no chat template; `mlxlora generate` continues plain text")
    with attached(network, chatting.adapter_path):  # told before the first message
        pass
    names = ["adapters"] if chatting.only_adapters else ["base", "adapters"]
    talks = {name: _Talk(network, tokenizer, chatting) for name in names}
    echo(_HELP)
    for message in _messages():
        if message == "r":
            talks = {name: _Talk(network, tokenizer, chatting) for name in names}
        elif message == "h":
            echo(_HELP)
        else:
            for name, talk in talks.items():
                echo(f"{name}: ", end="")
                with nullcontext() if name == "base" else attached(network, chatting.adapter_path):
                    for text in talk.answer(message):
                        echo(text, end="")
                echo()


def _messages() -> Iterator[str]:
    """The lines of standard input until q or its end."""
    while True:
        if sys.stdin.isatty():
            echo(">> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "q":
            return
        if line.strip():
            yield line.strip()


class _Talk:
    """A conversation: its keys and values, as `mlx_lm.chat` keeps them."""

    def __init__(self, network: Any, tokenizer: Any, options: ChatOptions) -> None:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        self._network, self._tokenizer, self._options = network, tokenizer, options
        self._cache, self._begun = make_prompt_cache(network), False
        mx.random.seed(options.seed)

    def answer(self, message: str) -> Iterator[str]:
        """The parts of the answer to a message of the user."""
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        options = self._options
        system = [{"role": "system", "content": options.system}] if options.system and not self._begun else []
        self._begun = True
        turns = [*system, {"role": "user", "content": message}]
        prompt = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True)
        sampler = make_sampler(options.temperature, options.top_p)
        how: dict[str, Any] = {"max_tokens": options.max_tokens, "sampler": sampler, "prompt_cache": self._cache}
        for response in stream_generate(self._network, self._tokenizer, prompt, **how):
            yield response.text
