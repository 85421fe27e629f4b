"""Several processes train what one would have trained, and none outlives the others.

Ranks are processes of this machine, on the CPU, that talk through MLX's ring over the loopback device.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlora import objectives
from mlxlora.distributed.ranks import ALONE, Ranks
from mlxlora.errors import InputError
from mlxlora.objectives.cross_row import compares_rows
from mlxlora.objectives.objective import batch_mean, token_mean
from mlxlora.objectives.terms import nll
from mlxlora.starter import data_path, model_path

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend")

LAUNCHER = Path(sys.executable).with_name("mlx.launch")
TIMINGS = {"tokens_per_second", "training_tokens_per_second", "rollout_tokens_per_second", "peak_memory_gb"}
REPORTS = "--steps-per-report 1 --steps-per-eval 2 --val-batches 3 --quiet --answers 0"
EVERY_METHOD = {
    "sft": f"sft --iters 3 --batch-size 5 --grad-accumulation-steps 2 {REPORTS}",
    "dpo": f"dpo --iters 2 --batch-size 3 {REPORTS}",
    "orpo": f"orpo --iters 2 --batch-size 3 {REPORTS}",
    "cpo": f"cpo --iters 2 --batch-size 3 {REPORTS}",
    "kto": f"kto --iters 2 --batch-size 5 {REPORTS}",
    "grpo": f"grpo --iters 2 --batch-size 3 --max-completion-length 12 {REPORTS}",
}
TAUGHT = f"--model {model_path()} --teacher-model {model_path()} --num-layers -1 --learning-rate 1e-3"
MORE_METHODS = {
    "online-dpo": f"online-dpo --iters 2 --batch-size 3 --max-completion-length 12 {REPORTS}",
    "distill": f"distill {TAUGHT} --data {data_path('sft')} --iters 2 --batch-size 3 {REPORTS}",
    "gkd": f"gkd {TAUGHT} --data {data_path('grpo')} --iters 2 --batch-size 3 --max-completion-length 8 {REPORTS}",
}
WIDE = {
    "sft": f"sft --iters 2 --batch-size 3 --packing --patience 9 --keep-best --test {REPORTS}",
    "grpo": "grpo --iters 2 --num-iterations 2 --batch-size 3 --max-completion-length 12 --dynamic-sampling --baseline batch "
    f"--scale-rewards batch {REPORTS}",
}
"""More ranks than rows of a batch."""

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
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def environment(folder):
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    return alone | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MLXLORA_CACHE": str(folder / "cache")}


def start(folder, ranks, *runs, **variables):
    """Processes that run command lines one after the other; `ranks` of them as mlx.launch would start them, one if it is 1."""
    command = [sys.executable, "-c", IN_ONE_PROCESS, json.dumps([list(map(str, run)) for run in runs])]
    hosts = folder / f"hosts-{ranks}-{time.monotonic_ns()}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(ranks)]))
    told = [{"MLX_HOSTFILE": str(hosts), "MLX_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    env = environment(folder) | variables
    return [subprocess.Popen(command, env=env | own, cwd=folder, **pipes) for own in told]


def ended(processes, seconds=60):
    """(exit code, output) of each; a test never waits for longer."""
    try:
        said = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def finished(processes):
    for code, said in ended(processes):
        assert code == 0, said


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


def wait_for(path, text, processes, seconds=40):
    deadline = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [p.poll() for p in processes]
        time.sleep(0.05)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").glob("[0-9]*"))


def to_run(folder, methods, suffix):
    return [[*text.split(), "--adapter-path", folder / f"{name}-{suffix}"] for name, text in methods.items()]


# --- the same metrics ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "methods"), [(2, EVERY_METHOD), (2, MORE_METHODS), (4, WIDE)], ids=["2 ranks", "2 ranks, more methods", "4 ranks"]
)
def test_ranks_report_what_one_process_reports(tmp_path, ranks, methods):
    finished(start(tmp_path, 1, *to_run(tmp_path, methods, 1)))
    outcomes = ended(start(tmp_path, ranks, *to_run(tmp_path, methods, ranks)))
    assert [code for code, _ in outcomes] == [0] * ranks, [said for _, said in outcomes]
    assert [said for _, said in outcomes[1:]] == [""] * (ranks - 1), "only rank 0 prints"
    for name in methods:
        assert_same(tmp_path / f"{name}-1", tmp_path / f"{name}-{ranks}")


def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path):
    whole = f"sft --batch-size 6 --lr-schedule constant --warmup 0 {REPORTS}".split()

    def until(step, folder, *more):
        return [*whole, "--iters", step, "--adapter-path", tmp_path / folder, *more]

    finished(start(tmp_path, 1, until(6, "whole")))
    finished(start(tmp_path, 2, until(2, "parts")))
    finished(start(tmp_path, 1, until(4, "parts", "--resume")))
    finished(start(tmp_path, 4, until(6, "parts", "--resume")))
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not LAUNCHER.exists(), reason="no mlx.launch beside this Python")
def test_the_launcher_of_mlx_is_enough(tmp_path):
    ports = free_ports(1)
    command = [LAUNCHER, "-n", "2", "--backend", "ring", "--starting-port", ports[0], "--", sys.executable, "-m", "mlxlora_cli"]
    arguments = ["sft", "--iters", "2", *REPORTS.split(), "--adapter-path", tmp_path / "adapters"]
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapters/adapters.safetensors").exists()
    assert done.stdout.count(b"steps ") == 1


# --- when a rank ends ---------------------------------------------------------------------------

LONG = "sft --iters 100000 --steps-per-report 1 --val-batches 0 --answers 0"


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_rank_that_is_killed_ends_the_others_with_a_good_checkpoint(tmp_path, blow):
    processes = start(tmp_path, 2, [*LONG.split(), "--adapter-path", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", '"step":3', processes)
    processes[1].send_signal(blow)
    (code, said), (other, _) = ended(processes, 30)
    assert code not in (0, None) and other not in (0, None)
    (last,) = checkpoints(tmp_path / "run")
    assert f"after step {int(last)}" in said
    assert blow == signal.SIGINT or "another rank ended" in said
    finished(
        start(tmp_path, 1, [*LONG.replace("100000", str(int(last) + 1)).split(), "--resume", "--adapter-path", tmp_path / "run"])
    )


def test_the_loss_of_rank_0_is_told_by_another(tmp_path):
    processes = start(tmp_path, 2, [*LONG.split(), "--adapter-path", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", '"step":3', processes)
    processes[0].kill()
    processes[0].wait()
    processes[1].send_signal(signal.SIGTERM)  # as mlx.launch does
    _, (code, said) = ended(processes, 30)
    assert code == 1
    ours = re.findall(r"mlxlora: .*", said)  # threads of MLX print lines of their own, before ours or on the same line
    assert len(ours) == 1 and re.match(r"mlxlora: error: rank 1: .*another rank ended", ours[0]), said
    assert "Traceback" not in said


def test_a_rank_that_is_not_heard_of_does_not_keep_the_others_waiting(tmp_path):
    processes = start(tmp_path, 2, [*LONG.split(), "--adapter-path", tmp_path / "run"], MLXLORA_RANK_TIMEOUT="2")
    wait_for(tmp_path / "run/metrics.jsonl", '"step":3', processes)
    processes[1].send_signal(signal.SIGSTOP)
    code, said = ended(processes[:1], 30)[0]
    processes[1].kill()
    processes[1].communicate()
    assert code == 1
    assert "timed out after 2 s" in said
    assert len(checkpoints(tmp_path / "run")) == 1


def test_what_one_rank_cannot_do_ends_all(tmp_path):
    rewards = tmp_path / "mine.py"
    rewards.write_text(
        "import os\ncalls = []\ndef mine(prompts, completions, **_):\n    calls.append(1)\n"
        "    assert len(calls) < 3 or os.environ['MLX_RANK'] == '0', 'no network'\n    return [1.0] * len(completions)\n"
    )
    run = f"grpo --iters 9 --val-batches 0 --answers 0 --max-completion-length 8 --reward-file {rewards} --rewards mine".split()
    (code, said), (other, told) = ended(start(tmp_path, 2, [*run, "--adapter-path", tmp_path / "run"]))
    assert code != 0 and other != 0
    assert "no network" in told and "another rank ended" in said
    assert checkpoints(tmp_path / "run") == ["0000002"]


# --- what ranks add up ----------------------------------------------------------------------------

TOGETHER = """
import os, sys
import mlx.core as mx, numpy as np
from mlxlora.distributed.ranks import current_ranks
from mlxlora.errors import InputError
from mlxlora.starter import data_path, model_path
ranks = current_ranks()
r, n = ranks.rank, ranks.size
assert n == 2 and ranks.leads == (r == 0)
assert ranks.totals(0.1, r) == [0.2, 1.0]
assert [part.shape for part in ranks.gathered(np.full((2 * r, 2), np.nan))] == [(0, 2), (2, 2)]
assert ranks.listed(["a"] * (r + 1)) == ["a", "a", "a"] and ranks.of_rank0(r) == 0
assert ranks.interleaved(np.arange(5)[r::2]).tolist() == [0, 1, 2, 3, 4]
tree = {"b": mx.array([1.0, r]), "a": [mx.array(2, mx.int32), mx.ones((2, 2), mx.bfloat16)]}
found = ranks.summed(tree if r else dict(reversed(tree.items())))
assert found["b"].tolist() == [2, 1] and found["a"][0].item() == 4 and found["a"][1].dtype == mx.bfloat16
assert ranks.from_first(mx.array([r + 7])).item() == 7
mx.random.seed(1)
before = mx.random.uniform().item()
with ranks.own_rng():
    own = [mx.random.uniform().item() for _ in range(r + 1)][0]
