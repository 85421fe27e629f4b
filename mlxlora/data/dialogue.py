"""Decides which messages of a conversation are its prompt, and which of its turns are trained."""

from collections.abc import Mapping, Sequence
from typing import Literal

from ..errors import InputError, described, listed, plain
from .messages import Message

_REASONING = ("reasoning_content", "thinking", "reasoning")  # transformers reads each of them
_WEIGHTS = ("weight", "train", "loss")  # OpenAI's, axolotl's and ms-swift's name


def weighted(messages: Sequence[Message], location: str, field: str) -> list[Message]:
    """The messages, those that are not to be trained marked by `weight` 0 alone, whichever key their row uses for that.

    Raises:
        InputError: a weight is neither 0 nor 1, true nor false.

    >>> weighted([{"role": "assistant", "content": "2", "train": False}], "a.jsonl:1", "messages")
    [{'role': 'assistant', 'content': '2', 'weight': 0}]
    """
    found = []
    for number, message in enumerate(messages, 1):
        weights = {key: message[key] for key in _WEIGHTS if key in message}
        for key, value in weights.items():
            if not isinstance(value, (int, float)) or value not in (0, 1):
                raise InputError(
                    f"{location}: '{key}' of message {number} of '{field}' must be 0 or 1, false or true, got {described(value)}"
                )
        rest = {key: value for key, value in message.items() if key not in _WEIGHTS}
        found.append(rest if all(weights.values()) else {**rest, "weight": 0})
    return found


