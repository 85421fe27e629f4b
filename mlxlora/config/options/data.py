"""Options of the rows: where they are, how they are read, tokenized and cut."""

from typing import Literal

from attrs import validators as v

from ...errors import InputError
from ..fields import group, option
from ..given import Data


@group("Data")
class RowOptions:
    """Rows of any kind."""

    data: Data | None = option(None, "Folder with train/valid/test.jsonl, one JSONL or JSON file, or a hub data set name.")
    max_seq_length: int = option(2048, "Rows are cut to this many tokens, on the right.", v.ge(2))
    use_chat_template: bool = option(False, "Wrap plain-text rows in the model's chat template.")
    train_split: str | None = option(None, "Training rows of a hub data set, such as train[:1000].")
    valid_split: str | None = option(None, "Validation rows of a hub data set, such as train[-100:].")
    test_split: str | None = option(None, "Test rows of a hub data set.")
    valid_fraction: float = option(
        0.0, "Share of the training rows to set aside for validation when there is no validation split.", v.ge(0), v.lt(1)
    )
    shuffle: bool = option(True, "Shuffle the rows anew in every epoch.")
    token_cache: bool = option(True, "Keep the token ids of large supervised and preference data for the next run.")
    prompt_key: str = option("prompt", "Name of the field that holds the prompt.")


@group("Data")
class DataOptions(RowOptions):
    """Rows of plain text, prompts with completions, or conversations."""

    mask_prompt: bool = option(False, "Train on completions and assistant turns only.")
    train_on: Literal["all", "last"] = option(
        "all", "Assistant turns that --mask-prompt trains in a conversation or completion: all, or the last only."
    )
    text_key: str = option("text", "Name of the field that holds plain text.")
    messages_key: str = option("messages", "Name of the field that holds messages.")
    completion_key: str = option("completion", "Name of the field that holds the completion.")
    packing: bool = option(
        False, "Fill each training row with several examples that do not see each other; --batch-size counts packed rows."
    )

    def __attrs_post_init__(self) -> None:
        if self.train_on == "last" and not self.mask_prompt:
            raise InputError("--train-on last chooses among assistant turns; add --mask-prompt, which trains these alone")


@group("Data")
class GroupOptions(RowOptions):
    """Rows in which several completions have one prompt."""

    share_prompts: bool | None = option(None, "Compute a prompt once for all of its completions; default: where that is faster.")


@group("Data")
class PairData(GroupOptions):
    """Rows of a prompt, a chosen and a rejected completion."""

    prompt_truncation: Literal["right", "left"] = option(
        "right",
        "For pairs that are too long: drop pairs whose prompt leaves no room (right), or cut the prompt's beginning (left).",
    )


@group("Data")
class PromptData(GroupOptions):
    """Rows of prompts, whose completions are sampled."""

    answer_key: str = option("answer", "Name of the field that rewards read as the answer.")
    system: str | None = option(None, "System message for rows that have none.")
    use_prompt: bool = option(False, "Also count the prompt's tokens in the loss.")
