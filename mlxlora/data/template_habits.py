"""What a chat template accepts and how it ends a turn, found out by rendering small conversations."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from attrs import evolve, frozen

from ..utils.time_limit import TooLong
from .messages import Message, json_object
from .traced_template import Rendering, render_traced
from .turn_parts import assistant_parts, content_end, dropped, prompt_tail

_SEEN = '{{ {"messages": messages, "tools": tools, "documents": documents} | tojson }}'
_USER: Message = {"role": "user", "content": "apples"}
_ANSWER: Message = {"role": "assistant", "content": "pears"}
_ARGUMENTS = {"zone": "UTC"}
_STAND_IN = {"developer": "system", "function": "tool", "ipython": "tool"}


@frozen
class Template:
    """A tokenizer's chat template, as one kind of conversation uses it.

    Attributes:
        inner: the transformers tokenizer.
        source: the template.
        variables: what else the template reads, as JSON text.
    """

    inner: Any
    source: str
    variables: str = "{}"

    def render(self, messages: Sequence[Message], tools: list[Message] | None = None, prompt: bool = False) -> Rendering:
        """A conversation with the origin of its characters, exactly as transformers renders it; without spans if they differ.

        Args:
            messages: the conversation.
            tools: definitions that the template shows to the model.
            prompt: end with the header of an assistant turn.

        Raises:
            Exception: whatever the template raises.
        """
        text = self.text(messages, tools, prompt)
        if all(_is_plain(message) for message in messages):
            seen: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None}
        else:  # transformers leaves out None, and gives reasoning all of its names
            seen = json.loads(self.inner.apply_chat_template(messages, tools=tools, chat_template=_SEEN, tokenize=False))
        variables = {**self.inner.special_tokens_map, "add_generation_prompt": prompt, **json.loads(self.variables)}
        rendering = render_traced(self.source, seen.pop("messages"), {**variables, **seen})
        if rendering.text == text:
            return rendering
        return Rendering(text, [], lost=True, printed=False)

    def text(self, messages: Sequence[Message], tools: list[Message] | None = None, prompt: bool = False) -> str:
        """The rendered conversation as transformers has it; see `render`."""
        how = json.loads(self.variables)
        return self.inner.apply_chat_template(
            messages, tools=tools, chat_template=self.source, tokenize=False, add_generation_prompt=prompt, **how
        )

    def certainly_shows(self, messages: Sequence[Message], text: str) -> bool:
        """Whether a text surely has all messages: plain ones, in roles that the template shows."""
        return all(
            _is_plain(message) and shows_role(self, message["role"]) and message["content"].strip() in text for message in messages
        )

    def attempt(self, messages: Sequence[Message], tools: list[Message] | None = None, prompt: bool = False) -> Rendering | None:
        """The rendering of a conversation; None if the template rejects it."""
        try:
            return self.render(messages, tools, prompt)
        except TooLong:
            raise
        except Exception:  # a template is a program that comes with the model: it may raise anything
            return None

    def shows(self, messages: Sequence[Message]) -> bool:
        """Whether the template renders a conversation, with every message in it."""
        rendering = self.attempt(messages)
        return rendering is not None and not rendering.printed and dropped(rendering, messages) is None


def _is_plain(message: Message) -> bool:
    return message.keys() == {"role", "content"} and isinstance(message["content"], str)


@frozen
class Habits:
    """What a template expects of messages.

    Attributes:
        text_arguments: arguments of calls are JSON text, not objects.
        empty_content: a message with calls needs a content, "" if it has none.
        part_contents: contents are lists of parts.
        refuses_system: there is no system message.
        hides_calls: calls are shown nowhere.
    """

    text_arguments: bool = False
    empty_content: bool = False
    part_contents: bool = False
    refuses_system: bool = False
    hides_calls: bool = False


@lru_cache(maxsize=64)
def habits(template: Template) -> Habits:
    """What the template expects of messages."""
    plain = [_USER, _ANSWER]
    parts = Habits(part_contents=True)
    found = parts if not template.shows(plain) and template.shows(adapted(plain, parts)) else Habits()
    system = [{"role": "system", "content": "plums"}, *plain]
    if template.attempt(adapted(plain, found)) and not template.attempt(adapted(system, found)):
        found = evolve(found, refuses_system=True)
    calling = [_USER, _calls(None)]
    ways = [evolve(found, text_arguments=text, empty_content=empty) for text in (False, True) for empty in (False, True)]
    return next((way for way in ways if template.shows(adapted(calling, way))), evolve(found, hides_calls=True))


def shows_beside_calls(template: Template) -> bool:
    """Whether the template ever shows the content of a message that has calls."""
    return template.shows(adapted([_USER, _calls("plums")], habits(template)))


def asks_again(template: Template, messages: Sequence[Message]) -> list[Message]:
    """The messages and a question after them."""
    return [*messages, *adapted([_USER], habits(template))]


def _calls(content: str | None) -> Message:
    call = {"type": "function", "id": "call00001", "function": {"name": "now", "arguments": _ARGUMENTS}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def adapted(messages: Sequence[Message], way: Habits) -> list[Message]:
    """The messages as a template with such habits expects them."""
    return [_adapted(message, way) for message in messages]


def _adapted(message: Message, way: Habits) -> Message:
    changes: Message = {}
    if way.empty_content and message.get("content") is None:
        changes["content"] = ""
    if message.get("tool_calls"):
        changes["tool_calls"] = [with_arguments(call, as_text=way.text_arguments) for call in message["tool_calls"]]
    if way.part_contents and isinstance(message.get("content"), str):
        changes["content"] = [{"type": "text", "text": message["content"]}]
    return {**message, **changes} if changes else message


def with_arguments(call: Message, as_text: bool) -> Message:
    """A call whose arguments are JSON text, or an object: OpenAI writes text, which most templates would quote once more."""
    function = call.get("function", call)
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    given = function["arguments"]
    if as_text:
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    else:
        parsed = json_object(given)
        arguments = given if parsed is None else parsed
    changed = {**function, "arguments": arguments}
    return {**call, "function": changed} if "function" in call else changed


@lru_cache(maxsize=256)
def role_for(template: Template, role: str) -> str:
    """The role under which the template shows messages of `role`: itself, or the one that stands in for it."""
    other = _STAND_IN.get(role)
    return role if other is None or shows_role(template, role) or not shows_role(template, other) else other


@lru_cache(maxsize=256)
def shows_role(template: Template, role: str) -> bool:
    """Whether the template shows messages of a role."""
    words: Message = {"role": role, "content": "plums"}
    if _STAND_IN.get(role, role) == "tool":
        words |= {"name": "now", "tool_call_id": "call00001"}
        chats = [[_USER, _calls(None), words], [_USER, _ANSWER, words]]
    else:
        chats = [[words, _USER, _ANSWER]]
    return any(template.shows(adapted(chat, habits(template))) for chat in chats)


@frozen
class TurnEnd:
    """The token at which generation stops.

    Attributes:
        own: the turn's last token; None if the template ends turns with none.
        following: otherwise the first token of the next turn's header; None if that is no token of its own.
    """

    own: int | None
    following: int | None


@lru_cache(maxsize=64)
def turn_end(template: Template, calls: bool = False) -> TurnEnd:
    """How the template ends an assistant's turn, or one with calls."""
    answer = _calls(None) if calls else _ANSWER
    after: Message = {"role": "tool", "name": "now", "tool_call_id": "call00001", "content": "plums"} if calls else _USER
    way = habits(template)
    last = _end_of_turn(template, adapted([_USER, answer], way))
    closes = not calls or turn_end(template).own is not None  # a tag that closes calls ends no turn where plain ones have no end
    own = _last_token(template, last[0], calls) if last and closes else None
    if own is not None:
        return TurnEnd(own, None)
    within = _end_of_turn(template, adapted([_USER, answer, after], way))
    return TurnEnd(None, _only_token(template, within[1], first=True) if within else None)


