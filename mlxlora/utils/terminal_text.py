"""Text from outside on its way to a terminal, a log or an error message."""

from ..errors import printable as printable
