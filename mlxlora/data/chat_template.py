"""Conversations: message lists in one shape, and the tokens that a chat template makes of them."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import orjson

from ..errors import InputError, listed
from ..utils.time_limit import TooLong, at_most
from .messages import _SECONDS, Message

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of leading items that two sequences share.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


def render(
    tokenizer: Any, messages: list[Message], location: str, *, tools: list[Message] | None = None, generation_prompt: bool = False
) -> list[int]:
    """Token ids of a conversation under the tokenizer's chat template, which writes BOS itself.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        messages: in the form of `as_messages`.
        where: "file:line" for errors.
        tools: definitions that the template shows to the model.
        generation_prompt: end with the header of an assistant turn.

    Raises:
        InputError: there is no template, or it rejects the conversation.
    """
    with rendering(tokenizer, location):
        options: dict[str, Any] = {"add_generation_prompt": generation_prompt} | ({"tools": tools} if tools else {})
        if tokenizer._chat_template is not None:  # a template in Python, which comes with mlx-lm
            return list(tokenizer.apply_chat_template(messages, **options))
        # not the wrapper's: it sets enable_thinking, and the template's own default is what other trainers use
        shown = _shown(tokenizer, messages, tools)
        return list(tokenizer._tokenizer.apply_chat_template(shown, tokenize=True, return_dict=False, **options))


@contextmanager
def rendering(tokenizer: Any, location: str) -> Iterator[None]:
    """Guards whatever renders the tokenizer's chat template: what goes wrong is one line, and nothing takes forever.

    Raises:
        InputError: there is no template, it rejects the conversation, or its time is up.
    """
    if not tokenizer.has_chat_template:
        raise InputError(
            f"{location}: messages need a chat template and the model's tokenizer has none; "
            "use an instruction-tuned model, add a chat_template.jinja to its folder, or train on text or prompt/completion rows"
        )
    check_template(tokenizer, location)
    _silence(tokenizer)
    try:
        with at_most(_SECONDS):
            yield
    except TooLong:
        told = f"has not ended after {_SECONDS:g} s, so it is not going to"
        raise InputError(f"{location}: the model's chat template {told}; use another model or template") from None
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{location}: the model's chat template rejects this conversation: {reason}") from error


def _silence(tokenizer: Any) -> None:
    """transformers would warn, once, of a row longer than the model's context: rows are cut later, and that is told."""
    getattr(tokenizer._tokenizer, "deprecation_warnings", {})["sequence-length-is-longer-than-the-specified-maximum"] = True


def check_template(tokenizer: Any, location: str) -> None:
    """Refuses a template with a power, such as 10 ** 10 ** 9: one operation that no limit of time can interrupt.

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
    except TemplateError:  # whoever renders it says so
        return False


def _template_text(tokenizer: Any, tools: list[Message] | None) -> str:
    if tokenizer._chat_template is not None or tokenizer.chat_template is None:
        return ""
    return tokenizer._tokenizer.get_chat_template(None, tools)


def _shown(tokenizer: Any, messages: list[Message], tools: list[Message] | None) -> list[Message]:
    """Tool calls as JSON in the content where the template would drop them without a word."""
    template = _template_text(tokenizer, tools)
    return messages if not template or "tool_calls" in template else [_call_as_text(message) for message in messages]


def _call_as_text(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [orjson.dumps(call.get("function", call)).decode() for call in message["tool_calls"]]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": "\n".join(filter(None, [message["content"], *calls]))}


def assistant_turns(
    tokenizer: Any, messages: list[Message], location: str, *, tools: list[Message] | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them every assistant turn wrote, the token that ends it included.

    Read from the template's `{% generation %}` marks, and without them from where the conversation up to each turn, and
    through it, agree with the whole.

    Raises:
        InputError: no message is the assistant's, or the template rewrites earlier turns beyond recognition.
    """
    if not any(message["role"] == "assistant" for message in messages):
        roles = listed(message["role"] for message in messages)
        raise InputError(f"{location}: --mask-prompt scores assistant turns and this conversation has none (roles: {roles})")
    return _marked(tokenizer, messages, location, tools) or _located(tokenizer, messages, location, tools)


