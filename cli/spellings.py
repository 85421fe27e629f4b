"""The spellings of other libraries, rewritten before Typer reads a command line."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mlxlora.errors import InputError, listed, plain
from mlxlora.methods import METHODS, commands

_RENAMED: Mapping[str, Mapping[str, str]] = {
    "eval": {"--test": "--split=test"},
    "fuse": {"--upload-repo": "--push-to-hub", "--de-quantize": "--dequantize"},
    "generate": {
        "--system-prompt": "--system",
        "--chat-template-config": "--chat-template-args",
        "--ignore-chat-template": "--no-use-chat-template",
        "-p": "--prompt",
        "-m": "--max-tokens",
    },
}
"""Flags of mlx-lm's commands that have another name here."""
_TRUE_OR_FALSE = ("true", "false")
_NUMBER = re.compile(r"-\d*\.?\d+([eE][-+]?\d+)?")


def spelled(command: str, params: Sequence[Any], args: Sequence[str]) -> list[str]:
    """The arguments of a command as mlxlora spells them.

    A switch may have True or False behind it; the values of a list may be several arguments; `--lora-parameters` is an object.

    Args:
        command: its name.
        params: its parameters, as click has them.
        args: what was typed.

    Raises:
        InputError: `--lora-parameters` is no object, or has an unknown key.
    """
    end = args.index("--") if "--" in args else len(args)
    rest, found = _split_equals(command, args[:end]), []
    by_flag = {flag: param for param in params for flag in param.opts}
    off = {flag for param in params for flag in (*param.opts, *param.secondary_opts) if flag.startswith("--no-")}
    while rest:
        flag = rest.pop(0)
        flag = _RENAMED.get(command, {}).get(flag, flag)
        param = by_flag.get(flag)
        if flag == "--lora-parameters" and rest and command in METHODS:
            found += _lora_parameters(rest.pop(0))
        elif flag in ("--train-type", "--fine-tune-type") and rest and commands().named(rest[0]) == command:
            rest.pop(0)  # the command says it
        elif getattr(param, "is_flag", False) and rest and rest[0].lower() in _TRUE_OR_FALSE:
            negative = f"--no-{flag[2:]}"
            found += [flag] if rest.pop(0).lower() == "true" else [negative] if negative in off else []
        elif getattr(param, "multiple", False) and command in METHODS and rest:
            found += [flag, ",".join(_values(rest))]
        else:
            found.append(flag)
    return (_gguf(found) if command == "fuse" else found) + list(args[end:])


def _split_equals(command: str, args: Sequence[str]) -> list[str]:
    """`--flag=value` as two arguments, for flags that are rewritten."""
    rewritten = {*_RENAMED.get(command, ()), "--gguf-path", "--lora-parameters"}
    return [part for arg in args for part in (arg.split("=", 1) if arg.partition("=")[0] in rewritten else [arg])]


def _values(rest: list[str]) -> list[str]:
    """Takes the values of a list: one, and those that follow without a flag before them."""
    values = [rest.pop(0)]
    while rest and (not rest[0].startswith("-") or _NUMBER.fullmatch(rest[0])):
        values.append(rest.pop(0))
    return values


def _lora_parameters(text: str) -> list[str]:
    """The flags of an object such as {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": [...]}, as JSON or YAML."""
    try:
        given = yaml.safe_load(text)
    except yaml.YAMLError:
        given = None
    if not isinstance(given, dict):
        raise InputError(f'--lora-parameters must be an object, such as {{"rank": 8, "scale": 20.0}}, got {plain(text)}')
    names = {"rank": "--rank", "scale": "--scale", "dropout": "--dropout", "keys": "--lora-keys", "alpha": ""}
    if unknown := [name for name in given if name not in names]:
        raise InputError(f"--lora-parameters has no {listed(map(str, unknown))}; it has rank, scale, dropout, keys and alpha")
    if "alpha" in given and "scale" not in given:  # beside scale it has no effect, as in mlx-lm
        given["scale"] = _quotient(given["alpha"], given.get("rank", 8))
    as_text = {name: ",".join(map(str, value)) if isinstance(value, list) else str(value) for name, value in given.items()}
    return [part for name, value in as_text.items() if names[name] for part in (names[name], value)]


def _quotient(alpha: Any, rank: Any) -> float:
    try:
        return float(alpha) / float(rank)
    except (TypeError, ValueError, ZeroDivisionError):
        raise InputError(f"--lora-parameters: alpha / rank must be a number, got {plain(alpha)} / {plain(rank)}") from None


def _gguf(args: list[str]) -> list[str]:
    """mlx-lm's `--export-gguf` with `--gguf-path`, a file in the folder of `--save-path`, as one flag."""
    if "--export-gguf" not in args and "--gguf-path" not in args:
        return args
    rest, name, folder = [arg for arg in args if arg != "--export-gguf"], "ggml-model-f16.gguf", "fused"
    if "--gguf-path" in rest[:-1]:
        place = rest.index("--gguf-path")
        name, rest = rest[place + 1], rest[:place] + rest[place + 2 :]
    for place, arg in enumerate(rest):
        folder = arg.partition("=")[2] if arg.startswith("--save-path=") else folder
        folder = rest[place + 1] if arg == "--save-path" and place + 1 < len(rest) else folder
    return [*rest, "--gguf", str(Path(folder) / name)]
