"""A chat template of the user, and variables for templates: they belong to the tokenizer, so every reader of it uses them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.given import PathOrName
from ..config.options import BaseOptions
from ..errors import InputError, reason
from .template_habits import template_args

TEMPLATE_FILE = "chat_template.jinja"
"""Where a folder has the template, as transformers names it."""

_MOST = 1 << 20  # bytes of a template


def use_template(tokenizer: Any, options: BaseOptions) -> None:
    """Gives a tokenizer the chat template and the variables that options name.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        options: `chat_template` and `chat_template_args`.

    Raises:
        InputError: the file cannot be read, or is no template.
    """
    if options.chat_template is not None:
        inner = tokenizer._tokenizer
        inner.chat_template = template_text(options.chat_template)
        tokenizer._chat_template, tokenizer.has_chat_template = None, True
    if options.chat_template_args is not None:
        template_args(tokenizer).clear()
        template_args(tokenizer).update(options.chat_template_args)


def template_text(given: PathOrName) -> str:
    """The template in a file, or the one that Python passes as text.

    Raises:
        InputError: there is no such file, or it has no template.

    >>> template_text("{{ messages }}")
    '{{ messages }}'
    """
    from jinja2 import Environment, TemplateSyntaxError

    text, place = str(given), "--chat-template"
    if not _is_template(text):
        file, place = Path(text), f"--chat-template {text}"
        if not file.is_file():
            raise InputError(f"{place}: no such file; name a Jinja file, such as {TEMPLATE_FILE} of a model")
        try:
            text = file.read_bytes()[: _MOST + 1].decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{place}: cannot be read: {reason(error)}") from None
        if len(text) > _MOST or not _is_template(text):
            raise InputError(f"{place}: is no Jinja template of up to {_MOST:,} bytes; it must read `messages`")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        if "unknown tag" not in str(error):  # transformers adds tags of its own, such as `generation`
            raise InputError(f"{place}:{error.lineno}: is not Jinja: {reason(error)}") from None
    return text


def _is_template(text: str) -> bool:
    return "{{" in text or "{%" in text


def fixed_template(options: BaseOptions) -> BaseOptions:
    """The options of a template with its text in place of its file, which may change while a run trains."""
    text = None if options.chat_template is None else template_text(options.chat_template)
    return BaseOptions(chat_template=text, chat_template_args=options.chat_template_args)


def stored_template(options: BaseOptions, folder: Path) -> Mapping[str, Any]:
    """What the configuration of adapters says of the template that a run used; the template itself goes beside it."""
    file = folder / TEMPLATE_FILE
    if options.chat_template is None:
        file.unlink(missing_ok=True)
    else:
        file.write_text(template_text(options.chat_template), encoding="utf-8")
    return {"chat_template_args": dict(options.chat_template_args)} if options.chat_template_args else {}


def template_of_run(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options `chat_template` and `chat_template_args` with which adapters were trained.

    Raises:
        InputError: the configuration is damaged.
    """
    file, given = folder / TEMPLATE_FILE, config.get("chat_template_args")
    if given is not None and not isinstance(given, dict):
        raise InputError(f"{folder}/adapter_config.json: chat_template_args must be an object, got {given!r:.60}")
    return {"chat_template": file if file.is_file() else None, "chat_template_args": given}
