"""Assistant turns under a template in Python, which tells nothing about its characters.

A turn is where the conversation up to it, with the header of an answer, and the conversation through it agree with the whole.
"""

from collections.abc import Callable, Collection

from ..errors import InputError
from .conversation import common_prefix
from .messages import Message


def located_turns(
    tokens: Callable[[list[Message], bool], list[int]], messages: list[Message], trained: Collection[int], location: str
) -> tuple[list[int], list[bool]]:
    """[L] token ids of a conversation, and [L] which of them the assistant turns `trained` wrote.

    Args:
        tokens: (messages, whether the header of an answer follows) -> token ids.
        messages: the conversation.
        trained: indices of messages.
        location: "file:line" for errors.

    Raises:
        InputError: the template writes earlier turns in another way than the last.
    """
    whole = tokens(messages, False)
    mask = [False] * len(whole)
    for turn in (i for i, message in enumerate(messages) if message["role"] == "assistant" and i in trained):
        prompt = tokens(messages[:turn], True) if turn else []
        start = common_prefix(prompt, whole)
        end = common_prefix(tokens(messages[: turn + 1], False), whole)
        if start < len(prompt) - 1 or end <= start:  # the last token may have merged with the answer
            raise InputError(
                f"{location}: cannot tell which tokens message {turn + 1} wrote, because the model's template rewrites "
                "earlier turns and hides where; split the conversation into rows of one answer, or drop --mask-prompt"
            )
        mask[start:end] = [True] * (end - start)
    return whole, mask
