"""A conversation under a Jinja template: its text with origins, its tokens, and those that the model has to write."""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from attrs import define, field, frozen

from ..errors import InputError, plain
from .messages import Message
from .template_habits import Template, asks_again, shows_beside_calls, turn_end
from .traced_template import Rendering
from .turn_parts import Turn, assistant_parts, content_end, dropped, foreign_parts, prompt_tail

_ENCODERS = ("__call__", "encode", "_encode_plus")  # a tokenizer may override them


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The number of leading items that two sequences share.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)


@frozen
class Encoded:
    """Token ids of a text.

    Attributes:
        ids: [L] token ids.
        offsets: [L] (start, stop) of each token's characters; white space between two tokens is the second one's.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]

    def within(self, start: int, stop: int) -> range:
        """The tokens that have a character of text[start:stop]."""
        first = bisect_right(self.offsets, start, key=lambda offset: offset[1])
        last = bisect_left(self.offsets, stop, lo=first, key=lambda offset: offset[0])
        reached = self.offsets[last - 1][1] if last else 0
        return range(first, last + (last < len(self.ids) and reached < stop))


def encoded(inner: Any, text: str, edges: Collection[int] = ()) -> Encoded:
    """Token ids of a rendered text, which has its special tokens already.

    Args:
        inner: a transformers tokenizer.
        text: the text.
        edges: places in it; a tokenizer without offsets tells only between which of them a token is.
    """
    if not getattr(inner, "is_fast", False):
        return _without_offsets(inner, text, sorted({0, *edges, len(text)}))
    encoding = _encoding(inner, text) or inner(text, add_special_tokens=False).encodings[0]
    return Encoded(encoding.ids, encoding.offsets)


def token_ids(inner: Any, text: str) -> list[int]:
    """[L] token ids of a rendered text, as `inner.encode(text, add_special_tokens=False)` has them, at two thirds of its cost."""
    encoding = _encoding(inner, text)
    return list(inner.encode(text, add_special_tokens=False)) if encoding is None else encoding.ids


def _encoding(inner: Any, text: str) -> Any | None:
    """What the Rust tokenizer makes of a text; None if transformers would change its settings, or has code of its own for this."""
    from transformers import PreTrainedTokenizerFast as Fast

    of = type(inner)
    if not isinstance(inner, Fast) or any(getattr(of, name, None) is not getattr(Fast, name, None) for name in _ENCODERS):
        return None
    backend = inner.backend_tokenizer
    plain = backend.truncation is None and backend.padding is None
    same = plain and backend.encode_special_tokens == inner.split_special_tokens
    return backend.encode(text, add_special_tokens=False) if same else None


def _without_offsets(inner: Any, text: str, edges: list[int]) -> Encoded:
    ids = list(inner.encode(text, add_special_tokens=False))
    places = [common_prefix(inner.encode(text[:edge], add_special_tokens=False), ids) for edge in edges[:-1]]
    places = list(accumulate([*places, len(ids)], max))
    parts = zip(pairwise(places), pairwise(edges), strict=True)
    return Encoded(ids, [edge for (first, last), edge in parts for _ in range(first, last)])


@define(slots=False)
class Conversation:
    """A conversation as a template accepts it.

    Attributes:
        template: the tokenizer's.
        messages: the conversation.
        tools: definitions that the template shows to the model.
        location: "file:line" for errors.
    """

    template: Template
    messages: list[Message]
    tools: list[Message] | None
    location: str
    _tails: dict[str | None, str | None] = field(factory=dict, init=False)

    @cached_property
    def whole(self) -> Rendering:
        """All of it, rendered.

        Raises:
            InputError: the template drops a message.
        """
        return self._complete(self.template.render(self.messages, self.tools))

    @property
    def has_origins(self) -> bool:
        """Whether it is known where the words of the assistant's turns are, which a template that escapes them hides."""
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant" and message.get("content")]
        hidden = self.whole.lost and all(content_end(self.whole, i) is None for i in answers)
        return bool(self.whole.spans) and not (answers and hidden)

    def prompt(self, continue_final: bool) -> str:
        """What the model is to continue: the header of an assistant's turn, or the last message.

        Raises:
            InputError: the template drops a message.
        """
        end = content_end(self.whole, len(self.messages) - 1, "content") if continue_final else None
        if end is not None:
            return self.whole.text[:end]
        return self._text(prompt=True)

    def ids(self, stops: Collection[int]) -> list[int]:
        """[L] token ids; after an answer, with the token at which generation stops.

        Args:
            stops: tokens at which generation stops.

        Raises:
            InputError: the template drops a message.
        """
        ids = token_ids(self.template.inner, self._text())
        end = _Ends(self.template, frozenset(stops), ids).missing(self.messages[-1])
        return ids if end is None else [*ids, end]

    def _text(self, prompt: bool = False) -> str:
        text = self.template.text(self.messages, self.tools, prompt)
        if self.template.certainly_shows(self.messages, text):
            return text
        return self._complete(self.template.render(self.messages, self.tools, prompt)).text

    def tokens(self, stops: Collection[int], trained: Collection[int]) -> tuple[list[int], list[bool]]:
        """[L] token ids, and [L] which of them the assistant turns `trained` wrote, with the token that ends each.

        Args:
            stops: tokens at which generation stops.
            trained: indices of messages.
        """
        turns = assistant_parts(self.whole, self._roles, self._tails_of)
        foreign = foreign_parts(self.whole, self._roles)
        edges = [edge for part in [*foreign, *(part for turn in turns for part in turn.parts)] for edge in part]
        text = encoded(self.template.inner, self.whole.text, edges)
        mask = [False] * len(text.ids)
        ends = _Ends(self.template, frozenset(stops), text.ids)
        others = {t for part in foreign for t in text.within(*part)}
        for turn in turns:
            if turn.message in trained:
                for tokens in ends.of(turn, text):
                    mask[tokens.start : tokens.stop] = [t not in others for t in tokens]
        end = ends.missing(self.messages[-1])
        return (text.ids, mask) if end is None else ([*text.ids, end], [*mask, len(self.messages) - 1 in trained])

    @property
    def _roles(self) -> list[str]:
        return [message["role"] for message in self.messages]

    def _complete(self, rendering: Rendering) -> Rendering:
        """The rendering, if it shows every message."""
        lost = dropped(rendering, self.messages)
        if lost is None:
            return rendering
        message, what = self.messages[lost[0]], lost[1]
        told = f"{self.location}: the model's chat template drops"
        name = f"message {lost[0] + 1} (role '{plain(message['role'])}')"
        if what == "tool_calls":
            raise InputError(f"{told} the calls of {name}, which has content too; make them two messages")
        if not message.get("tool_calls"):
            raise InputError(f"{told} {name}; rename its role to one that the template has, or remove it")
        if shows_beside_calls(self.template):  # as reasoning, which the template drops where an answer follows
            return rendering
        raise InputError(f"{told} the content of {name} beside its calls; remove one of them, or make them two messages")

    def _tails_of(self, message: int) -> list[str]:
        """The tails of prompts that a turn answers: after a message of that role, and after a question."""
        before = self._roles[message - 1] if message else None
        return [tail for role in dict.fromkeys((before, "user")) if (tail := self._tail(role)) is not None]

    def _tail(self, role: str | None) -> str | None:
        if role not in self._tails:
            self._tails[role] = self._find_tail(role)
        return self._tails[role]

    def _find_tail(self, role: str | None) -> str | None:
        """The tail of the prompt of the last turn after a message of a role."""
        roles = self._roles
        turns = [i for i in range(1, len(roles)) if roles[i] == "assistant" and roles[i - 1] == role]
        prompts = [self.messages[:turn] for turn in turns[-1:]]
        if role == "user":  # the beginning may be rejected: then the prompt of a question after all of it
            prompts += [asks_again(self.template, self.messages), asks_again(self.template, [])]
        for messages in prompts:
            prompt = self.template.attempt(messages, self.tools, prompt=True)
            tail = None if prompt is None else prompt_tail(prompt, len(messages) - 1)
            if tail is not None:
                return tail
        return None


