"""Several ranks train what one process trains, and none outlives the others.

Ranks are processes on this machine's CPU that communicate over MLX's ring backend and the loopback device. What a single
process trains runs in the process of the tests.
"""

import re
import signal
import subprocess
import sys
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
from tests.support.ranks import (
    LIMIT,
    assert_same,
    checkpoints,
    ended,
    environment,
    finished,
    free_ports,
    launched,
    own_lines,
    start,
    to_run,
    wait_for,
)
from tests.support.warm import python

pytestmark = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend")

LAUNCHER = Path(sys.executable).with_name("mlx.launch")
REPORTS = "--steps-per-report 1 --steps-per-eval 2 --val-batches 3 --quiet --answers 0"
EVERY_METHOD = {
    "sft": f"sft --iters 3 --batch-size 5 --grad-accumulation-steps 2 {REPORTS}",
    "dpo": f"dpo --iters 2 --batch-size 3 {REPORTS}",
    "orpo": f"orpo --iters 2 --batch-size 3 {REPORTS}",
    "cpo": f"cpo --iters 2 --batch-size 3 {REPORTS}",
    "kto": f"kto --iters 2 --batch-size 5 {REPORTS}",
    "grpo": f"grpo --iters 2 --batch-size 3 --max-completion-length 12 {REPORTS}",
}
WITH_TEACHER = f"--model {model_path()} --teacher-model TEACHER --num-layers -1 --learning-rate 1e-3"
MORE_METHODS = {
    "online-dpo": f"online-dpo --iters 2 --batch-size 3 --max-completion-length 12 {REPORTS}",
    "distill": f"distill {WITH_TEACHER} --data {data_path('sft')} --iters 2 --batch-size 3 {REPORTS}",
    "gkd": f"gkd {WITH_TEACHER} --data {data_path('grpo')} --iters 2 --batch-size 3 --max-completion-length 8 {REPORTS}",
}
MORE_RANKS_THAN_ROWS = {
    "sft": f"sft --iters 2 --batch-size 3 --packing --patience 9 --keep-best --test {REPORTS}",
    "grpo": "grpo --iters 2 --num-iterations 2 --batch-size 3 --max-completion-length 12 --dynamic-sampling --baseline batch "
    f"--scale-rewards batch {REPORTS}",
}


# --- the same metrics ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "methods"),
    [(2, EVERY_METHOD), (2, MORE_METHODS), (4, MORE_RANKS_THAN_ROWS)],
    ids=["2 ranks", "2 ranks, more methods", "4 ranks"],
)
def test_ranks_report_what_one_process_reports(tmp_path, alone, teacher, ranks, methods):
    methods = {name: text.replace("TEACHER", str(teacher)) for name, text in methods.items()}
    outcomes = ended(start(tmp_path, ranks, *to_run(tmp_path, methods, ranks)))
    assert [code for code, _ in outcomes] == [0] * ranks, [output for _, output in outcomes]
    assert [output for _, output in outcomes[1:]] == [""] * (ranks - 1), "only rank 0 prints"
    alone(*to_run(tmp_path, methods, 1))
    for name in methods:
        assert_same(tmp_path / f"{name}-1", tmp_path / f"{name}-{ranks}")


def test_a_run_goes_on_with_other_numbers_of_ranks(tmp_path, alone):
    whole = f"sft --batch-size 6 --lr-schedule constant --warmup 0 {REPORTS}".split()

    def until(step, folder, *more):
        return [*whole, "--iters", step, "--adapter-path", tmp_path / folder, *more]

    finished(start(tmp_path, 2, until(2, "parts")))
    alone(until(6, "whole"), until(4, "parts", "--resume"))
    finished(start(tmp_path, 4, until(6, "parts", "--resume")))
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.skipif(not LAUNCHER.exists(), reason="no mlx.launch beside this Python")
def test_the_launcher_of_mlx_is_enough(tmp_path):
    first, _ = free_ports(2)
    command = [LAUNCHER, "-n", "2", "--backend", "ring", "--starting-port", first, "--", python(), "-m", "mlxlora_cli"]
    arguments = ["sft", "--iters", "2", *REPORTS.split(), "--adapter-path", tmp_path / "adapters"]
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapters/adapters.safetensors").exists()
    assert done.stdout.count(b"steps ") == 1


# --- when a rank ends ---------------------------------------------------------------------------

