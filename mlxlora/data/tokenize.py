"""Rows to token ids: which tokens a row has, and which of them are trained on.

Plain text is encoded whole, with the end-of-sequence text; a conversation is its chat template's. The completion starts at
the first token where the prompt alone and the whole differ, so that merges across the boundary are never cut.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from attrs import frozen

from ..errors import InputError, quoted
from .chat_template import assistant_turns, common_prefix, render
from .formats import KEYS, Chat, Completion, Text, preference, prompt_row, supervised
from .messages import Message, with_system
from .rows import Row

Item = TypeVar("Item")


@frozen(eq=False)
class Example:
    """A token sequence and its scored tokens.

    Attributes:
        tokens: [L] int32.
        scored: [L] bool, tokens[t] is a target that is trained on; never the first, which nothing predicts.
        prompt: [L] bool, scored tokens that belong to the prompt; None if none does.
        where: "file:line" of the row.
        truncated: whether tokens were cut.
        ref_logps: [scored tokens] log-probabilities under the reference policy, once they are known.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    prompt: np.ndarray | None
    location: str
    truncated: bool = False
    ref_logps: np.ndarray | None = None


@frozen
class Pair:
    """Two completions of one prompt, the first preferred."""

    chosen: Example
    rejected: Example
    preference_score: float | None = None

    @property
    def truncated(self) -> bool:
        """Whether either side was cut."""
        return self.chosen.truncated or self.rejected.truncated


@frozen(eq=False)
class Prompt:
    """A prompt to sample from: tokens [L] int32, the columns that rewards read, and the prompt as the row gave it."""

    tokens: np.ndarray
    columns: dict[str, Any]
    location: str
    prompt: str | list[Message]


@frozen
class Counts:
    """Rows read, and those of them that were cut or had nothing left to train on."""

    rows: int
    truncated: int
    dropped: int


def supervised_example(
    row: Row,
    tokenizer: Any,
    *,
    mask_prompt: bool = False,
    use_chat_template: bool = False,
    max_seq_length: int = 2048,
    keys: Mapping[str, str] = KEYS,
) -> Example | None:
    """The tokens of an SFT row; None if truncation leaves no scored token.

    Everything is scored, and under `mask_prompt` completions and assistant turns only; a text is always scored whole.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    match supervised(row, keys):
        case Text(text=text):
            ids, loss_mask = _encode(tokenizer, _ended(tokenizer, text)), None
        case Chat(messages=messages, tools=tools) if mask_prompt:
            ids, loss_mask = assistant_turns(tokenizer, messages, row.location, tools=tools)
        case Chat(messages=messages, tools=tools):
            ids, loss_mask = render(tokenizer, messages, row.location, tools=tools), None
        case Completion() as record:
            prompt, (ids,) = _prompt_and_wholes(tokenizer, record, [record.completion], use_chat_template)
            start = common_prefix(prompt, ids)
            loss_mask = [t >= start for t in range(len(ids))] if mask_prompt else None
    return _example(ids, [True] * len(ids) if loss_mask is None else loss_mask, row.location, max_seq_length)


def preference_pair(
    row: Row,
    tokenizer: Any,
    *,
    use_chat_template: bool = False,
    max_seq_length: int = 2048,
    prompt_truncation: Literal["right", "left"] = "right",
    score_prompt: bool = False,
    keys: Mapping[str, str] = KEYS,
) -> Pair | None:
    """Both sides of a preference row; None if truncation leaves either without a scored token.

    Args:
        row: chosen and rejected completions of a prompt.
        tokenizer: mlx-lm's TokenizerWrapper.
        use_chat_template: wrap strings in the chat template.
        max_seq_length: tokens of prompt and completion; the end is cut.
        prompt_truncation: "left" cuts the prompt's beginning first, so that the longer completion fits.
        score_prompt: score prompt tokens too, marked as such.
        keys: what fields are called.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    record = preference(row, keys)
    prompt, wholes = _prompt_and_wholes(tokenizer, record, [record.chosen, record.rejected], use_chat_template)
    start = min(common_prefix(prompt, whole) for whole in wholes)
    longest = max(len(whole) for whole in wholes)
    cut = max(0, min(start - 1, longest - max_seq_length)) if prompt_truncation == "left" else 0
    chosen, rejected = (
        _completed(whole[cut:], start - cut, row.location, max_seq_length, score_prompt, cut > 0) for whole in wholes
    )
    return None if chosen is None or rejected is None else Pair(chosen, rejected, record.preference_score)