def _last_token(template: Template, text: str, calls: bool) -> int | None:
    """The token that ends a turn: that of its first line, where Phi has EOS in another, else the last."""
    lines = [line for line in text.splitlines() if line.strip()]
    first = _only_token(template, lines[0], first=False) if lines and not calls else None
    return _only_token(template, text, first=False) if first is None else first


def _end_of_turn(template: Template, messages: list[Message]) -> tuple[str, str] | None:
    """What the assistant's turn has after its content, and what follows the turn; None if the template shows neither."""
    whole, prompt = template.attempt(messages), template.attempt(messages[:1], prompt=True)
    if whole is None or prompt is None:
        return None
    tail = prompt_tail(prompt, 0)
    turns = assistant_parts(whole, [message["role"] for message in messages], lambda _: [tail] if tail is not None else [])
    if not turns or not turns[0].parts:
        return None
    stop = turns[0].parts[-1][1]
    return whole.text[min(content_end(whole, 1) or 0, stop) : stop], whole.text[stop:]


def _only_token(template: Template, text: str, first: bool) -> int | None:
    """The first or the last token of a text, without white space around it; None if it is not one of those added by name."""
    ids = template.inner.encode(text.strip(), add_special_tokens=False)
    token = ids[0 if first else -1] if ids else None
    return token if token in template.inner.added_tokens_decoder else None


def template_of(tokenizer: Any, tools: list[Message] | None = None, variables: Mapping[str, Any] | None = None) -> Template | None:
    """The Jinja template that a tokenizer uses; None if its conversations are rendered by Python code.

    Raises:
        ValueError: the tokenizer has several templates and none of them is for this conversation.
    """
    from transformers import PreTrainedTokenizerBase

    inner = tokenizer._tokenizer
    custom = getattr(type(inner), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template
    if tokenizer._chat_template is not None or custom or inner.chat_template is None:
        return None
    return Template(inner, inner.get_chat_template(None, tools), json.dumps({**template_args(tokenizer), **(variables or {})}))


def template_args(tokenizer: Any) -> dict[str, Any]:
    """The variables that every conversation of a tokenizer gets, such as `enable_thinking`; those of a row win."""
    return tokenizer._tokenizer.__dict__.setdefault("_mlxlora_template_args", {})