def _marked(
    tokenizer: Any, messages: list[Message], location: str, tools: list[Message] | None
) -> tuple[list[int], list[bool]] | None:
    with rendering(tokenizer, location):
        if not _MARKS.search(_template_text(tokenizer, tools)):
            return None
        out = tokenizer._tokenizer.apply_chat_template(
            _shown(tokenizer, messages, tools), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    ids, mask = list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]
    for t in range(1, len(ids)):
        # a mark may end before the last bytes of a character, and before the token without which a model never stops
        mask[t] = mask[t] or (mask[t - 1] and _belongs(out, t, ids, tokenizer.eos_token_ids))
    return (ids, mask) if any(mask) else None


def _belongs(out: Any, t: int, ids: list[int], ends: set[int]) -> bool:
    """Whether an unmarked token completes the marked one before it."""
    same_character = out.token_to_chars(t) == out.token_to_chars(t - 1)
    return same_character or (ids[t] in ends and ids[t - 1] not in ends)


def _located(tokenizer: Any, messages: list[Message], location: str, tools: list[Message] | None) -> tuple[list[int], list[bool]]:
    def tokens(part: list[Message], generation_prompt: bool = False) -> list[int]:
        return render(tokenizer, part, location, tools=tools, generation_prompt=generation_prompt)

    whole = tokens(messages)
    loss_mask = [False] * len(whole)
    previous: tuple[list[int], int] = ([], 0)
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant"):
        through, start = _turn_start(tokens, messages, turn, whole, previous)
        end = None if start is None else _turn_end(tokenizer, whole, through, start)
        if start is None or end is None:
            raise InputError(
                f"{location}: cannot tell which tokens message {turn + 1} wrote, because the chat template rewrites earlier turns; "
                "use a template with {% generation %} marks, split the conversation into rows of one answer, or drop --mask-prompt"
            )
        loss_mask[start:end] = [True] * (end - start)
        previous = (through, end)
    return whole, loss_mask


def _turn_start(
    tokens: Callable[..., list[int]], messages: list[Message], turn: int, whole: list[int], previous: tuple[list[int], int]
) -> tuple[list[int], int | None]:
    """The conversation through a turn, and where in the whole one the turn starts; None if that cannot be told."""
    through = tokens(messages[: turn + 1])
    if turn == 0:
        return through, _opening(tokens, through)
    head, prompt = tokens(messages[:turn]), tokens(messages[:turn], True)
    trailer = head[common_prefix(head, prompt) :]  # Phi ends every conversation that awaits no answer with EOS
    if trailer and turn + 1 < len(messages) and through[-len(trailer) :] == trailer:
        through = through[: -len(trailer)]
    known = len(head) - len(trailer)
    # from the beginning, or from the turn before, whose reasoning the whole conversation may have lost
    anchors = [(0, 0)] + ([(len(previous[0]), previous[1])] if prompt[: len(previous[0])] == previous[0] else [])
    for before, at in anchors:
        same = common_prefix(prompt[before:], whole[at:])
        if same >= known - before - 1:  # the last token may have merged with the answer
            return through, at + same
    return through, None


def _opening(tokens: Callable[..., list[int]], through: list[int]) -> int | None:
    """Where the answer starts in a conversation that the assistant opens: behind the header of its turn."""
    user: list[Message] = [{"role": "user", "content": "-"}]
    plain, prompt = tokens(user), tokens(user, True)
    header = prompt[common_prefix(plain, prompt) :]
    places = (t for t in range(len(through)) if header and through[t : t + len(header)] == header)
    first = next(places, None)
    return None if first is None else first + len(header)


def _turn_end(tokenizer: Any, whole: list[int], through: list[int], start: int) -> int | None:
    """Where the turn that starts at `start` ends in the whole conversation; None if that cannot be told."""
    same = common_prefix(through, whole)
    if same > start and not tokenizer.decode(through[same:]).strip():
        return same
    # a template that strips reasoning from earlier turns leaves the turn's tail, exactly where the turn starts
    for length in range(min(len(through), len(whole) - start), 0, -1):
        if through[-length:] == whole[start : start + length] and tokenizer.decode(through[-length:]).strip():
            return start + length
    return None
