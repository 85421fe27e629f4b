"""Turns a row's messages and tools into the form that chat templates take."""

from typing import Any

import orjson

from ..errors import InputError, described

Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
_SECONDS = 60.0  # for one conversation; templates take milliseconds


def as_messages(value: Any, location: str, field: str) -> list[Message]:
    """Messages with `role` and `content`, from OpenAI's (role, content) or ShareGPT's (from, value) form.

    Content is a string; None only beside `tool_calls`.

    Raises:
        InputError: `value` is no list of messages; names `where`, the field and the value.

    >>> as_messages([{"from": "human", "value": "Hi"}], "a.jsonl:1", "conversations")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise InputError(f"{location}: '{field}' must be a list of at least one message, got {described(value)}")
    return [_message(item, location, field) for item in value]


def _message(item: Any, location: str, field: str) -> Message:
    role_key, content_key = ("from", "value") if isinstance(item, dict) and "from" in item else ("role", "content")
    if not isinstance(item, dict) or not isinstance(item.get(role_key), str):
        raise InputError(f"{location}: a message of '{field}' must have a 'role' and a 'content', got {described(item)}")
    rest = {key: value for key, value in item.items() if key not in (role_key, content_key, "tool_calls") and value is not None}
    calls = _tool_calls(item, location, field)
    content = item.get(content_key)
    if item[role_key] == "function_call" and calls is None:
        calls = _sharegpt_call(content)
        content = content if calls is None else None
    message = {**rest, "role": _ROLES.get(item[role_key], item[role_key]), "content": _content(content, calls, location, field)}
    return message if calls is None else {**message, "tool_calls": calls}


def _content(content: Any, calls: list | None, location: str, field: str) -> str | None:
    if content is None and calls:
        return None  # not "": some templates print the calls only where there is no content
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise InputError(f"{location}: the content of a message of '{field}' must be a string, got {described(content)}")
    return content


def _tool_calls(item: Message, location: str, field: str) -> list[Message] | None:
    calls = item.get("tool_calls")
    if not calls and (calls is None or isinstance(calls, list)):
        return None
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{location}: 'tool_calls' in '{field}' must be a list of objects, got {described(calls)}")
    return [_with_parsed_arguments(call) for call in calls]


def _with_parsed_arguments(call: Message) -> Message:
    """OpenAI writes arguments as a JSON string; templates print objects, and would quote a string once more."""
    function = call.get("function", call)
    arguments = _json_object(function.get("arguments")) if isinstance(function, dict) else None
    if arguments is None:
        return call
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed


def _sharegpt_call(text: Any) -> list[Message] | None:
    call = _json_object(text)
    if call is None or not isinstance(call.get("name"), str):
        return None
    return [{"type": "function", "function": call}]


def _json_object(text: Any) -> Message | None:
    try:
        value = orjson.loads(text) if isinstance(text, str) else None
    except orjson.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def as_tools(value: Any, location: str) -> list[Message] | None:
    """Tool definitions, from a list or its JSON text; bare function schemas are wrapped as templates expect.

    >>> as_tools('[{"name": "now"}]', "a.jsonl:1")
    [{'type': 'function', 'function': {'name': 'now'}}]
    """
    tools = value
    if isinstance(value, str):
        try:
            tools = orjson.loads(value) if value.strip() else []
        except orjson.JSONDecodeError as error:
            raise InputError(f"{location}: 'tools' is not JSON ({error.msg}): {described(value)}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{location}: 'tools' must be a list of objects or its JSON text, got {described(value)}")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools] or None


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """The messages behind a system message, unless they already have one."""
    if not system or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system}, *messages]
