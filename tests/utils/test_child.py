"""No process that we start outlives the one that started it."""

import re
import subprocess
import sys
from pathlib import Path

import mlxlora

PARENT = """
import sys
from mlxlora.utils.child import Child

child = Child.start({program!r})
assert child.process.stdout.readline() == b"started\\n"
print(flush=True)
child.process.wait()
"""
STARTS = """
import re, subprocess, sys
subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(1000)"])
print("started", flush=True)
"""
HOLDS = "re.match('(a+)+$', 'a' * 60 + 'b')"  # which never returns to Python, and keeps its lock


def test_a_child_that_never_returns_to_python_ends_with_a_killed_parent() -> None:
    """And what it started. All of them hold the pipe of standard error, which ends with the last of them."""
    parent = [sys.executable, "-c", PARENT.format(program=STARTS + HOLDS)]
    with subprocess.Popen(parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(mlxlora.__file__).parents[1]) as process:
        assert process.stdout and process.stdout.readline() == b"\n"
        process.kill()
        assert process.communicate(timeout=60)[1] == b""


def test_processes_are_started_in_one_place() -> None:
    """The watch over ranks that arrive waits for a pipe and a clock, so it ends by itself."""
    package = Path(mlxlora.__file__).parent
    start = re.compile(r"subprocess\.(Popen|run|call|check_\w+|get\w+)\(|os\.(fork|posix_spawn|system|popen|spawn\w+)\(")
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if start.search(path.read_text(encoding="utf-8"))}
    assert files == {"utils/child.py", "distributed/watchdog.py"}