LONG = "sft --iters 100000 --steps-per-report 1 --val-batches 0 --answers 0"


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_rank_that_is_killed_ends_the_others_with_a_good_checkpoint(tmp_path, alone, blow):
    processes = start(tmp_path, 2, [*LONG.split(), "--adapter-path", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", '"step":3', processes)
    processes[1].send_signal(blow)
    (code, output), (other, _) = ended(processes)
    assert code not in (0, None) and other not in (0, None)
    (last,) = checkpoints(tmp_path / "run")
    assert f"after step {int(last)}" in output
    assert blow == signal.SIGINT or "another rank ended" in output
    alone([*LONG.replace("100000", str(int(last) + 1)).split(), "--resume", "--adapter-path", tmp_path / "run"])


def test_the_loss_of_rank_0_is_told_by_another(tmp_path):
    processes = start(tmp_path, 2, [*LONG.split(), "--adapter-path", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", '"step":3', processes)
    processes[0].kill()
    processes[0].wait()
    processes[1].send_signal(signal.SIGTERM)  # as mlx.launch does
    _, (code, output) = ended(processes)
    assert code == 1
    (line,) = own_lines(output)
    assert re.match(r"mlxlora: error: rank 1: .*another rank ended", line), output
    assert "Traceback" not in output


def test_a_rank_that_is_not_heard_of_does_not_keep_the_others_waiting(tmp_path):
    run = [*LONG.split(), "--adapter-path", tmp_path / "run"]
    processes = start(tmp_path, 2, run, MLXLORA_RANK_TIMEOUT="6")
    wait_for(tmp_path / "run/metrics.jsonl", '"step":3', processes)
    processes[1].send_signal(signal.SIGTSTP)
    code, output = ended(processes[:1])[0]
    processes[1].kill()
    processes[1].communicate()
    assert code == 1
    assert "timed out after 6 s" in output
    assert len(checkpoints(tmp_path / "run")) == 1


def test_what_one_rank_cannot_do_ends_all(tmp_path):
    rewards = tmp_path / "mine.py"
    rewards.write_text(
        "import os\ncalls = []\ndef mine(prompts, completions, **_):\n    calls.append(1)\n"
        "    assert len(calls) < 3 or os.environ['MLX_RANK'] == '0', 'no network'\n    return [1.0] * len(completions)\n"
    )
    run = f"grpo --iters 9 --val-batches 0 --answers 0 --max-completion-length 8 --reward-file {rewards} --rewards mine".split()
    (code, output), (other, cause) = ended(start(tmp_path, 2, [*run, "--adapter-path", tmp_path / "run"]))
    assert code != 0 and other != 0
    assert "no network" in cause and "another rank ended" in output
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
mx.disable_compile()
rows = [{"prompt": f"add {i}.", "completion": str(i)} for i in range(8)]
how = {"model": str(model_path()), "data": rows, "iters": 9, "batch_size": 2, "num_layers": 1, "answers": 0, "quiet": True}
seen = []
done = ml.sft(callbacks=[lambda step, metrics: seen.append(step) or step < 2], adapter_path="stopped", save_every=9, **how)
assert done["steps"] == 2 and done["stopped_early"].endswith("returned False") and seen == [[1, 2], []][r], (r, done, seen)
assert os.listdir("stopped/checkpoints") == ["0000002"]
try:
    ml.sft(callbacks=[lambda step, metrics: 1 / 0], adapter_path="failed", **how)
except Exception as error:
    assert "raised ZeroDivisionError" in str(error), error
else:
    raise AssertionError
mx.enable_compile()
print("all", flush=True)
from mlxlora_cli import main
sys.argv = ["mlxlora", "dpo", "--loss-type", "aot", "--quiet", "--adapter-path", "aot"]
try:
    main()
except SystemExit as stopped:
    print("refused" if stopped.code else "trained", flush=True)
"""


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(exit code, lines) of two ranks that run `TOGETHER`: one launch for several tests."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (folder / "taken").mkdir()
    (folder / "taken/adapters.safetensors").touch()
    return [(code, output.splitlines()) for code, output in ended(launched(folder, 2, TOGETHER))]


def test_what_ranks_say_and_add_up(together):
    """Also callbacks: those of rank 0 are called, and stop or end all ranks."""
    assert all(code == 0 and "all" in lines for code, lines in together), together


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
    run = [python(), "-m", "mlxlora_cli", "sft", "--iters", "1", "--adapter-path", tmp_path / "run"]
    done = subprocess.run(list(map(str, run)), env=environment(tmp_path) | {"MLX_RANK": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "finds no others" in done.stderr
    assert not (tmp_path / "run").exists()


def test_they_are_refused(together):
    (_, lines), (_, others) = together
    assert lines[-1] == others[-1] == "refused", together
    assert any("aot: this term compares the rows of a batch, which 2 ranks share" in line for line in lines)
