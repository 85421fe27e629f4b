"""Models as rewards: a reward model scores each completion, a judge prefers one of two."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from attrs import frozen

from ..data.chat_template import rendering
from ..data.tokenize import check_ids
from ..errors import InputError, reason
from ..models.config_check import check_model_config
from ..models.modes import vocabulary
from ..utils.paths import checked_path
from ..utils.safetensors import check_header
from ..utils.trust import check_model_code
from .reward_functions import TextOrMessages
from .rewards import NamedReward

_TOGETHER = 8  # texts of similar length that a reward model reads together, padded on the right

QUESTION = """Which answer is better? Reply with the letter A or B alone.

# Question
{prompt}

# Answer A
{first}

# Answer B
{second}
"""


@frozen(eq=False)
class _Reader:
    """A model that is not the policy, and the tokens that it can read.

    Attributes:
        flag: the option that names it.
        run: tokens [R, T] to hidden states [R, T, D] or logits [R, T, V].
        tokenizer: of the model.
        size: how many tokens have an embedding.
    """

    flag: str
    run: Callable[[mx.array], mx.array]
    tokenizer: Any
    size: int

    def __call__(self, rows: Sequence[list[int]]) -> mx.array:
        """Of rows, padded on the right."""
        longest = max(map(len, rows))
        for row in rows:
            check_ids(np.array(row), self.flag, self.size, self.tokenizer)
        return self.run(mx.array([row + [0] * (longest - len(row)) for row in rows]))


def reward_model(folder: str) -> NamedReward:
    """A sequence classifier with one label as a reward: w·h, h the last hidden state of the conversation.

    Args:
        folder: a `...ForSequenceClassification` model whose backbone mlx-lm supports, with the weight `score.weight`.

    Raises:
        InputError: there is no such model, or it has no such weight.
    """
    from mlx_lm.utils import load_model
    from mlx_lm.utils import load_tokenizer as tokenizer_of

    path = checked_path(folder, "--reward-model")
    check_model_code(path, f"--reward-model {folder}", trusted=None)
    check_model_config(path / "config.json", f"--reward-model {folder}")
    head = _score_weight(path)
    try:
        model: Any = load_model(path, strict=False)[0]
        tokenizer = tokenizer_of(path, {"trust_remote_code": False})
    except Exception as error:  # any file of the model may be wrong, and the message says how
        raise InputError(f"--reward-model {folder}: cannot be loaded: {reason(error)}") from error
    model.freeze().eval()
    backbone = model.model if hasattr(model, "model") else model.backbone
    mx.eval(model.parameters(), head)
    reader = _Reader(f"--reward-model {folder}", backbone, tokenizer, vocabulary(model))
    return NamedReward("reward_model", partial(_scored, reader, head))


def judge(model: nn.Module, tokenizer: Any) -> NamedReward:
    """A chat model as a judge: the reward of a completion is the probability that it is preferred to the other of its prompt.

    This is the probability of the letter A against B as the next token of the model, averaged over both orders, so that the
    order has no effect. Completions come in pairs, the two of a prompt next to each other.

    Raises:
        InputError: the tokenizer has no chat template, or no single tokens for A and B.
    """
    if not tokenizer.has_chat_template:
        raise InputError("--judge-model: its tokenizer has no chat template; the judge needs one, so use a chat model")
    letters = [tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"]
    if any(len(ids) != 1 for ids in letters):
        raise InputError("--judge-model: its tokenizer has no single tokens for A and B; use another model")
    model.freeze().eval()
    mx.eval(model.parameters())
    reader = _Reader("--judge-model", model, tokenizer, vocabulary(model))
    return NamedReward("judge", partial(_judged, partial(_first_preferred, reader, [ids[0] for ids in letters])))


def text_of_turns(value: Any) -> str:
    """A prompt or completion as text: the contents of its messages.

    >>> text_of_turns([{"role": "user", "content": "Hi"}])
    'Hi'
    """
    return value if isinstance(value, str) else "\n".join(str(message["content"]) for message in value)


def _judged(
    chance: Callable[[str, str, str], float], prompts: Sequence[TextOrMessages], completions: Sequence[Any]
) -> list[float | None]:
    found: list[float | None] = []
    for prompt, first, second in zip(prompts[::2], completions[::2], completions[1::2], strict=True):
        question, *answers = (text_of_turns(value) for value in (prompt, first, second))
        preferred = (chance(question, *answers) + 1 - chance(question, *answers[::-1])) / 2
        found += [preferred, 1 - preferred]
    return found


def _first_preferred(reader: _Reader, letters: list[int], prompt: str, first: str, second: str) -> float:
    question = QUESTION.format(prompt=prompt, first=first, second=second)
    asked = [{"role": "user", "content": question}]
    with rendering(reader.tokenizer, "--judge-model"):
        ids = reader.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    logits = reader([list(ids)])[0, -1].astype(mx.float32)
    return mx.sigmoid(logits[letters[0]] - logits[letters[1]]).item()  # type: ignore[return-value]


def _scored(reader: _Reader, head: mx.array, prompts: Sequence[TextOrMessages], completions: Sequence[Any]) -> list[float | None]:
    texts = [_conversation(reader.tokenizer, *pair) for pair in zip(prompts, completions, strict=True)]
    scores: list[float | None] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for rows in (order[k : k + _TOGETHER] for k in range(0, len(order), _TOGETHER)):
        last = mx.array([len(texts[i]) - 1 for i in rows])
        hidden = reader([texts[i] for i in rows])[mx.arange(len(rows)), last]
        for i, score in zip(rows, (hidden.astype(mx.float32) @ head).tolist(), strict=True):  # type: ignore[arg-type]
            scores[i] = score
    return scores


def _conversation(tokenizer: Any, prompt: TextOrMessages, completion: Any) -> list[int]:
    """Token ids, by the chat template if there is one and the prompt is not a string."""
    if isinstance(prompt, str) or not tokenizer.has_chat_template:
        return list(tokenizer.encode(text_of_turns(prompt) + text_of_turns(completion)))
    with rendering(tokenizer, "--reward-model"):
        return list(tokenizer.apply_chat_template([*prompt, *completion], return_dict=False))


def _score_weight(path: Path) -> mx.array:
    """[D] float32."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"--reward-model {path}: not a model folder with safetensors files; give such a folder")
    found = next((a for file in files for name, a in _arrays(file).items() if name == "score.weight"), None)
    if found is None:
        raise InputError(f"--reward-model {path}: it has no score.weight; use a sequence classifier with one label")
    if found.shape[0] != 1:
        raise InputError(f"--reward-model {path}: score.weight has {found.shape[0]} labels; use a model with one")
    return found[0].astype(mx.float32)


def _arrays(file: Path) -> dict[str, mx.array]:
    check_header(file)
    loaded: Any = mx.load(str(file))
    return loaded
