"""Finds, in a rendered conversation, the characters that the model has to write in each assistant turn.

A turn starts where the generation prompt ends. What follows is the turn's as far as the template wrote it for this message:
reasoning, calls, content and the text around them, without anything that belongs to other messages.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from .traced_template import Rendering, Span
from .traced_text import SEVERAL

_WORD_END = re.compile(r".*[\s>\]})｜|]", re.DOTALL)


class Turn(NamedTuple):
    """An assistant's turn.

    Attributes:
        message: its index.
        parts: character ranges (start, stop) that the model has to write, in order.
    """

    message: int
    parts: list[tuple[int, int]]


def owner(span: Span, assistants: Collection[int]) -> int | None:
    """The message that characters belong to; None: none.

    Words of an assistant that stand in another message, such as the function's name in a tool's answer, are that message's.
    """
    message, _, turn, _ = span.origin
    if message is None:
        return turn
    return turn if message in assistants and turn is not None else message


def _is_content(span: Span) -> bool:
    return span.origin.field not in (None, "role")


def content_end(rendering: Rendering, message: int, field: str | None = None) -> int | None:
    """Where the last character of a message's field ends, or of any but its role; None if the template shows none."""
    spans = (span for span in rendering.spans if span.origin.message == message and _is_content(span))
    return max((span.stop for span in spans if field in (None, span.origin.field)), default=None)


def prompt_tail(prompt: Rendering, last: int) -> str | None:
    """What a prompt has after the content of its last message: the end of that turn and the generation prompt.

    None if the template shows no content of message `last`.
    """
    end = content_end(prompt, last)
    return None if end is None else prompt.text[end:]


def assistant_parts(whole: Rendering, roles: Sequence[str], tails_of: Callable[[int], list[str]]) -> list[Turn]:
    """The turns of a conversation.

    Args:
        whole: the rendered conversation.
        roles: of its messages.
        tails_of: each `prompt_tail` that a prompt may have which message i answers, the likeliest first.
    """
    assistants = {i for i, role in enumerate(roles) if role == "assistant"}
    owners = [owner(span, assistants) for span in whole.spans]
    marks = any(span.origin.marked for span in whole.spans)
    turns = []
    for message in sorted(assistants):
        own = [span for span, who in zip(whole.spans, owners, strict=True) if who == message]
        if message == len(roles) - 1:
            own += _after(whole, owners)
        if own:
            start, stop = _start(whole, own, message, tails_of(message)), _stop(whole, own)
            chosen = [span for span in own if span.origin.marked] if marks else own
            parts = [(max(start, span.start), min(stop, span.stop)) for span in chosen if start < span.stop and span.start < stop]
            turns.append(Turn(message, _merged(parts)))
    return turns


def _after(whole: Rendering, owners: Sequence[int | None]) -> list[Span]:
    """Text after the last message, such as the EOS with which Phi ends a conversation."""
    count = next((i for i, who in enumerate(reversed(owners)) if who is not None), len(owners))
    spans = whole.spans[len(owners) - count :]
    return spans if any(whole.text[span.start : span.stop].strip() for span in spans) else []


def _merged(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for start, stop in parts:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return out


def _stop(whole: Rendering, own: Sequence[Span]) -> int:
    """Where a turn stops, without spaces that separate it from the next."""
    last = own[-1]
    return last.stop if _is_content(last) else last.start + len(whole.text[last.start : last.stop].rstrip(" "))


def _start(whole: Rendering, own: Sequence[Span], message: int, tails: Sequence[str]) -> int:
    """Where the model starts to write: after the longest beginning of the turn that the generation prompt has too."""
    first = own[0].start
    content = min((span.start for span in own if _is_content(span)), default=own[-1].stop)
    if not tails:
        return content
    start = _after_prompt(whole, message, first, content, tails[0])
    for tail in tails[1:]:  # the turn may have the header of an answer to a question, which its own prompt has not
        start = _header_end(whole.text, max(start, first), content, tail) if start < content else start
    return start


def _after_prompt(whole: Rendering, message: int, first: int, content: int, tail: str) -> int:
    """Where a prompt with such a tail ends in the conversation."""
    anchor = content_end(whole, message - 1) if message else None
    if anchor is None or anchor > content:
        return _header_end(whole.text, first, content, tail, anywhere=True)
    text = whole.text[anchor : anchor + len(tail)]
    if text == tail:
        return anchor + len(text)
    end = anchor + _whole_words(_common(text, tail))
    return min(end, content) if end > first else _header_end(whole.text, first, content, tail, anywhere=True)


def _header_end(text: str, first: int, content: int, tail: str, anywhere: bool = False) -> int:
    """Where a header ends that a tail has too and that text[first:content] begins with, or has anywhere."""
    zone = text[first:content]
    match = SequenceMatcher(None, zone, tail, autojunk=False).find_longest_match()
    shared = zone[match.a : match.a + match.size]
    if match.b + match.size < len(tail):
        shared = shared[: _whole_words(shared)]
    return first + match.a + len(shared) if shared.strip() and (anywhere or match.a == 0) else first


def _common(a: str, b: str) -> str:
    length = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:length]


def _whole_words(text: str) -> int:
    """The length of a text without the word or tag that it stops in."""
    match = _WORD_END.match(text)
    return match.end() if match else 0


def foreign_parts(whole: Rendering, roles: Sequence[str]) -> list[tuple[int, int]]:
    """Character ranges that hold words of other messages than an assistant's; no token with one of them is trained.

    The name of a role is no such word: it can be part of the header at which generation stops, as in GLM's <|user|>.
    """
    return [
        (span.start, span.stop)
        for span in whole.spans
        if (message := span.origin.message) is not None
        and span.origin.field != "role"
        and (message == SEVERAL or roles[message] != "assistant")
    ]


def dropped(whole: Rendering, messages: Sequence[Mapping[str, Any]]) -> tuple[int, str] | None:
    """The first message and field that the template shows nothing of; None if it shows all.

    Reasoning may be dropped: templates do not show it in earlier turns.
    """
    seen = {(span.origin.message, span.origin.field) for span in whole.spans}
    if whole.lost or any(message == SEVERAL for message, _ in seen):
        return None
    for i, message in enumerate(messages):
        for field in ("content", "tool_calls"):
            if (i, field) not in seen and _has_words(message.get(field)):
                return i, field
    return None


def _has_words(value: Any) -> bool:
    """Whether a content has words besides reasoning; whether there are calls."""
    if isinstance(value, str):
        return bool(value.rpartition("</think>")[2].strip())
    if isinstance(value, list):
        return any(_has_words(part.get("text", part.get("function"))) if isinstance(part, dict) else bool(part) for part in value)
    return bool(value)
