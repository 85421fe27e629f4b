"""Processes that start with everything imported, which costs each 1.4 s of CPU time otherwise, and with few rows of the starter.

A server imports the packages once and forks for every process. `programs()` is a folder with stand-ins for `python`, `mlxlora`
and mlx-lm's commands: each passes its arguments, folder, environment and open files to the server, hands on the signals that it
gets (SIGTSTP stops the process), and ends as its process ends. A stand-in that is killed takes its process with it.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = ("mlxlora.methods", "mlxlora.training.session", "mlxlora_cli", "mlx_lm", "mlx_lm.generate", "transformers")
WARM = hasattr(os, "pidfd_open")
"""Whether this system can wait for a process and a socket at once (Linux); elsewhere processes start as usual."""
PYTHON = "python"

STAND_IN = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
request = json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
server.sendall(request)
code = int.from_bytes(server.recv(4), "big", signed=True)
if code < 0:
    if code != -signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@cache
def programs() -> Path:
    """A folder for the front of PATH; the server ends with the process that asks first."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(rmtree, folder, ignore_errors=True)
    path, names = str(folder / "socket"), [PYTHON, *_commands()]
    command = [sys.executable, "-c", "import sys; from tests.support.warm import serve; serve(sys.argv[1])", path]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    atexit.register(server.communicate)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    for name in names:
        (folder / name).write_text(STAND_IN.format(python=sys.executable, path=path), encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


def python() -> str:
    """What starts Python: the stand-in, or the interpreter where there can be none."""
    return str(programs() / PYTHON) if WARM else sys.executable


def search_path() -> str:
    """PATH with the stand-ins and the commands beside this interpreter in front."""
    return os.pathsep.join([*([str(programs())] if WARM else []), str(Path(sys.executable).parent), os.environ["PATH"]])


def ended(process: subprocess.Popen[bytes], seconds: int) -> int:
    """The exit code of a process with a pipe at its standard input, once nobody reads that any more.

    A process whose stand-in was killed ends a little after it.
    """
    code = process.wait(seconds)
    assert process.stdin is not None
    with process.stdin:
        poll = select.poll()
        poll.register(process.stdin, 0)  # for errors alone
        poll.poll(1000 * seconds)
    return code


def _commands() -> dict[str, str]:
    """Names of commands and the functions that they call."""
    return {
        point.name: point.value for point in entry_points(group="console_scripts") if point.name.startswith(("mlxlora", "mlx_lm."))
    }


def serve(path: str) -> None:
    """Forks a process for every request until standard input ends; it returns, or raises, in these processes alone."""
    from mlxlora.utils.blas import load_fast_blas

    load_fast_blas()
    for name in IMPORTED:
        import_module(name)
    import_module("tests.support.starter").with_few_rows(Path(path).parent / "starter")
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    os.write(1, b"ready\n")
    while listener in select.select([listener, 0], [], [])[0]:
        request, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _handle(request)
            return
        request.close()
    os._exit(0)


def _handle(request: socket.socket) -> None:
    """Runs in a process of its own, which stays behind as the parent of the one that was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, files, *_ = socket.recv_fds(request, 8, 3)
    program, arguments, folder, environment = json.loads(_received(request, int.from_bytes(header, "big")))
    child = os.fork()
    if child == 0:
        request.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        _reopen()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _become(program, arguments)
        sys.exit()
    for file in (0, 1, 2, *files):
        os.close(file)
    ended = os.pidfd_open(child)
    while ended not in select.select([request, ended], [], [])[0]:
        for number in request.recv(16) or [signal.SIGKILL]:  # nothing: the stand-in was killed
            os.kill(child, signal.SIGSTOP if number == signal.SIGTSTP else number)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        request.sendall(code.to_bytes(4, "big", signed=True))
    finally:
        os._exit(0)


def _reopen() -> None:
    """Python's own streams know whether their files can seek or are a terminal, as they were when Python started."""
    sys.stdin = sys.__stdin__ = os.fdopen(0, encoding="utf-8")
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", encoding="utf-8")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace")


def _received(request: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        content += request.recv(size - len(content))
    return content


def _become(program: str, arguments: Sequence[str]) -> None:
    """Does what Python does with a command line."""
    sys.path.remove("")
    if program != PYTHON:
        module, _, function = _commands()[program].partition(":")
        sys.argv = [program, *arguments]
        sys.exit(getattr(import_module(module), function)())
    first, *rest = arguments
    if first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [*arguments]
        runpy.run_path(first, run_name="__main__")