assert len(set(np.concatenate(ranks.gathered(np.array([own]))).tolist())) == 2
after = mx.random.uniform().item()
assert len(set(np.concatenate(ranks.gathered(np.array([after]))).tolist())) == 1
try:
    with ranks.together():
        if r == 1:
            raise InputError("nothing here")
except Exception as error:
    assert str(error) == "rank 1: nothing here", error
else:
    raise AssertionError
try:
    ranks.check_same("rows", bytes([r]))
except Exception as error:
    assert "rank 1 has other rows" in str(error)
else:
    raise AssertionError
import mlxlora as ml
from mlxlora.data import sources
from mlxlora.config.options import DataOptions
try:  # only rank 0 looks at the folder
    ml.run(None, None, None, sources.rows(DataOptions(data="rows.jsonl")), adapter_path="taken")
except Exception as error:
    assert type(error).__name__ == ["InputError", "SharedError"][r] and "taken already holds a run" in str(error), error
else:
    raise AssertionError
print("all", flush=True)
"""


def test_what_ranks_say_and_add_up(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/adapters.safetensors").touch()
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    env = environment(tmp_path) | {"MLX_HOSTFILE": str(hosts)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    outcomes = ended(
        [subprocess.Popen([sys.executable, "-c", TOGETHER], env=env | {"MLX_RANK": str(r)}, **pipes) for r in range(2)]
    )
    assert [(code, said.splitlines()[:1]) for code, said in outcomes] == [(0, ["all"])] * 2


def test_one_process_adds_up_nothing():
    array = mx.array([1.0])
    assert ALONE.leads and ALONE.summed(array) is array and ALONE.from_first(array) is array
    assert ALONE.totals(1, 2) == [1, 2] and ALONE.of_rank0("x") == "x" and ALONE.listed([1]) == [1]
    rows = np.ones((2, 3))
    assert ALONE.interleaved(rows).tolist() == rows.tolist() and ALONE.gathered(rows)[0] is rows
    ALONE.check_same("rows", b"")
    with pytest.raises(InputError, match="bad"), ALONE.together():
        raise InputError("bad")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_item_is_somebodys(size):
    shares = [list(Ranks(rank, size).share(range(5))) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(5))
    assert shares[0], "rank 0 has a row of every batch: it reports"


# --- what cannot be shared --------------------------------------------------------------------------


@pytest.mark.parametrize("name", objectives.__all__)
def test_published_objectives_can_be_shared(name):
    assert compares_rows(getattr(objectives, name)()) == []


@pytest.mark.parametrize(
    ("objective", "terms"),
    [
        (objectives.dpo(loss_type="aot"), ["aot"]),
        (objectives.dpo(loss_type="aot_unpaired", beta=0.01), ["aot_unpaired"]),
        (objectives.dpo(loss_type="sigmoid+0.1*aot"), ["aot"]),
        (objectives.grpo(loss_type="bnpo", beta=0.0), ["policy_loss"]),
        (objectives.grpo(top_entropy=0.2, beta=0.0), ["policy_loss"]),
        (nll(per=token_mean) + nll(per=batch_mean, name="mine"), ["mine"]),
    ],
)
def test_terms_that_compare_rows_are_found(objective, terms):
    assert compares_rows(objective) == terms


def test_a_rank_that_finds_no_others_does_not_train_alone(tmp_path):
    run = [sys.executable, "-m", "mlxlora_cli", "sft", "--iters", "1", "--adapter-path", tmp_path / "run"]
    done = subprocess.run(list(map(str, run)), env=environment(tmp_path) | {"MLX_RANK": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "finds no others" in done.stderr
    assert not (tmp_path / "run").exists()


def test_they_are_refused(tmp_path):
    (code, said), (other, _) = ended(start(tmp_path, 2, ["dpo", "--loss-type", "aot", "--quiet"]))
    assert code != 0 and other != 0
    assert "aot: this term compares the rows of a batch, which 2 ranks share" in said
