"""Conversations to token ids under the tokenizer's chat template, and which of the tokens the model has to write."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import orjson

from ..errors import InputError, listed, reason
from ..utils.time_limit import TooLong, at_most
from .conversation import Conversation, token_ids
from .conversation import common_prefix as common_prefix
from .messages import Message
from .python_template import located_turns
from .template_habits import Template, adapted, habits, role_for, template_of, with_arguments
from .template_habits import template_args as variables_of

RENDER_SECONDS = 60.0
"""Most time for one conversation; templates take milliseconds."""


def render(
    tokenizer: Any,
    messages: list[Message],
    location: str,
    *,
    tools: list[Message] | None = None,
    generation_prompt: bool = False,
    continue_final: bool = False,
    template_args: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template, which writes BOS itself.

    A conversation that ends with an assistant's turn ends with the token at which generation stops.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        messages: in the form of `as_messages`.
        location: "file:line" for errors.
        tools: definitions that the template shows to the model.
        generation_prompt: end with the header of an assistant turn.
        continue_final: end inside the last message, for the model to continue it.
        template_args: variables of the template, such as `enable_thinking`.

    Raises:
        InputError: there is no template, it rejects the conversation, or it drops a message.
    """
    with rendering(tokenizer, location):
        template = template_of(tokenizer, tools, template_args)
        if template is None:
            how = {**({"tools": tools} if tools else {}), **variables_of(tokenizer), **(template_args or {})}
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=generation_prompt, **how))
        chat = Conversation(template, _accepted(template, messages, location), tools, location)
        if generation_prompt or continue_final:
            return token_ids(template.inner, chat.prompt(continue_final))
        return chat.ids(tokenizer.eos_token_ids)


def assistant_turns(
    tokenizer: Any,
    messages: list[Message],
    location: str,
    *,
    tools: list[Message] | None = None,
    trained: Collection[int] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them assistant turns wrote, the token that ends each included.

    Where the template has `{% generation %}` marks, they choose among what the turns wrote.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        messages: in the form of `as_messages`.
        location: "file:line" for errors.
        tools: definitions that the template shows to the model.
        trained: indices of the messages whose tokens are chosen; None: every assistant turn.
        template_args: variables of the template, such as `enable_thinking`.

    Returns:
        [L] token ids and [L] whether each is chosen.

    Raises:
        InputError: no message is the assistant's, there is no template, or it rejects the conversation or drops a message.
    """
    if not any(message["role"] == "assistant" for message in messages):
        roles = listed(message["role"] for message in messages)
        raise InputError(f"{location}: --mask-prompt trains assistant turns and this conversation has none (roles: {roles})")
    chosen = range(len(messages)) if trained is None else trained
    with rendering(tokenizer, location):
        template = template_of(tokenizer, tools, template_args)
        if template is not None:
            accepted = _accepted(template, messages, location)
            kept = [i for i, m in enumerate(messages) if len(accepted) == len(messages) or m["role"] != "system"]
            chat = Conversation(template, accepted, tools, location)
            if chat.has_origins:
                return chat.tokens(tokenizer.eos_token_ids, {new for new, old in enumerate(kept) if old in chosen})

    def tokens(part: list[Message], prompt: bool) -> list[int]:
        return render(tokenizer, part, location, tools=tools, generation_prompt=prompt, template_args=template_args)

    return located_turns(tokens, messages, chosen, location)


@contextmanager
def rendering(tokenizer: Any, location: str) -> Iterator[None]:
    """Guards the rendering of the tokenizer's chat template: any failure is one line, and nothing takes forever.

    Raises:
        InputError: there is no template, it rejects the conversation, or it takes longer than `RENDER_SECONDS`.
    """
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{location}: messages need a chat template and the model's tokenizer has none; "
            "use an instruction-tuned model, add a chat_template.jinja to its folder, or train on text or prompt/completion rows"
        )
    check_template(tokenizer, location)
    _silence(tokenizer)
    try:
        with at_most(RENDER_SECONDS):
            yield
    except InputError:
        raise
    except TooLong:
        told = f"timed out after {RENDER_SECONDS:g} s"
        raise InputError(f"{location}: the model's chat template {told}; use another model or template") from None
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        told = reason(error, 1000)
        raise InputError(f"{location}: the model's chat template rejects this conversation: {told}") from error


def _silence(tokenizer: Any) -> None:
    """Keeps transformers from a warning about rows longer than the model's context; long rows are cut later, with a message."""
    getattr(tokenizer._tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True


def check_template(tokenizer: Any, location: str) -> None:
    """Refuses a template with a power, such as 10 ** 10 ** 9: one operation that no time limit can interrupt.

    Raises:
        InputError: it has one.
    """
    text = tokenizer.chat_template
    for template in text.values() if isinstance(text, dict) else [text]:
        if isinstance(template, str) and _has_power(template):
            raise InputError(
                f"{location}: the model's chat template computes a power (**), which no template needs; use another one"
            )


@lru_cache
def _has_power(template: str) -> bool:
    from jinja2 import Environment, TemplateError

    if "**" not in template:
        return False
    try:
        return any(kind == "operator" and text == "**" for _, kind, text in Environment().lex(template))
    except TemplateError:  # rendering it reports the error
        return False


def _accepted(template: Template, messages: list[Message], location: str) -> list[Message]:
    """The messages in the form and under the roles that the template accepts."""
    way = habits(template)
    if way.refuses_system and any(message["role"] == "system" for message in messages):
        if any(message["role"] == "system" and message["content"] for message in messages):
            _refuse_system(template, adapted(messages, way), location)
        messages = [message for message in messages if message["role"] != "system"]
    if way.hides_calls:
        messages = [_call_as_text(message) for message in messages]
    roles = {role: role_for(template, role) for role in {message["role"] for message in messages}}
    return adapted([{**message, "role": roles[message["role"]]} for message in messages], way)


def _refuse_system(template: Template, messages: list[Message], location: str) -> None:
    try:
        template.render(messages)
    except TooLong:
        raise
    except Exception as error:
        remedy = "put the text of the system message at the beginning of the first user message"
        raise InputError(f"{location}: the model's chat template rejects this conversation: {reason(error)}; {remedy}") from error


def _call_as_text(message: Message) -> Message:
    """Calls as JSON in the content, for a template that would drop them silently."""
    if "tool_calls" not in message:
        return message
    parsed = [with_arguments(call, as_text=False) for call in message["tool_calls"]]
    calls = [orjson.dumps(call.get("function", call)).decode() for call in parsed]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, [message["content"], *calls]))}
