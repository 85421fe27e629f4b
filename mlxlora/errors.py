"""What a user sees instead of a traceback: one line that says what is wrong, where, the value and the remedy."""


class InputError(ValueError):
    """Bad usage or bad data (exit code 2): the message names the file and line, the value and the remedy."""


class RunError(RuntimeError):
    """A run that could not go on through no fault of its input (exit code 1), such as a non-finite loss."""


class SharedError(RunError):
    """A failure that every rank of a distributed run meets, so that only rank 0 says it."""