def unweighted(messages: Sequence[Message]) -> list[Message]:
    """The messages as chat templates take them, without `weight`."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def trained_turns(messages: Sequence[Message], start: int = 0, train_on: Literal["all", "last"] = "all") -> frozenset[int]:
    """The numbers of the assistant's messages from `start` on, without those of weight 0; of these all, or the last only.

    >>> sorted(trained_turns([{"role": "assistant", "weight": 0}, {"role": "user"}, {"role": "assistant"}]))
    [2]
    """
    turns = [i for i, m in enumerate(messages) if i >= start and m["role"] == "assistant" and m.get("weight") != 0]
    return frozenset(turns[-1:] if train_on == "last" else turns)


def check_answers(messages: Sequence[Message], location: str, field: str) -> None:
    """Checks that every trained turn says something.

    Raises:
        InputError: a message of the assistant has neither content nor calls nor reasoning.
    """
    for turn in sorted(trained_turns(messages)):
        if not any(messages[turn].get(key) for key in ("content", "tool_calls", *_REASONING)):
            raise InputError(
                f"{location}: message {turn + 1} of '{field}' is an empty answer; write one, give it weight 0, or remove the row"
            )


def divided(
    prompt: list[Message] | None, sides: Mapping[str, list[Message]], location: str
) -> tuple[list[Message], list[list[Message]]]:
    """The prompt, and the answers of each side.

    A side may repeat the messages of the prompt, and either may bring the system message. Without a prompt, the common
    beginning of the sides is the prompt.

    Raises:
        InputError: the sides have no common beginning, a side does not follow the prompt, or it has no answer.
    """
    if prompt is None:
        prompt, answers = _common(list(sides.values()), location)
    else:
        systems, bodies = zip(*(_without_system(side) for side in sides.values()), strict=True)
        system, body = _without_system(unweighted(prompt))
        prompt = [*_one_system([system, *systems], location), *body]
        answers = [_unrepeated(side, body) for side in bodies]
    for name, answer in zip(sides, answers, strict=True):
        _check_side(answer, prompt, location, name)
    return prompt, answers


def _common(sides: Sequence[list[Message]], location: str) -> tuple[list[Message], list[list[Message]]]:
    bare = [unweighted(side) for side in sides]
    limit = min(map(len, bare)) - 1
    shared = next((i for i in range(limit) if any(side[i] != bare[0][i] for side in bare)), max(limit, 0))
    if not shared:
        raise InputError(f"{location}: chosen and rejected share no first message; add a 'prompt' field")
    return bare[0][:shared], [side[shared:] for side in sides]


def _without_system(messages: list[Message]) -> tuple[Message | None, list[Message]]:
    if messages and messages[0]["role"] == "system":
        return unweighted(messages[:1])[0], messages[1:]
    return None, messages


def _one_system(found: Sequence[Message | None], location: str) -> list[Message]:
    given = [message for message in found if message is not None]
    if any(message != given[0] for message in given):
        raise InputError(f"{location}: the prompt and its answers have different system messages; keep the one in 'prompt'")
    return given[:1]


def _unrepeated(side: list[Message], prompt: list[Message]) -> list[Message]:
    repeats = len(side) > len(prompt) and unweighted(side[: len(prompt)]) == prompt
    return side[len(prompt) :] if repeats else side


def _check_side(answer: list[Message], prompt: list[Message], location: str, name: str) -> None:
    if not any(message["role"] == "assistant" for message in answer):
        raise InputError(f"{location}: '{name}' has no assistant message; roles found: {listed(m['role'] for m in answer)}")
    if not _follows(answer[0], prompt):
        raise InputError(
            f"{location}: '{name}' begins with a {plain(answer[0]['role'])} message that is not the prompt's; "
            "begin it with the answer, or repeat the prompt exactly"
        )
    check_answers(answer, location, name)


def _follows(message: Message, prompt: Sequence[Message]) -> bool:
    """Whether a message can come after the prompt: an answer anywhere, a tool after its call, others after an answer."""
    if message["role"] == "assistant" or not prompt:
        return True
    if message["role"] == "tool":
        return prompt[-1]["role"] == "tool" or bool(prompt[-1].get("tool_calls"))
    return prompt[-1]["role"] == "assistant"


def is_begun(prompt: Sequence[Message]) -> bool:
    """Whether a prompt ends in the beginning of an answer, which the completion continues."""
    last = prompt[-1] if prompt else {"role": "user"}
    return last["role"] == "assistant" and bool(last["content"]) and not last.get("tool_calls")


def whole_conversation(prompt: list[Message], answer: list[Message]) -> tuple[list[Message], int]:
    """The whole conversation, and the number of the message with which the answer starts.

    The answer continues the last message of the prompt if that is the beginning of one.

    >>> whole_conversation([{"role": "assistant", "content": "It is"}], [{"role": "assistant", "content": " 2."}])
    ([{'role': 'assistant', 'content': 'It is 2.'}], 0)
    """
    if not is_begun(prompt) or answer[0]["role"] != "assistant":
        return [*prompt, *answer], len(prompt)
    begun = prompt[-1] | answer[0] | {"content": prompt[-1]["content"] + (answer[0]["content"] or "")}
    return [*prompt[:-1], begun, *answer[1:]], len(prompt) - 1


def sampled_turns(prompt: str | list[Message], text: str) -> tuple[str | list[Message], str | list[Message]]:
    """A prompt and its sampled completion as rewards get them: a begun answer belongs to the completion, as in TRL.

    >>> sampled_turns([{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is"}], " 2.")[1]
    [{'role': 'assistant', 'content': 'It is 2.'}]
    """
    if isinstance(prompt, str):
        return prompt, text
    messages, first = whole_conversation(prompt, [{"role": "assistant", "content": text}])
    return messages[:first], messages[first:]


def dialogue_prompt(chosen: str, rejected: str, location: str) -> int:
    """Characters of the prompt in dialogues of HH-RLHF: up to the last assistant header that both sides share.

    Raises:
        InputError: they share none.
    """
    turn = "\n\nAssistant:"
    length = min(len(chosen), len(rejected))
    shared = next((i for i in range(length) if chosen[i] != rejected[i]), length)
    last = chosen.rfind(turn, 0, shared)
    if last < 0:
        raise InputError(
            f"{location}: without 'prompt', 'chosen' and 'rejected' must begin alike, up to {turn!r}; add a 'prompt' field"
        )
    return last + len(turn)
