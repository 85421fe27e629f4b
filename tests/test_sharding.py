"""Ranks that keep slices of the parameters train what one process trains, and none holds the whole.

Ranks are processes of this machine, on the CPU, that talk through MLX's ring over the loopback device.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import generate
from mlx_lm import load as load_model
from test_distributed import assert_same, checkpoints, ended, environment, finished, free_ports, start, to_run, wait_for
from tiny import dense, quantised

from mlxlora.config import AdapterOptions, Training
from mlxlora.distributed import ALONE, Ranks
from mlxlora.errors import InputError
from mlxlora.sharding import check_options, cut, is_sharded, joined, length, shard, write_stored
from mlxlora.starter import model_path

needs_ring = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend")

FULL = "--train-type full --num-layers -1 --steps-per-report 1 --steps-per-eval 2 --val-batches 1 --quiet --answers 0"
UNSEEN = FULL.replace("batches 1", "batches 0")
TWO = {
    "sft": f"sft --iters 2 --batch-size 5 --grad-accumulation-steps 2 --max-grad-norm 0.5 --keep-best --test {FULL}",
    "dpo": f"dpo --iters 2 --batch-size 1 {FULL}",
    "some": f"sft --iters 1 --batch-size 3 --micro-batch 1 {FULL.replace('-1', '2', 1)}",
}
FOUR = {"rows": f"sft --iters 1 --batch-size 3 {UNSEEN}"}
"""More ranks than rows; ranks with fewer micro-batches than others; blocks that are frozen."""


@needs_ring
@pytest.mark.parametrize(("ranks", "methods"), [(2, TWO), (4, FOUR)], ids=["2 ranks", "4 ranks"])
def test_slices_report_what_one_process_reports(tmp_path, ranks, methods):
    finished(start(tmp_path, 1, *to_run(tmp_path, methods, 1)))
    finished(start(tmp_path, ranks, *([*run, "--fully-shard"] for run in to_run(tmp_path, methods, ranks))))
    for name in methods:
        one, several = tmp_path / f"{name}-1", tmp_path / f"{name}-{ranks}"
        assert_same(one, several)
        a, b = mx.load(str(one / "adapters.safetensors")), mx.load(str(several / "adapters.safetensors"))
        assert a.keys() == b.keys()
        assert all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and mx.allclose(a[k], b[k], atol=2e-3) for k in a)
    model, tokenizer = load_model(str(model_path()), adapter_path=str(several))
    assert isinstance(generate(model, tokenizer, "add 2 and 3.", max_tokens=3), str)


@needs_ring
def test_a_run_goes_on_with_other_numbers_of_ranks_and_whole_parameters(tmp_path):
    whole = f"sft --batch-size 6 --lr-schedule constant --warmup 0 --learning-rate 1e-3 {UNSEEN}".split()

    def until(step, folder, *more):
        return [*whole, "--iters", step, "--adapter-path", tmp_path / folder, *more]

    finished(start(tmp_path, 1, until(6, "whole"), until(2, "parts")))
    finished(start(tmp_path, 2, until(4, "parts", "--resume", "--fully-shard")))
    finished(start(tmp_path, 1, until(6, "parts", "--resume")))
    assert_same(tmp_path / "whole", tmp_path / "parts", tolerance=5e-4)


@needs_ring
def test_a_rank_that_is_killed_leaves_the_last_checkpoint(tmp_path):
    run = f"sft --iters 100000 --save-every 2 {FULL.replace('--quiet', '').replace('--val-batches 3', '--val-batches 0')}"
    processes = start(tmp_path, 2, [*run.split(), "--fully-shard", "--adapter-path", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", '"step":5', processes)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    processes[0].send_signal(signal.SIGTERM)  # as mlx.launch does: the ring of MLX 0.32 may wait for ever
    (code, said), (other, _) = ended(processes, 30)
    assert code not in (0, None) and other not in (0, None)
    assert "another rank ended" in said and "last checkpoint" in said
    assert len(checkpoints(tmp_path / "run")) == 2


HELD = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
sys.path.insert(0, sys.argv[1])
from tiny import dense
from mlxlora.adapters import prepare
from mlxlora.config import AdapterOptions, Training
from mlxlora.distributed import current_ranks
from mlxlora.optimisers import make_optimiser
from mlxlora.recompute import checkpointed
from mlxlora.sharding import nbytes, shard
from mlxlora.step import make_step
from mlxlora.objectives import sft
mx.random.seed(current_ranks().rank)  # rank 0's weights count
model = dense(hidden_size=64, intermediate_size=256, num_hidden_layers=8, vocab_size=33)
whole = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
ranks = shard(model, current_ranks())
assert nbytes(model) == whole
checkpointed(prepare(model, AdapterOptions(train_type="full", num_layers=-1)))
optimiser = make_optimiser(Training(), 1)
step = make_step(model, optimiser, sft(), ranks=ranks)
held = sum(a.nbytes for _, a in tree_flatten([step.trained.masters, optimiser.state]))
mx.eval(step.trained.masters, optimiser.state)
step.trained.show()
mx.reset_peak_memory()
start = mx.get_active_memory()
out = model(mx.zeros((1, 4), mx.int32))
with ranks.computing():
    mx.eval(out)
print(held / whole, (start / whole), (mx.get_peak_memory() - start) / whole, out.sum().item(), flush=True)
"""


