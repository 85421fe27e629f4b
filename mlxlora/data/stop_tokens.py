"""The tokens at which generation stops: one set for training, preview, rollouts, generation and saved models."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, listed, quoted, reason
from ..utils.time_limit import TooLong, at_most
from .chat_template import RENDER_SECONDS, check_template
from .template_habits import template_of, turn_end
from .tokenize import Example

_FILE = "generation_config.json"


def stop_tokens(tokenizer: Any, folder: Path | None = None, extra: Iterable[str] = ()) -> frozenset[int]:
    """The ids of the tokens at which generation stops.

    These are the tokenizer's, those of generation_config.json, else of config.json, those with which the chat template ends an
    assistant's turn, and `extra` ones.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        folder: the model's; None: no files are read.
        extra: tokens, or their ids, as --eos-token gives them.

    Raises:
        InputError: an extra token is not one token of the vocabulary.
    """
    configured = _configured(folder / _FILE) or _configured(folder / "config.json") if folder else set()
    added = {_token_id(tokenizer, token) for token in extra}
    return frozenset({*tokenizer.eos_token_ids, *configured, *template_stops(tokenizer), *added})


def use_stop_tokens(tokenizer: Any, folder: Path | None = None, extra: Iterable[str] = ()) -> None:
    """Makes a tokenizer stop at `stop_tokens`; mlx-lm's generation and ours read it there.

    Raises:
        InputError: an extra token is not one token of the vocabulary.
    """
    tokenizer.eos_token_ids = set(stop_tokens(tokenizer, folder, extra))


def template_stops(tokenizer: Any) -> frozenset[int]:
    """The tokens with which the chat template ends an answer, and one with calls; empty if there are none."""
    if not tokenizer.has_chat_template:
        return frozenset()
    try:
        check_template(tokenizer, "")
        with at_most(RENDER_SECONDS):
            template = template_of(tokenizer)
            ends = [turn_end(template, calls) for calls in (False, True)] if template else []
    except (InputError, TooLong, ValueError):  # rows that the template renders report the error
        return frozenset()
    return frozenset(token for end in ends for token in (end.own, end.following) if token is not None)


def _configured(file: Path) -> set[int]:
    """The `eos_token_id` of a configuration; empty if there is none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: is not JSON: {reason(error)}; repair or remove it") from error
    value = config.get("eos_token_id") if isinstance(config, dict) else None
    return {token for token in (value if isinstance(value, list) else [value]) if type(token) is int}


def _token_id(tokenizer: Any, token: str) -> int:
    token_id = int(token) if token.isdecimal() and int(token) < len(tokenizer) else tokenizer.get_vocab().get(token)
    if token_id is None:
        raise InputError(
            f"--eos-token {token}: not a token of the model's vocabulary; name one token, such as <|im_end|>, or its id"
        )
    return token_id


def write_stop_tokens(folder: Path, tokenizer: Any) -> None:
    """Writes a tokenizer's stop tokens into the generation_config.json of a model folder; its other keys stay."""
    file = folder / _FILE
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    stops = sorted(tokenizer.eos_token_ids)
    if stops and set(stops) != _configured(file):
        file.write_text(json.dumps({**config, "eos_token_id": stops}, indent=2) + "\n", encoding="utf-8")


def stops_told(tokenizer: Any) -> str:
    """The stop tokens of a tokenizer, for a message.

    For example "generation stops at '<|im_end|>' (2)".
    """
    stops = sorted(tokenizer.eos_token_ids)
    if not stops:
        return "generation stops at no token, only at --max-tokens; --eos-token names one"
    return "generation stops at " + listed(f"{quoted(tokenizer.decode([token]))} ({token})" for token in stops)


def never_stops(examples: Sequence[Example], tokenizer: Any) -> bool:
    """Whether no example has a stop token among its trained tokens, so that the model does not learn to end an answer."""
    stops = tokenizer.eos_token_ids
    return not any(token in stops for example in examples for token in example.tokens[example.loss_mask].tolist())
