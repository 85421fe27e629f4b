"""Loads a model or a tokenizer through mlx-lm."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
from attrs import evolve

from ..config.given import is_path
from ..config.options import BaseOptions, ModelOptions
from ..data.own_template import use_template
from ..data.stop_tokens import use_stop_tokens
from ..errors import InputError, described, reason
from ..utils.patches import Slot
from ..utils.paths import checked_path
from ..utils.safetensors import check_header
from ..utils.stages import downloading
from ..utils.trust import check_model_code
from .config_check import check_model_config, check_tokenizer_config
from .quantize import quantize_loaded


def load_tokenizer(options: BaseOptions) -> Any:
    """The tokenizer of a folder or hub name; weights are neither read nor downloaded.

    Raises:
        InputError: no such model.
    """
    from mlx_lm.utils import load_tokenizer as read

    tokenizer_files = ["*.json", "*.py", "tokenizer.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"]  # as mlx-lm

    def load(folder: str) -> Any:
        tokenizer = read(folder, {"trust_remote_code": options.trust_remote_code})
        use_template(tokenizer, options)
        use_stop_tokens(tokenizer, Path(folder), options.eos_token or ())
        return tokenizer

    return _loaded(options, load, tokenizer_files)


def model_options(model: str | ModelOptions) -> ModelOptions:
    """The options of a model, which may be given as a folder or hub name only."""
    return ModelOptions(model=model) if isinstance(model, str) else model


ORIGIN: Slot[ModelOptions | None] = Slot("origin", None, stays=True)
"""How a model was loaded."""


def wrapped(tokenizer: Any) -> Any:
    """mlx-lm's wrapper of a tokenizer of transformers; mlx-lm's own tokenizers stay as they are."""
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    if isinstance(tokenizer, TokenizerWrapper):
        return tokenizer
    if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "eos_token_id"):
        raise InputError(f"tokenizer must be one of mlx-lm or transformers, a folder or a hub name, got {described(tokenizer)}")
    made = TokenizerWrapper(tokenizer)
    use_stop_tokens(made)
    return made


def model_and_tokenizer(options: ModelOptions, lazy: bool = False) -> tuple[nn.Module, Any]:
    """The model and the tokenizer that options name, or the objects that they hold.

    Args:
        options: which model.
        lazy: read weights only when they are used.

    Raises:
        InputError: no such model, damaged files, a model object without its tokenizer, or no model at all.
    """
    given = options.model
    if given is None or is_path(given):
        model, tokenizer, _ = load_with_config(options, lazy)
    else:
        model, tokenizer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if not isinstance(model, nn.Module):
            raise InputError(f"model must be a folder, a hub name, a model or (model, tokenizer), got {described(given)}")
        if options.quantize:
            raise InputError(f"--quantize {options.quantize} is for models that are loaded here; quantize this one before")
    named = options.tokenizer
    if named is not None:
        tokenizer = named
    if named is not None and is_path(named):
        tokenizer = load_tokenizer(BaseOptions(model=str(named), trust_remote_code=options.trust_remote_code))
    if tokenizer is None:
        raise InputError("model is a model alone; pass its tokenizer too: model=(model, tokenizer), or tokenizer=...")
    tokenizer = wrapped(tokenizer)
    use_template(tokenizer, options)
    if options.eos_token or options.chat_template:
        use_stop_tokens(tokenizer, extra=options.eos_token or ())
    return model, tokenizer


def load_with_config(options: ModelOptions, lazy: bool = False) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The model, tokenizer and configuration of a folder or hub name.

    Args:
        options: which model.
        lazy: read weights only when they are used.

    Raises:
        InputError: no such model, or damaged files.
    """
    from mlx_lm.utils import load as load_model

    trust, form = options.trust_remote_code, options.quantize
    how: dict[str, Any] = {"tokenizer_config": {"trust_remote_code": trust}, "trust_remote_code": trust}

    def load(folder: str) -> Any:
        loaded = load_model(folder, lazy=lazy or bool(form), return_config=True, **how)
        use_template(loaded[1], options)
        use_stop_tokens(loaded[1], Path(folder), options.eos_token or ())
        return loaded

    model, tokenizer, config = _loaded(options, load)
    if form:
        model, config = quantize_loaded(model, config, form)
    ORIGIN.put(model, evolve(options, tokenizer=None))
    return model, tokenizer, config


def _loaded(options: BaseOptions, read: Callable[[str], Any], patterns: list[str] | None = None) -> Any:
    """The result of `read` on the model's folder, after checks: no code of the model runs without a flag, and headers are sound."""
    if options.model is None:
        raise InputError("--model is missing: a model folder or a hub name such as mlx-community/Qwen3-0.6B-4bit")
    model = str(options.model)
    _check_folder(model)
    flag = f"--model {model}"
    try:
        folder = _fetched(model, patterns)
        check_model_code(folder, flag, options.trust_remote_code)
        for name in ("config.json", "generation_config.json"):
            check_model_config(folder / name, flag)
        check_tokenizer_config(folder / "tokenizer_config.json", flag)
        for file in () if patterns else folder.glob("model*.safetensors"):
            check_header(file)
        return read(str(folder))
    except Exception as error:  # the hub, the network, any file of the model: users can act on all of these messages
        told = reason(error, 1000)
        if told.startswith((flag, "--eos-token", "--chat-template")):
            raise
        if "trust_remote_code" in told:
            remedy = "read it, then allow it with --trust-remote-code"
            raise InputError(f"{flag}: its tokenizer runs Python code of the model; {remedy}") from error
        raise InputError(f"{flag}: cannot be loaded: {told}") from error


def _fetched(model: str, patterns: list[str] | None) -> Path:
    """The folder of a model; one of the hub is downloaded, unless that was done before."""
    if Path(model).exists():
        return Path(model)
    from huggingface_hub import snapshot_download
    from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS

    with downloading(model) as bars:
        return Path(snapshot_download(model, allow_patterns=patterns or DEFAULT_ALLOW_PATTERNS, tqdm_class=bars))


def _check_folder(model: str) -> None:
    path = checked_path(model, "--model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"--model {model}: no config.json in this folder")
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1):
        raise InputError(f"--model {model}: no such folder, and not a hub name such as org/name")
