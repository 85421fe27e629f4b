"""Text from outside on its way to a terminal, a log or an error message."""

import re

_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escapes what a terminal would obey: control characters, changes of direction, halves of characters; keeps tabs and line ends.

    >>> printable("a" + chr(27) + "[31m")
    'a\\\\x1b[31m'
    """
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
