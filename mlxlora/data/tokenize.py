"""Turns rows into token ids, and decides which tokens are trained.

Plain text is encoded whole, with the end-of-sequence token behind it. The chat template renders conversations. The
completion starts at the first token where the prompt alone and the whole text differ, so no merged token is cut in two.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
from attrs import frozen

from ..errors import InputError, quoted
from .chat_template import assistant_turns, common_prefix, render
from .formats import (
    KEYS,
    ChatRecord,
    CompletionRecord,
    PairRecord,
    PromptRecord,
    SupervisedRecord,
    TextRecord,
    preference_record,
    prompt_record,
    supervised_record,
)
from .messages import Message, with_system
from .rows import Row

_Item = TypeVar("_Item")
_Prompted = CompletionRecord | PairRecord | PromptRecord


@frozen(eq=False)
class Example:
    """A token sequence and its trained tokens.

    Attributes:
        tokens: [L] int32.
        loss_mask: [L] bool, tokens[t] is a target of training. The first token never is: nothing predicts it.
        prompt: [L] bool, trained tokens of the prompt; None if there are none.
        location: "file:line" of the row.
        truncated: whether tokens were cut off.
        ref_logps: [trained tokens] log-probabilities under the reference policy [nats], once they are known.
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
        """Whether tokens of either side were cut off."""
        return self.chosen.truncated or self.rejected.truncated


@frozen(eq=False)
class Prompt:
    """A prompt to sample from: its tokens [L] int32, the columns for the rewards, and the prompt as the row has it."""

    tokens: np.ndarray
    columns: dict[str, Any]
    location: str
    prompt: str | list[Message]


@frozen
class Counts:
    """How many rows were read, truncated, and dropped because no trained token was left."""

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
    """The tokens of an SFT row; None if truncation leaves no trained token.

    Every token is trained; with `mask_prompt` only completions and assistant turns are. Plain text is always trained whole.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    how = {"mask_prompt": mask_prompt, "use_chat_template": use_chat_template, "max_seq_length": max_seq_length}
    return record_example(supervised_record(row, keys), tokenizer, **how)


def record_example(
    record: SupervisedRecord, tokenizer: Any, *, mask_prompt: bool, use_chat_template: bool, max_seq_length: int
) -> Example | None:
    """The tokens of a record; see `supervised_example`."""
    location = record.location
    match record:
        case TextRecord(text=text):
            ids, loss_mask = _encode(tokenizer, _ended(tokenizer, text)), None
        case ChatRecord(messages=messages, tools=tools) if mask_prompt:
            ids, loss_mask = assistant_turns(tokenizer, messages, location, tools=tools)
        case ChatRecord(messages=messages, tools=tools):
            ids, loss_mask = render(tokenizer, messages, location, tools=tools), None
        case CompletionRecord():
            prompt, (ids,) = _prompt_and_wholes(tokenizer, record, [record.completion], use_chat_template)
            start = common_prefix(prompt, ids)
            loss_mask = [t >= start for t in range(len(ids))] if mask_prompt else None
    return _example(ids, [True] * len(ids) if loss_mask is None else loss_mask, location, max_seq_length)


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
    """Both sides of a preference row; None if truncation leaves a side without a trained token.

    Args:
        row: chosen and rejected completions of a prompt.
        tokenizer: mlx-lm's TokenizerWrapper.
        use_chat_template: wrap plain strings in the chat template.
        max_seq_length: most tokens of prompt and completion together; the end is cut off.
        prompt_truncation: "left" first cuts off the beginning of the prompt, so that the longer completion fits.
        score_prompt: train the tokens of the prompt too, and mark them as such.
        keys: names of the fields.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    record = preference_record(row, keys)
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
    """The tokens of a prompt, up to where the completion starts; None if there are more than `max_prompt_length`.

    `system` is the system message of rows that have none.

    Raises:
        InputError: the row is not understood, the chat template rejects it, or the prompt has no token.
    """
    prompt = record_prompt(prompt_record(row, keys), tokenizer, use_chat_template=use_chat_template, system=system)
    return None if max_prompt_length is not None and len(prompt.tokens) > max_prompt_length else prompt


def record_prompt(record: PromptRecord, tokenizer: Any, *, use_chat_template: bool, system: str | None) -> Prompt:
    """The tokens of a prompt's record; see `prompt_example`."""
    ids = _prompt(tokenizer, record, use_chat_template, system)
    if not ids:
        raise InputError(f"{record.location}: the prompt has no tokens: {quoted(record.prompt)}; write a prompt or remove the row")
    return Prompt(np.asarray(ids, np.int32), record.columns, record.location, record.prompt)


def tokenize_all(
    rows: Iterable[Row], fn: Callable[[Row], _Item | None], *, limit: str = "--max-seq-length"
) -> tuple[list[_Item], Counts]:
    """`fn` of each row without the Nones, and how many rows were truncated and dropped.

    Raises:
        InputError: every row was dropped; the message names the flag `limit`, which would keep them.
    """
    made = [fn(row) for row in rows]
    items = [item for item in made if item is not None]
    if made and not items:
        raise InputError(f"none of the {len(made)} rows has a token left to train on after truncation; raise {limit}")
    truncated = sum(getattr(item, "truncated", False) for item in items)
    return items, Counts(rows=len(made), truncated=truncated, dropped=len(made) - len(items))


def _prompt_and_wholes(
    tokenizer: Any, record: CompletionRecord | PairRecord, completions: list[str | list[Message]], use_chat_template: bool
) -> tuple[list[int], list[list[int]]]:
    """Token ids of the prompt, and of the prompt with each completion, which need not begin with the ids of the prompt."""
    prompt = _prompt(tokenizer, record, use_chat_template, None)
    if isinstance(record.prompt, str) and not use_chat_template:
        text = _with_system_text(record.prompt, record.system)
        return prompt, [_encode(tokenizer, _ended(tokenizer, text + str(completion))) for completion in completions]
    messages = _as_conversation(record, None)
    wholes = [messages + _as_answer(completion) for completion in completions]
    return prompt, [render(tokenizer, whole, record.location, tools=record.tools) for whole in wholes]


def _prompt(tokenizer: Any, record: _Prompted, use_chat_template: bool, system: str | None) -> list[int]:
    if isinstance(record.prompt, str) and not use_chat_template:
        return _encode(tokenizer, _with_system_text(record.prompt, record.system or system))
    return render(tokenizer, _as_conversation(record, system), record.location, tools=record.tools, generation_prompt=True)


def _as_conversation(record: _Prompted, system: str | None) -> list[Message]:
    prompt = record.prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return with_system(messages, record.system or system)


def _as_answer(completion: str | list[Message]) -> list[Message]:
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion


def _with_system_text(prompt: str, system: str | None) -> str:
    return f"{system}\n\n{prompt}" if system else prompt


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds, unless the text begins with BOS itself."""
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
