"""Turns rows into token ids, and decides which tokens are trained.

Plain text is encoded whole, with the end-of-sequence token behind it. The chat template renders conversations. The
completion starts at the first token where the prompt alone and the whole text differ, so no merged token is cut in two.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from attrs import frozen

from ..errors import InputError, quoted
from ..utils.ticks import ticking
from .chat_template import assistant_turns, render
from .conversation import common_prefix
from .dialogue import is_begun, trained_turns, unweighted, whole_conversation
from .formats import (
    KEYS,
    ChatRecord,
    CompletionRecord,
    FramedPrompt,
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
_Templated = _Prompted | ChatRecord


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
    train_on: Literal["all", "last"] = "all",
    use_chat_template: bool = False,
    max_seq_length: int = 2048,
    keys: Mapping[str, str] = KEYS,
) -> Example | None:
    """The tokens of an SFT row; None if truncation leaves no trained token.

    Every token is trained; with `mask_prompt` only completions and assistant turns are, of a conversation all turns or the last.
    Plain text is always trained whole.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    how = {"mask_prompt": mask_prompt, "use_chat_template": use_chat_template, "max_seq_length": max_seq_length}
    return record_example(supervised_record(row, keys), tokenizer, train_on=train_on, **how)


def record_example(
    record: SupervisedRecord,
    tokenizer: Any,
    *,
    mask_prompt: bool,
    use_chat_template: bool,
    max_seq_length: int,
    train_on: Literal["all", "last"] = "all",
) -> Example | None:
    """The tokens of a record; see `supervised_example`."""
    match record:
        case TextRecord(text=text):
            ids = _encode(tokenizer, _ended(tokenizer, text))
            loss_mask = [True] * len(ids)
        case ChatRecord(messages=messages) if mask_prompt:
            turns = trained_turns(messages, train_on=train_on)
            ids, loss_mask = assistant_turns(
                tokenizer, unweighted(messages), record.location, trained=turns, **_template_input(record)
            )
        case ChatRecord(messages=messages):
            ids, loss_mask = _chat_tokens(tokenizer, messages, record)
        case CompletionRecord(completion=completion):
            (whole,) = _wholes(tokenizer, record, [completion], use_chat_template, train_on, begun=mask_prompt)
            ids, loss_mask = whole.ids, whole.completion(whole.start) if mask_prompt else whole.every
    return _example(ids, loss_mask, record.location, max_seq_length)


def preference_pair(
    row: Row,
    tokenizer: Any,
    *,
    use_chat_template: bool = False,
    max_seq_length: int = 2048,
    prompt_truncation: Literal["right", "left"] = "right",
    train_prompt: bool = False,
    keys: Mapping[str, str] = KEYS,
) -> Pair | None:
    """Both sides of a preference row; None if truncation leaves a side without a trained token.

    Args:
        row: chosen and rejected completions of a prompt.
        tokenizer: mlx-lm's TokenizerWrapper.
        use_chat_template: wrap plain strings in the chat template.
        max_seq_length: most tokens of prompt and completion together; the end is cut off.
        prompt_truncation: "left" first cuts off the beginning of the prompt, so that the longer completion fits.
        train_prompt: train the tokens of the prompt too, and mark them as such.
        keys: names of the fields.

    Raises:
        InputError: the row is not understood, or the chat template rejects it.
    """
    record = preference_record(row, keys)
    wholes = _wholes(tokenizer, record, [record.chosen, record.rejected], use_chat_template)
    start = min(whole.start for whole in wholes)
    longest = max(len(whole.ids) for whole in wholes)
    cut = max(0, min(start - 1, longest - max_seq_length)) if prompt_truncation == "left" else 0
    chosen, rejected = (_completed(whole, start, cut, row.location, max_seq_length, train_prompt) for whole in wholes)
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
    made = [fn(row) for row in ticking(rows)]
    items = [item for item in made if item is not None]
    check_some_left(len(made), len(items), limit=limit)
    truncated = sum(getattr(item, "truncated", False) for item in items)
    return items, Counts(rows=len(made), truncated=truncated, dropped=len(made) - len(items))


def check_some_left(rows: int, items: int, *, limit: str = "--max-seq-length") -> None:
    """Checks that not all rows were dropped.

    Raises:
        InputError: they were; the message names the flag `limit`, which would keep them.
    """
    if rows and not items:
        raise InputError(f"none of the {rows} rows has a token left to train on after truncation; raise {limit}")


def check_ids(tokens: np.ndarray, location: str, vocabulary: int, tokenizer: Any, whose: str = "the model") -> None:
    """Checks that every token has an embedding; MLX would read past the end of the matrix.

    Raises:
        InputError: a token is not in the vocabulary of the model; the message begins with `location` and names the model `whose`.
    """
    if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
        raise InputError(
            f"{location}: token {largest} ({tokenizer.decode([largest])!r}) is not among {whose}'s {vocabulary}: "
            "the tokenizer has more tokens than the weights; use the tokenizer of this model"
        )