@needs_ring
def test_a_rank_holds_its_share_of_parameters_and_optimiser(tmp_path, size=2):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(size)]))
    env = environment(tmp_path) | {"MLX_HOSTFILE": str(hosts)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", HELD, str(Path(__file__).parent)]
    outcomes = ended([subprocess.Popen(command, env=env | {"MLX_RANK": str(r)}, **pipes) for r in range(size)])
    assert [code for code, _ in outcomes] == [0] * size, outcomes
    found = [list(map(float, said.split())) for _, said in outcomes]
    for held, active, more, total in found:
        assert held == pytest.approx(3 / size, rel=0.01), "parameters and two moments"
        assert active < 3 / size + 0.05
        assert more < 0.5, "one block of eight at a time"
        assert total == found[0][3], "all ranks have rank 0's weights"


# --- slices -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=3).map(tuple), st.integers(2, 7))
@settings(deadline=None, max_examples=30)
def test_slices_together_are_the_parameter(shape, size):
    whole = mx.random.normal(shape)
    slices = [cut(whole, Ranks(rank, size)) for rank in range(size)]
    assert {s.shape for s in slices} == {(length(shape, Ranks(size=size)), *[1] * len(shape))}
    (again,) = joined(mx.stack([s.reshape(-1) for s in slices]), [shape])
    assert again.shape == shape and mx.array_equal(again, whole)


def test_files_are_those_of_mlx(tmp_path):
    types = (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint64, mx.int8, mx.bool_)
    arrays = {f"a.{i}": mx.arange(6).reshape(2, 3).astype(dtype) for i, dtype in enumerate(types)} | {"step": mx.array(3)}
    write_stored(tmp_path / "ours.safetensors", arrays)
    found = mx.load(str(tmp_path / "ours.safetensors"))
    assert found.keys() == arrays.keys()
    assert all(found[k].dtype == a.dtype and found[k].shape == a.shape and mx.array_equal(found[k], a) for k, a in arrays.items())


def test_one_process_has_the_whole_model():
    model = dense()
    assert shard(model, ALONE) is ALONE
    assert not is_sharded(model)
    assert np.array(ALONE.pooled(mx.array(2.0))) == 2


# --- what cannot be divided -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "adapter", "how", "remedy"),
    [
        ({}, {"train_type": "lora"}, {}, "use --train-type full"),
        ({"optimizer": "muon"}, {}, {}, "use adam, adamw, lion or sgd"),
        ({"optimizer": "adafactor"}, {}, {}, "use adam, adamw, lion or sgd"),
        ({}, {"qat": "4"}, {}, "--qat"),
        ({}, {"resume_adapter_file": "x"}, {}, "mlxlora fuse"),
        ({}, {}, {"online": True}, "use sft, dpo"),
        ({}, {}, {"taught": True}, "use sft on its answers"),
    ],
)
def test_what_has_no_slices_is_refused(training, adapter, how, remedy):
    options = evolve(AdapterOptions(train_type="full"), **adapter)
    with pytest.raises(InputError, match=f"--fully-shard.*{remedy}"):
        check_options(Training(fully_shard=True, **training), options, **{"online": False, "taught": False} | how)
    check_options(Training(**training), options, **{"online": False, "taught": False} | how)


def test_quantised_weights_are_refused():
    with pytest.raises(InputError, match="not quantised"):
        shard(quantised(), Ranks(size=2))


def test_the_command_line_refuses_in_one_line(tmp_path):
    run = [sys.executable, "-m", "mlxlora_cli", "sft", "--fully-shard", "--quiet", "--adapter-path", tmp_path / "run"]
    done = subprocess.run(list(map(str, run)), env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "use --train-type full" in done.stderr
