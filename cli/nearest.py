"""The nearest name of a command, a flag or a value that does not exist."""

import difflib
import re
from collections.abc import Sequence

from mlxlora.methods import METHODS, commands

_ELSEWHERE = {
    "train": f"a method is a command: {', '.join(METHODS)}",
    "lora": "it is `mlxlora sft`",
    "finetune": "it is `mlxlora sft`",
    "fine-tune": "it is `mlxlora sft`",
    "ppo": "`mlxlora grpo --loss-type reinforce` is nearest",
    "test": "it is `mlxlora eval`",
    "convert": "it is mlx_lm.convert",
    "server": "it is mlx_lm.server --adapter-path",
}
"""What commands of other libraries are called here."""
_COMMON = {"", "path", "type", "max", "num", "no"}


def nearest_command(name: str, known: Sequence[str]) -> str:
    """What follows a message about a command that does not exist; empty if nothing is near.

    >>> nearest_command("stf", ["sft", "dpo"]), nearest_command("xpo", ["sft"])
    ('; did you mean `mlxlora sft`?', '; it is `mlxlora online-dpo`')
    """
    if method := commands().named(name.replace("-", "_")):
        return f"; it is `mlxlora {method}`"
    if name in _ELSEWHERE:
        return f"; {_ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `mlxlora {close[0]}`?" if close else ""


def nearest_flag(flag: str, known: Sequence[str]) -> str:
    """What follows a message about a flag that does not exist; empty if none is near.

    >>> nearest_flag("--batchsize", ["--batch-size", "--rank"]), nearest_flag("--seq-length", ["--max-seq-length"])
    ('; did you mean --batch-size?', '; did you mean --max-seq-length?')
    """
    words = set(flag.strip("-").split("-")) - _COMMON
    shared = sorted(known, key=lambda name: -len(words & set(name.strip("-").split("-"))))[:8]
    akin = [name for name in shared if words & set(name.strip("-").split("-"))]
    close = difflib.get_close_matches(flag, known, n=1, cutoff=0.8) or difflib.get_close_matches(flag, akin, n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""


_OFFERED = re.compile(r"must be one of (?P<names>[^;]*?), got '(?P<given>[^']*)'$|'(?P<said>[^']*)' is not one of (?P<list>[^;]*)$")


def with_nearest(message: str) -> str:
    """A message about a value that is not among the offered ones, with the nearest of them.

    >>> with_nearest("--loss-type must be one of sigmoid, hinge, got 'sigmod'")
    "--loss-type must be one of sigmoid, hinge, got 'sigmod'; did you mean sigmoid?"
    """
    found = _OFFERED.search(message)
    if found is None:
        return message
    names = [name.strip("' ") for name in (found["names"] or found["list"]).rstrip(".").split(",")]
    close = difflib.get_close_matches(found["given"] or found["said"] or "", names, n=1)
    return f"{message}; did you mean {close[0]}?" if close else message
