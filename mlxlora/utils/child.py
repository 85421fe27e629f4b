"""Starts Python processes that end with this one, whatever ends it and whatever they do then."""

import fcntl
import os
import subprocess
import sys
from io import FileIO

from attrs import define, field

_GUARD = """
import os, signal, sys
line = int(sys.argv.pop())
if os.fork() == 0:
    if os.fork():
        os._exit(0)
    for stream in range(3):
        os.close(stream)
    os.read(line, 1)
    os.killpg(0, signal.SIGKILL)
os.close(line)
os.wait()
"""


@define(eq=False)
class Child:
    """A Python process with pipes at its standard input and output. Ctrl-C does not reach it.

    A small process waits beside it for the end of a pipe that this process holds, then kills both and what they started. So a
    child that never returns to Python, and does not see that its standard input ends, does not outlive this process. On Linux
    the kernel could send that signal (PR_SET_PDEATHSIG), but it does so as soon as the thread ends that started the child.
    """

    process: subprocess.Popen[bytes]
    _line: FileIO = field(repr=False)

    @classmethod
    def start(cls, program: str, *flags: str, stderr: int | None = None, env: dict[str, str] | None = None) -> "Child":
        """Starts a child.

        Args:
            program: source text.
            flags: of the interpreter.
            stderr: of `subprocess.Popen`.
            env: the environment; None: that of this process.
        """
        reading, writing = os.pipe()
        line = FileIO(writing, "wb")
        theirs = fcntl.fcntl(reading, fcntl.F_DUPFD_CLOEXEC, 3)  # lower ones are the child's streams
        os.close(reading)
        try:
            process = subprocess.Popen(
                [sys.executable, *flags, "-c", _GUARD + program, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(theirs,),
                start_new_session=True,
                stderr=stderr,
                env=env,
            )
        except OSError:
            line.close()
            raise
        finally:
            os.close(theirs)
        return cls(process, line)

    def kill(self) -> None:
        """Ends the child and what it started, at once."""
        self.process.kill()
        self._line.close()
