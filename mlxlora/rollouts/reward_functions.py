r"""Built-in rewards: exact answers, formats, and penalties on length and repetition.

Each entry of `BUILT_IN` is a factory: its options give a reward function. A reward function takes keyword lists with one entry
for each completion (`completions`, `completion_ids`, columns of the data) and returns a number for each completion, or None
where it does not apply.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

from ..errors import InputError

Reward = Callable[..., list[float | None]]
TextOrMessages = str | Sequence[dict[str, Any]]

_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)(?:/[0-9]+)?"
_NUMBER = re.compile(rf"[-+]?{_DECIMAL}")
_NUMBER_IN_TEXT = re.compile(rf"(?<![^\W_])(?:(?<!\))[-+])?[$€£]?{_DECIMAL}")  # the minus of 10-3 and (a)-3 is not a sign
_HASHES = re.compile(r"(?<!#)####(?!#)([^\n]*)")
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_DECORATION = re.compile(r"\\text\{([^{}]*)\}|\\(?:left|right)(?![a-zA-Z])|\\[,!;]")
_STRICT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def text_of(completion: TextOrMessages) -> str:
    """The text of a completion: the string itself, or the content of its last message.

    >>> text_of([{"role": "assistant", "content": "72"}])
    '72'
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # a message in parts
        return "".join(part.get("text") or "" for part in content)
    return content or ""


def marked_answers(text: str) -> Iterator[str]:
    r"""The marked answers of a text: that of the last `\boxed{}`, of the last `<answer>` and of the last `####`.

    >>> list(marked_answers("6 * 12\n#### 72"))
    ['72']
    """
    boxed = _braced(text, text.rfind(r"\boxed{") + len(r"\boxed")) if r"\boxed{" in text else None
    if boxed is not None:
        yield boxed.strip()
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start >= 0:
        yield text[start + len("<answer>") : end].strip()
    if hashes := _HASHES.findall(text):
        yield hashes[-1].strip()