def prompt_example(
    row: Row,
    tokenizer: Any,
    *,
    use_chat_template: bool = False,
    max_prompt_length: int | None = None,
    system: str | None = None,
    keys: Mapping[str, str] = KEYS,
) -> Prompt | None:
    """The tokens of a prompt, up to where the completion is to start; None if it has more than `max_prompt_length`.

    `system` is the system message of rows that bring none.

    Raises:
        InputError: the row is not understood, the chat template rejects it, or the prompt has no token.
    """
    record = prompt_row(row, keys)
    ids = _prompt(tokenizer, record, use_chat_template, system)
    if not ids:
        raise InputError(f"{row.location}: the prompt has no tokens: {quoted(record.prompt)}")
    if max_prompt_length is not None and len(ids) > max_prompt_length:
        return None
    return Prompt(np.asarray(ids, np.int32), record.columns, row.location, record.prompt)


def tokenize_all(
    rows: Iterable[Row], fn: Callable[[Row], Item | None], *, limit: str = "--max-seq-length"
) -> tuple[list[Item], Counts]:
    """What `fn` makes of each row, without the rows of which nothing is left, and how many were cut or dropped.

    Raises:
        InputError: every row was dropped; names the flag `limit` that would keep them.
    """
    made = [fn(row) for row in rows]
    items = [item for item in made if item is not None]
    if made and not items:
        raise InputError(f"none of the {len(made)} rows has a token left to train on after truncation; raise {limit}")
    truncated = sum(getattr(item, "truncated", False) for item in items)
    return items, Counts(rows=len(made), truncated=truncated, dropped=len(made) - len(items))


def _prompt_and_wholes(
    tokenizer: Any, record: Any, completions: list[str | list[Message]], use_chat_template: bool
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of the prompt with each completion; the latter is not always an extension of the former."""
    prompt = _prompt(tokenizer, record, use_chat_template, None)
    if isinstance(record.prompt, str) and not use_chat_template:
        text = _with_system_text(record.prompt, record.system)
        return prompt, [_encode(tokenizer, _ended(tokenizer, text + str(completion))) for completion in completions]
    messages = _as_conversation(record, None)
    wholes = [messages + _as_answer(completion) for completion in completions]
    return prompt, [render(tokenizer, whole, record.location, tools=record.tools) for whole in wholes]


def _prompt(tokenizer: Any, record: Any, use_chat_template: bool, system: str | None) -> list[int]:
    if isinstance(record.prompt, str) and not use_chat_template:
        return _encode(tokenizer, _with_system_text(record.prompt, record.system or system))
    return render(tokenizer, _as_conversation(record, system), record.location, tools=record.tools, generation_prompt=True)


def _as_conversation(record: Any, system: str | None) -> list[Message]:
    prompt = record.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return with_system(messages, record.system or system)


def _as_answer(completion: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _with_system_text(prompt: str, system: str | None) -> str:
    return f"{system}\n\n{prompt}" if system else prompt


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids, with the special tokens that the tokenizer adds unless the text brings its own."""
    bos = tokenizer.bos_token
    return list(tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)), verbose=False))


def _ended(tokenizer: Any, text: str) -> str:
    eos = tokenizer.eos_token
    return text if not eos or text.endswith(eos) else text + eos


def _completed(ids: list[int], start: int, location: str, limit: int, score_prompt: bool, cut: bool) -> Example | None:
    if start >= limit:
        return None
    completion = [t >= start for t in range(len(ids))]
    if not score_prompt:
        return _example(ids, completion, location, limit, cut=cut)
    return _example(ids, [True] * len(ids), location, limit, prompt=[not loss_mask for loss_mask in completion], cut=cut)


def _example(
    ids: list[int], loss_mask: list[bool], location: str, limit: int, *, prompt: list[bool] | None = None, cut: bool = False
) -> Example | None:
    targets = np.asarray(loss_mask[:limit], bool)
    targets[:1] = False
    of_prompt = None if prompt is None else np.asarray(prompt[:limit], bool) & targets
    if not (targets if of_prompt is None else targets & ~of_prompt).any():
        return None
    return Example(np.asarray(ids[:limit], np.int32), targets, of_prompt, location, cut or len(ids) > limit)
