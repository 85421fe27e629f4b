"""Turns a row's messages and tools into the form that chat templates take."""

from typing import Any

import orjson

from ..errors import InputError, described

Message = dict[str, Any]

_REASONING = ("thinking", "reasoning")  # types of content parts

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation"), "tool"),
    "system": "system",
}


def as_messages(value: Any, location: str, field: str) -> list[Message]:
    """Messages with `role` and `content`, from OpenAI's (role, content) or ShareGPT's (from, value) form.

    Content is a string; None only beside `tool_calls`. OpenAI's former `function_call` becomes `tool_calls`, parts of reasoning
    become `reasoning_content`, and known names of roles, such as human or ChatGPT, those of chat templates.

    Raises:
        InputError: `value` is no list of messages; the message names `location`, the field and the value.

    >>> as_messages([{"from": "human", "value": "Hi"}], "a.jsonl:1", "conversations")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InputError(f"{location}: '{field}' must be a list of at least one message, got {described(value)}")
    messages = [_message(item, location, field) for item in value]
    if any(isinstance(item, dict) and item.get("function_call") is not None for item in value):
        messages = [{**message, "role": "tool"} if message["role"] == "function" else message for message in messages]
    return messages


def _message(item: Any, location: str, field: str) -> Message:
    role_key, content_key = ("from", "value") if isinstance(item, dict) and "from" in item else ("role", "content")
    if not isinstance(item, dict) or not isinstance(item.get(role_key), str):
        raise InputError(f"{location}: a message of '{field}' must have a 'role' and a 'content', got {described(item)}")
    read = (role_key, content_key, "tool_calls", "function_call")
    rest = {key: value for key, value in item.items() if key not in read and value is not None}
    calls = _tool_calls(item, location, field)
    content = item.get(content_key)
    if item[role_key] == "function_call" and calls is None:
        calls = _sharegpt_call(content)
        content = content if calls is None else None
    name: str = item[role_key]
    role = _ROLES.get(name.lower(), name)
    text, reasoning = _content(content, calls, location, field, role)
    message = {**reasoning, **rest, "role": role, "content": text}
    return message if calls is None else {**message, "tool_calls": calls}


def _content(content: Any, calls: list | None, location: str, field: str, role: str) -> tuple[str | None, Message]:
    """The text of a content, and its reasoning under the key of chat templates."""
    if content is None and calls:
        return None, {}  # not "": some templates print the calls only where there is no content
    if content is None and role == "assistant":
        return "", {}
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        texts = [part.get("text") for part in content if part.get("type") not in _REASONING]
        thoughts = [part.get("text", part.get(part["type"])) for part in content if part.get("type") in _REASONING]
        if all(isinstance(text, str) for text in (*texts, *thoughts)):
            reasoning = {"reasoning_content": "".join(thoughts)} if thoughts else {}
            return ("".join(texts) if texts or not calls else None), reasoning
    if not isinstance(content, str):
        remedy = "; write it as JSON text" if isinstance(content, dict) else ""
        raise InputError(f"{location}: the content of a message of '{field}' must be a string, got {described(content)}{remedy}")
    return content, {}


def _tool_calls(item: Message, location: str, field: str) -> list[Message] | None:
    name = "function_call" if item.get("tool_calls") is None and item.get("function_call") is not None else "tool_calls"
    calls = _parsed(item.get(name))
    if not calls and (calls is None or isinstance(calls, list)):
        return None
    if name == "function_call" and isinstance(calls, dict):  # OpenAI's former key
        calls = [{"type": "function", "function": calls}]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{location}: '{name}' in '{field}' must be a list of objects, got {described(calls)}")
    return calls


def _parsed(value: Any) -> Any:
    """The value of a JSON text; other values as they are."""
    try:
        return orjson.loads(value) if isinstance(value, str) else value
    except orjson.JSONDecodeError:
        return value


def _sharegpt_call(text: Any) -> list[Message] | None:
    call = json_object(text)
    if call is None or not isinstance(call.get("name"), str):
        return None
    return [{"type": "function", "function": call}]


def json_object(text: Any) -> Message | None:
    """The object that a JSON text stands for; None if it is none."""
    value = _parsed(text) if isinstance(text, str) else None
    return value if isinstance(value, dict) else None


def as_tools(value: Any, location: str) -> list[Message] | None:
    """Tool definitions, from one, a list of them or their JSON text; bare function schemas are wrapped as templates expect.

    Raises:
        InputError: `value` is none of these.

    >>> as_tools('[{"name": "now"}]', "a.jsonl:1")
    [{'type': 'function', 'function': {'name': 'now'}}]
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = orjson.loads(value) if value.strip() else []
        except orjson.JSONDecodeError as error:
            raise InputError(f"{location}: 'tools' is not JSON ({error.msg}): {described(value)}") from None
    if isinstance(tools, dict) and {"name", "function"} & tools.keys():
        tools = [tools]
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{location}: 'tools' must be a list of objects or its JSON text, got {described(value)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages after a system message, unless they already have one."""
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]