class _Whole(NamedTuple):
    """A prompt with a completion.

    Attributes:
        ids: [L] token ids, which need not begin with those of the prompt alone.
        start: the first token that is not the prompt's.
        every: [L] bool, all tokens without those of turns that are not to be trained.
        turns: [L] bool, the tokens of the completion's trained turns; None: the completion is one such turn.
    """

    ids: list[int]
    start: int
    every: list[bool]
    turns: list[bool] | None = None

    def completion(self, start: int) -> list[bool]:
        """[L] bool, the trained tokens of the completion, which starts at token `start`."""
        return [t >= start and turn for t, turn in enumerate(self.turns or [True] * len(self.ids))]


def _wholes(
    tokenizer: Any,
    record: CompletionRecord | PairRecord,
    completions: list[str | list[Message]],
    use_chat_template: bool,
    train_on: Literal["all", "last"] = "all",
    *,
    begun: bool = True,
) -> list[_Whole]:
    """The prompt with each completion; plain text is not encoded twice if nobody asks where a completion begins (`begun`)."""
    plain = isinstance(record.prompt, str) and not use_chat_template
    prompt = [] if plain and not begun else _prompt(tokenizer, record, use_chat_template, None)
    if isinstance(record.prompt, str) and not use_chat_template:
        text = _with_system_text(record.prompt, record.system)
        return [_joined(prompt, _encode(tokenizer, _ended(tokenizer, text + str(completion)))) for completion in completions]
    messages = _as_conversation(record, None)
    wholes = [whole_conversation(messages, _as_answer(completion)) for completion in completions]
    return [_answered(tokenizer, record, whole, trained_turns(whole[0], whole[1], train_on), prompt) for whole in wholes]


def _joined(prompt: list[int], ids: list[int]) -> _Whole:
    return _Whole(ids, common_prefix(prompt, ids), [True] * len(ids))


def _answered(
    tokenizer: Any,
    record: CompletionRecord | PairRecord,
    whole: tuple[list[Message], int],
    trained: Collection[int],
    prompt: list[int],
) -> _Whole:
    """A conversation, with the message in which the answer starts; `trained` are the turns of the answer that are trained."""
    messages, first = whole
    ids, every = _chat_tokens(tokenizer, messages, record)
    start = common_prefix(prompt, ids)
    if trained == {first} and len(messages) == first + 1:
        return _Whole(ids, start, every)
    _, turns = assistant_turns(tokenizer, unweighted(messages), record.location, trained=trained, **_template_input(record))
    return _Whole(ids, start, every, turns)


def _chat_tokens(tokenizer: Any, messages: list[Message], record: _Templated) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and all of them, without the turns that are not to be trained."""
    every = trained_turns(unweighted(messages))
    if not (skipped := every - trained_turns(messages)):
        ids = render(tokenizer, messages, record.location, **_template_input(record))
        return ids, [True] * len(ids)
    ids, marks = assistant_turns(tokenizer, unweighted(messages), record.location, trained=skipped, **_template_input(record))
    return ids, [not mark for mark in marks]


def _template_input(record: _Templated) -> dict[str, Any]:
    """What the row gives its chat template besides the messages."""
    return {"tools": record.tools, "template_args": record.template_args}


def _prompt(tokenizer: Any, record: _Prompted, use_chat_template: bool, system: str | None) -> list[int]:
    if isinstance(record.prompt, str) and not use_chat_template:
        return _encode(tokenizer, _with_system_text(record.prompt, record.system or system))
    messages = _as_conversation(record, system)
    end = {"continue_final": True} if is_begun(messages) else {"generation_prompt": True}
    return render(tokenizer, messages, record.location, **end, **_template_input(record))


def _as_conversation(record: _Prompted, system: str | None) -> list[Message]:
    prompt = record.prompt.asked if isinstance(record.prompt, FramedPrompt) else record.prompt
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


def _completed(whole: _Whole, start: int, cut: int, location: str, limit: int, train_prompt: bool) -> Example | None:
    """A side of a pair without its first `cut` tokens; None if no token of the completion is left."""
    ids, completion = whole.ids[cut:], whole.completion(start)[cut:]
    if start - cut >= limit:
        return None
    if not train_prompt:
        return _example(ids, completion, location, limit, cut=cut > 0)
    prompt = [t < start - cut for t in range(len(ids))]
    loss_mask = [before or after for before, after in zip(prompt, completion, strict=True)]
    return _example(ids, loss_mask, location, limit, prompt=prompt, cut=cut > 0)


def _example(
    ids: list[int], loss_mask: list[bool], location: str, limit: int, *, prompt: list[bool] | None = None, cut: bool = False
) -> Example | None:
    targets = np.asarray(loss_mask[:limit], bool)
    targets[:1] = False
    of_prompt = None if prompt is None else np.asarray(prompt[:limit], bool) & targets
    if not (targets if of_prompt is None else targets & ~of_prompt).any():
        return None
    return Example(np.asarray(ids[:limit], np.int32), targets, of_prompt, location, cut or len(ids) > limit)
