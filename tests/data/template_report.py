"""Compares our masks with the `{% generation %}` marks of training templates: python -m tests.data.template_report FOLDER.

The folder holds pairs NAME.jinja and NAME_training.jinja, as `trl/chat_templates` has them. Each conversation is rendered by the
marked template. Its marks are one answer to which tokens are trained; ours comes from the same template without its marks.
"""

import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from mlxlora.data.chat_template import assistant_turns
from mlxlora.data.template_habits import Template, adapted, habits
from mlxlora.errors import InputError

from ..support.chat import chat_tokenizer, trained_texts

_MARK = re.compile(r"\{%(-?)\s*(?:end)?generation\s*(-?)%\}")
_SUFFIX = "_training.jinja"


def _user(content: str) -> dict:
    return {"role": "user", "content": content}


def _answer(content: str, **more: Any) -> dict:
    return {"role": "assistant", "content": content, **more}


def _call(*zones: str) -> dict:
    functions = [{"name": "now", "arguments": {"zone": zone}} for zone in zones]
    return _answer("", tool_calls=[{"type": "function", "id": f"call0000{i}", "function": f} for i, f in enumerate(functions)])


def _tool(content: str) -> dict:
    return {"role": "tool", "name": "now", "tool_call_id": "call00000", "content": content}


_SYSTEM = {"role": "system", "content": "Be brief."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time.",
            "parameters": {
                "type": "object",
                "properties": {"zone": {"type": "string", "description": "A zone."}},
                "required": ["zone"],
            },
        },
    }
]
_ASKED = [_user("t?"), _call("UTC")]
CONVERSATIONS: dict[str, tuple[list[dict], list[dict] | None]] = {
    "one turn": ([_user("Hi"), _answer("Hello")], None),
    "two turns": ([_user("Hi"), _answer("Hello"), _user("Bye"), _answer("Ciao")], None),
    "repeated": ([_user("Hi"), _answer("Hi")] * 3, None),
    "system": ([_SYSTEM, _user("Hi"), _answer("Hello"), _user("Bye"), _answer("Ciao")], None),
    "question last": ([_user("Hi"), _answer("Hello"), _user("Bye")], None),
    "lines": ([_user("a\n\nb"), _answer("\n1. é\n\n2. 日本 🙂\n"), _user("c"), _answer("d ")], None),
    "reasoning": ([_user("Hi"), _answer("Hello", reasoning_content="Hm.")], None),
    "reasoning twice": ([_user("a"), _answer("b", reasoning_content="c"), _user("d"), _answer("e", reasoning_content="f")], None),
    "reasoning in content": (
        [_user("a"), _answer("<think>\nb\n</think>\n\nc"), _user("d"), _answer("<think>\ne\n</think>\n\nf")],
        None,
    ),
    "call": (_ASKED, TOOLS),
    "call, answer": ([*_ASKED, _tool("12"), _answer("Noon")], TOOLS),
    "two calls": ([_user("t?"), _call("a", "b"), _tool("1"), _tool("2"), _answer("3")], TOOLS),
    "call, question": ([*_ASKED, _tool("12"), _answer("Noon"), _user("Thanks"), _answer("Bye")], TOOLS),
}


class Compared(NamedTuple):
    """What the marks and we train in one conversation; `ours` is an error's text where we refuse it."""

    marked: list[str]
    ours: list[str] | str


def compared(marked: str, messages: list[dict], tools: list[dict] | None) -> Compared | None:
    """Both answers for a conversation; None if the template rejects it."""
    source = _MARK.sub(lambda mark: f"{{%{mark[1]} {'endif' if 'end' in mark[0] else 'if true'} {mark[2]}%}}", marked)
    tokenizer = chat_tokenizer(source)
    inner: Any = tokenizer._tokenizer
    chat = adapted(messages, habits(Template(inner, source)))
    try:
        out = inner.apply_chat_template(
            chat, tools=tools, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
    except Exception:  # a template may raise anything
        return None
    theirs = trained_texts(list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]], tokenizer)
    try:
        ids, mask = assistant_turns(tokenizer, messages, "row", tools=tools)
    except InputError as error:
        return Compared(theirs, str(error))
    return Compared(theirs, trained_texts(ids, mask, tokenizer))


def differences(found: Compared) -> list[str]:
    """In a few words how two answers differ; empty if they agree."""
    theirs, ours = found
    if isinstance(ours, str):
        return [f"refused: {ours.partition('template ')[2].partition(';')[0]}"]
    if len(theirs) != len(ours):
        return [f"{len(theirs)} parts marked, {len(ours)} ours"]
    return [_difference(a, b) for a, b in zip(theirs, ours, strict=True) if a != b]


def _difference(marked: str, ours: str) -> str:
    if marked.endswith(ours):
        return f"{marked[: len(marked) - len(ours)]!r} is the prompt's, and marked"
    if ours.startswith(marked):
        return f"{ours[len(marked) :]!r} ends the turn, and is not marked"
    return "calls, which the template drops, are text of ours" if '"name"' in ours else f"{marked!r} marked, {ours!r} ours"


def main(folder: Path) -> None:
    """Prints a line a template."""
    total = Counter()
    for file in sorted(folder.glob(f"*{_SUFFIX}")):
        template, reasons = file.read_text(encoding="utf-8"), set()
        results = [compared(template, messages, tools) for messages, tools in CONVERSATIONS.values()]
        told = [differences(found) for found in results if found is not None]
        agreed = sum(not one for one in told)
        reasons = dict.fromkeys(reason for one in told for reason in one)
        refused = sum(any(reason.startswith("refused") for reason in one) for one in told)
        total.update(cases=len(told), agreed=agreed, refused=refused)
        print(f"| {file.name.removesuffix(_SUFFIX)} | {agreed} of {len(told)} | {'; '.join(reasons)} |")
    print(dict(total))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