class _Ends:
    """Finds the tokens at which generation stops."""

    def __init__(self, template: Template, stops: frozenset[int], ids: list[int]) -> None:
        found = [turn_end(template, calls) for calls in (False, True)]
        self.closes = found[0].own is not None
        self.template, self.ids = template, ids
        self.stops = stops | {token for end in found for token in (end.own, end.following) if token is not None}
        self.named = template.inner.added_tokens_decoder.keys()

    def of(self, turn: Turn, text: Encoded) -> list[range]:
        """The tokens of a turn, each part with the token at which it stops."""
        parts = [tokens for part in turn.parts if (tokens := text.within(*part))]
        return [self._ended(tokens, tokens is parts[-1]) for tokens in parts]

    def _ended(self, part: range, last: bool) -> range:
        before = next((t for t in reversed(part) if not self._blank(t)), part.start)
        after = next((t for t in range(part.stop, len(self.ids)) if not self._blank(t)), len(self.ids))
        if self.ids[before] in self.stops or after == len(self.ids):
            return part
        header = last and not self._closed(before) and self.ids[after] in self.named
        return range(part.start, after + 1) if header or self.ids[after] in self.stops else part

    def _closed(self, t: int) -> bool:
        """Whether a turn with last token t has its end; where turns have none, a tag at the end is not one."""
        return self.ids[t] in self.stops or (self.closes and self.ids[t] in self.named)

    def _blank(self, t: int) -> bool:
        return self.ids[t] not in self.named and not self.template.inner.decode([self.ids[t]]).strip()

    def missing(self, last: Message) -> int | None:
        """The token at which generation stops after the last message, where the template writes it with the next only."""
        if last["role"] != "assistant" or not self.ids:
            return None
        t = next((t for t in reversed(range(len(self.ids))) if not self._blank(t)), 0)
        return None if self._closed(t) else turn_end(self.template, bool(last.get("tool_calls"))).following