def _braced(text: str, start: int) -> str | None:
    """The text between the brace at `start` and the one that closes it; None if none does."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + 1 : position]
    return None


def normalized(text: str) -> str:
    r"""An answer without typography: currency, percent, spaces, capitals, `\text{}`, a final full stop.

    >>> normalized(r" $\dfrac{1}{2}$. ")
    '1/2'
    """
    text = _DECORATION.sub(r"\1", text.replace("−", "-").replace("\\%", "%").replace("\\$", "$"))
    text = " ".join(re.sub(r"(?<=[-+])[$€£]", "", _FRACTION.sub(r"\1/\2", text)).split())
    return text.strip("$€£% ").rstrip("$€£%. ").casefold()


def number(text: str) -> Fraction | None:
    """The exact value of a text that is a number, with thousands separators, currency or a fraction; None for other texts.

    >>> number("$1,234.50") == 1234.5, number("-3/4") == -0.75, number("72 apples")
    (True, True, None)
    """
    plain = normalized(text)
    if not _NUMBER.fullmatch(plain):
        return None
    try:
        above, _, below = plain.replace(",", "").partition("/")
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):  # thousands of digits; x/0
        return None


def last_number(text: str) -> Fraction | None:
    """The last number in a text, None if there is none.

    >>> int(last_number("20 / 4 = 5 apples."))
    5
    """
    found = _NUMBER_IN_TEXT.findall(text.replace("−", "-").replace("\\$", "$"))
    return number(found[-1]) if found else None


def same_answer(text: str, answer: str) -> bool:
    r"""Whether the first marked answer (without one, the whole text) equals `answer`; two numbers are compared by value.

    >>> same_answer(r"so \boxed{\frac{1}{2}}", "0.5"), same_answer("about 72", "72")
    (True, False)
    """
    said = next(marked_answers(text), text)
    value, wanted = number(said), number(answer)
    return normalized(said) == normalized(answer) if value is None or wanted is None else value == wanted


def loosely_same_answer(text: str, answer: str) -> bool:
    """As `same_answer`, but if `answer` is a number, the last number of a marked answer or of the text may match.

    >>> loosely_same_answer("about 72 clips.", "72")
    True
    """
    wanted = number(answer)
    if wanted is None:
        return same_answer(text, answer)
    return next((value for place in (*marked_answers(text), text) if (value := _value(place)) is not None), None) == wanted


def _value(text: str) -> Fraction | None:
    whole = number(text)
    return last_number(text) if whole is None else whole


def _accuracy(same: Callable[[str, str], bool], score: float) -> Reward:
    def reward(completions: list[TextOrMessages], answer: list[Any]) -> list[float | None]:
        return [_judge(text_of(c), a) for c, a in zip(completions, answer, strict=True)]

    def _judge(text: str, answer: Any) -> float | None:
        if answer is None or answer == "":
            return None
        return score * same(text, next(marked_answers(str(answer)), str(answer)))

    return reward


def answer_accuracy(score: float = 1.0) -> Reward:
    r"""`score` if the answer in `\boxed{}`, in `<answer>`, after `####` or as the last number is right; None without `answer`.

    >>> answer_accuracy()(completions=["6 * 12 is 72."], answer=["The product.\n#### 72"])
    [1.0]
    """
    return _accuracy(loosely_same_answer, score)


def accuracy_strict(score: float = 1.0) -> Reward:
    """As `accuracy`, but the answer must be marked or be the whole completion."""
    return _accuracy(same_answer, score)


def _judged(good: Callable[[str], bool], score: float) -> Reward:
    """`score` for each text with good(text), else 0."""

    def reward(completions: list[TextOrMessages]) -> list[float | None]:
        return [score if good(text_of(completion)) else 0.0 for completion in completions]

    return reward


def integer(score: float = 1.0) -> Reward:
    """`score` if the marked answer (without one, the whole text) is an integer."""
    return _judged(lambda text: re.fullmatch(r"[-+]?[0-9]+", next(marked_answers(text), text).strip()) is not None, score)


def format_strict(score: float = 1.0) -> Reward:
    """`score` if the whole completion is `<think>…</think><answer>…</answer>`, each tag once and no part empty.

    >>> format_strict()(completions=["<think>6*12</think> <answer>72</answer>", "Sure! <think>6*12</think> 72"])
    [1.0, 0.0]
    """
    return _judged(_strict_format, score)


def _strict_format(text: str) -> bool:
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    match = _STRICT.fullmatch(text)
    return match is not None and all(part.strip() for part in match.groups())


def format_soft(score: float = 1.0) -> Reward:
    """`score` if the four tags occur in order, with text in both pairs."""
    return _judged(_soft_format, score)


def _soft_format(text: str) -> bool:
    places = [text.find(tag) for tag in _TAGS]
    if places[0] < 0 or places != sorted(set(places)):
        return False
    starts = [place + len(tag) for place, tag in zip(places, _TAGS, strict=True)]
    return bool(text[starts[0] : places[1]].strip() and text[starts[2] : places[3]].strip())


def think_format(score: float = 1.0) -> Reward:
    """`score` if a completion starts with its only `<think>` and closes it (TRL's think_format_reward)."""
    return _judged(lambda text: text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text, score)


def tag_count(score: float = 1.0, tail: float = 0.001) -> Reward:
    """A quarter of `score` for each of the four tags that occurs once, minus `tail` for each character after the last; >= 0."""

    def reward(completions: list[TextOrMessages]) -> list[float | None]:
        return [max(0.0, score * _tags(text) - tail * _tail(text)) for text in map(text_of, completions)]

    return reward


def _tags(text: str) -> float:
    return sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


def _tail(text: str) -> int:
    return len(text.rpartition("</answer>")[2])


def regex(pattern: str, score: float = 1.0) -> Reward:
    r"""`score` if the regular expression is found; `.` matches line ends too, `\A` and `\Z` anchor the whole text."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise InputError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return _judged(lambda text: compiled.search(text) is not None, score)


def _per_length(value: Callable[[int], float]) -> Reward:
    def reward(completion_ids: list[list[int]]) -> list[float | None]:
        return [value(len(ids)) for ids in completion_ids]

    return reward


def length_penalty(max_length: int, score: float = -1.0) -> Reward:
    """score · min(|y| / max_length, 1), a cost for each token; lengths in tokens."""
    _at_least("max_length", max_length, 1)
    return _per_length(lambda tokens: score * min(tokens / max_length, 1.0))


def soft_overlong(max_length: int, cache: int) -> Reward:
    """DAPO's soft overlong punishment, eq. 13 (arXiv 2503.14476); lengths in tokens.

    R(y) = 0 if |y| ≤ max_length − cache;  ((max_length − cache) − |y|) / cache if |y| ≤ max_length;  else −1

    >>> soft_overlong(max_length=100, cache=20)(completion_ids=[[0] * 80, [0] * 90, [0] * 101])
    [0.0, -0.5, -1.0]
    """
    _at_least("max_length", max_length, 1)
    _at_least("cache", cache, 0)
    free = max_length - cache
    return _per_length(lambda tokens: 0.0 if tokens <= free else max(-1.0, (free - tokens) / cache) if cache else -1.0)


def repetition(ngram_size: int = 3, max_penalty: float = -1.0) -> Reward:
    """max_penalty · (1 − unique n-grams / n-grams) of the token ids (arXiv 2502.03373, appendix C.2).

    >>> repetition(ngram_size=2)(completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]])
    [0.0, -0.75]
    """
    _at_least("ngram_size", ngram_size, 1)

    def reward(completion_ids: list[list[int]]) -> list[float | None]:
        return [max_penalty * share if (share := _repeated(ids, ngram_size)) else 0.0 for ids in completion_ids]

    return reward


def _repeated(ids: Sequence[int], size: int) -> float:
    """The share of n-grams that repeat an earlier one; 0 without n-grams."""
    ngrams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise InputError(f"{name} must be >= {bound}, got {value}")


_FACTORIES: Iterable[Callable[..., Reward]] = (
    accuracy_strict, integer, format_strict, format_soft, think_format, tag_count, regex,
    repetition, soft_overlong,
)  # fmt: skip

BUILT_IN: dict[str, Callable[..., Reward]] = {
    **{factory.__name__: factory for factory in _FACTORIES},
    "format": format_strict,
    "accuracy": answer_accuracy,
    "length": length_penalty,
    # TRL's and open-r1's names
    "accuracy_reward": answer_accuracy,
    "format_reward": format_strict,
    "think_format_reward": think_format,
    "tag_count_reward": tag_count,
    "repetition_penalty_reward": repetition,
    "soft_overlong_punishment_reward": soft_overlong,
    # mlx-lm-lora's names, with its scores
    "r1_accuracy_reward_func": partial(accuracy_strict, score=2.0),
    "r1_int_reward_func": partial(integer, score=0.5),
    "r1_strict_format_reward_func": partial(format_strict, score=0.5),
    "r1_soft_format_reward_func": partial(format_soft, score=0.5),
    "r1_count_xml": partial(tag_count, score=0.5),
}

PATTERNED = frozenset({"regex"})
"""Built-in rewards that match a regular expression of the user, which may take forever."""
