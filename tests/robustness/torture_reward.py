"""A reward of torture.py: how many characters a text has. With `{"reward": ["ends", 5]}` in $TORTURE the fifth call differs."""

import json
import os
import re
import sys

ACT, AT = json.loads(os.environ.get("TORTURE", "{}")).get("reward", ("", 0))
calls: list[int] = []


def mine(completions: list[str], **_: object) -> list[float]:
    calls.append(len(completions))
    if len(calls) == AT:
        {"raises": _raise, "ends": lambda: os._exit(3), "holds": lambda: re.match(r"(a+)+$", "a" * 60 + "b")}[ACT]()
    return [float(len(set(text))) for text in completions]


def _raise() -> None:
    sys.exit("no network")
