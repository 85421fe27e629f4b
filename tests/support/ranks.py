"""Several ranks on this machine: processes that communicate over MLX's ring backend and the loopback device."""

import json
import os
import re
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from random import SystemRandom

import pytest

from tests.support.warm import python

LIMIT = 300
"""Seconds after which a test gives up on processes. It only ends tests that hang: busy machines are slow."""
TIMINGS = {"tokens_per_second", "training_tokens_per_second", "rollout_tokens_per_second", "peak_memory_gb"}

IN_ONE_PROCESS = """
import json, sys
from mlxlora_cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["mlxlora", *arguments]
    try:
        main()
    except SystemExit as stopped:
        if stopped.code:
            raise
"""


def free_ports(count):
    """Consecutive ports, below those that systems give to outgoing connections, so that they stay free until ranks listen."""
    while True:
        first = SystemRandom().randrange(10_000, 32_000)  # other tests run at the same time
        with ExitStack() as held, suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))


def environment(folder):
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    return alone | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MLXLORA_CACHE": str(folder / "cache")}


def launched(folder, ranks, script, *arguments, **variables):
    """Processes that run a script, started as mlx.launch does."""
    hosts = folder / f"hosts-{ranks}-{time.monotonic_ns()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    command = [python(), "-c", script, *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    env = environment(folder) | variables | {"MLX_HOSTFILE": str(hosts)}
    return [subprocess.Popen(command, env=env | {"MLX_RANK": str(rank)}, cwd=folder, **pipes) for rank in range(ranks)]


def start(folder, ranks, *runs, **variables):
    """Ranks that run command lines one after the other."""
    return launched(folder, ranks, IN_ONE_PROCESS, json.dumps([list(map(str, run)) for run in runs]), **variables)


def ended(processes):
    """(exit code, output) of each."""
    try:
        outputs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
    return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


def finished(processes):
    for code, output in ended(processes):
        assert code == 0, output


def own_lines(output):
    """What mlxlora printed; threads of MLX print `[ring]` lines of their own when connections break, also before ours on a line."""
    return re.findall(r"mlxlora: .*", output)


def metrics(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {(row.pop("step"), row.pop("split")): {k: v for k, v in row.items() if k not in TIMINGS} for row in rows}


def assert_same(one, several, tolerance=2e-4):
    a, b = metrics(one), metrics(several)
    assert a.keys() == b.keys()
    for place in a:
        assert a[place].keys() == b[place].keys()
        for name, value in a[place].items():
            if "accurac" in name and place[0] < 2:
                continue  # the policy is the reference: margins are rounding
            assert b[place][name] == pytest.approx(value, rel=tolerance, abs=2e-5), (place, name)


def wait_for(path, text, processes):
    deadline = time.monotonic() + LIMIT
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [p.poll() for p in processes]
        time.sleep(0.05)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*"))


def to_run(folder, methods, suffix):
    return [[*text.split(), "--adapter-path", folder / f"{name}-{suffix}"] for name, text in methods.items()]
