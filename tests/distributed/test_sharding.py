"""Ranks that hold slices of the parameters train what one process trains, and none holds the whole model.

Ranks are processes on this machine's CPU that communicate over MLX's ring backend and the loopback device.
"""

import signal
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import generate
from mlx_lm import load as load_model

from mlxlora.adapters.files import check_arrays, save_arrays
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.distributed.ranks import ALONE, Ranks
from mlxlora.distributed.sharded_files import write_stored
from mlxlora.distributed.sharding import cut, is_sharded, shard, slice_length, unsliced
from mlxlora.errors import InputError
from mlxlora.starter import model_path
from mlxlora.training.checkpoint import newest
from mlxlora.training.startup import check_options
from tests.support.ranks import (
    assert_same,
    checkpoints,
    ended,
    environment,
    finished,
    launched,
    own_lines,
    start,
    to_run,
    wait_for,
)
from tests.support.tiny import dense, quantized
from tests.support.warm import python

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
def test_slices_report_what_one_process_reports(tmp_path, alone, ranks, methods):
    alone(*to_run(tmp_path, methods, 1))
    finished(start(tmp_path, ranks, *([*run, "--fully-shard"] for run in to_run(tmp_path, methods, ranks))))
    for name in methods:
        one, several = tmp_path / f"{name}-1", tmp_path / f"{name}-{ranks}"
        assert_same(one, several)
        a, b = mx.load(str(one / "adapters.safetensors")), mx.load(str(several / "adapters.safetensors"))
        assert a.keys() == b.keys()
        assert all(a[k].shape == b[k].shape and a[k].dtype == b[k].dtype and mx.allclose(a[k], b[k], atol=2e-3) for k in a)
        assert "crc32" in mx.load(str(several / "adapters.safetensors"), return_metadata=True)[1]
        check_arrays(several)
    model, tokenizer = load_model(str(model_path()), adapter_path=str(several))
    assert isinstance(generate(model, tokenizer, "add 2 and 3.", max_tokens=3), str)


@needs_ring
def test_a_run_goes_on_with_other_numbers_of_ranks_and_whole_parameters(tmp_path, alone):
    whole = f"sft --batch-size 6 --lr-schedule constant --warmup 0 --learning-rate 1e-3 {UNSEEN}".split()

    def until(step, folder, *more):
        return [*whole, "--iters", step, "--adapter-path", tmp_path / folder, *more]

    alone(until(6, "whole"), until(2, "parts"))
    finished(start(tmp_path, 2, until(4, "parts", "--resume", "--fully-shard")))
    alone(until(6, "parts", "--resume"))
    assert_same(tmp_path / "whole", tmp_path / "parts", tolerance=5e-4)


@needs_ring
def test_a_rank_that_is_killed_leaves_the_last_checkpoint(tmp_path):
    run = f"sft --iters 100000 --save-every 2 {FULL.replace('--quiet', '').replace('--val-batches 3', '--val-batches 0')}"
    processes = start(tmp_path, 2, [*run.split(), "--fully-shard", "--adapter-path", tmp_path / "run"])
    wait_for(tmp_path / "run/metrics.jsonl", '"step":5', processes)
    processes[1].send_signal(signal.SIGKILL)
    processes[1].wait()
    processes[0].send_signal(signal.SIGTERM)  # as mlx.launch does: the ring of MLX 0.32 may wait for ever
    (code, output), (other, _) = ended(processes)
    assert code not in (0, None) and other not in (0, None)
    assert "another rank ended" in output and "last checkpoint" in output
    assert len(checkpoints(tmp_path / "run")) == 2


LOST = """
import os, signal, sys
from mlxlora.training import prepared
if os.environ["MLX_RANK"] == "1":
    prepared.scorer = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
from mlxlora_cli import main
main()
"""


@needs_ring
def test_a_rank_that_is_lost_before_the_first_step_does_not_keep_the_others_waiting(tmp_path):
    run = f"sft --iters 1 {UNSEEN} --fully-shard --adapter-path run"
    (code, output), _ = ended(launched(tmp_path, 2, LOST, *run.split(), MLXLORA_RANK_TIMEOUT="10"))
    assert code == 1 and len(own_lines(output)) == 1 and own_lines(output)[0].startswith("mlxlora: error: "), output
    assert "Traceback" not in output


HELD = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx.utils import tree_flatten
sys.path.insert(0, sys.argv[1])
from tests.support.tiny import dense
from mlxlora.adapters.prepare import prepare
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.distributed.ranks import current_ranks
from mlxlora.training.optimizers import make_optimizer
from mlxlora.models.grad_checkpoint import checkpointed
from mlxlora.distributed.sharding import nbytes, shard
from mlxlora.training.step import make_step
from mlxlora.objectives.supervised import sft
mx.random.seed(current_ranks().rank)  # rank 0's weights count
model = dense(hidden_size=64, intermediate_size=256, num_hidden_layers=8, vocab_size=33)
whole = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
ranks = shard(model, current_ranks())
assert nbytes(model) == whole
checkpointed(prepare(model, AdapterOptions(train_type="full", num_layers=-1)))
optimizer = make_optimizer(Training(), 1)
step = make_step(model, optimizer, sft(), ranks=ranks)
held = sum(a.nbytes for _, a in tree_flatten([step.trained.master_weights, optimizer.state]))
mx.eval(step.trained.master_weights, optimizer.state)
step.trained.push()
mx.reset_peak_memory()
start = mx.get_active_memory()
out = model(mx.zeros((1, 4), mx.int32))
with ranks.computing():
    mx.eval(out)
print(held / whole, (start / whole), (mx.get_peak_memory() - start) / whole, out.sum().item(), flush=True)
"""


def run_ranks(tmp_path, script, *arguments, size=2):
    """The output of each rank, once all have succeeded."""
    outcomes = ended(launched(tmp_path, size, script, Path(__file__).resolve().parents[2], *arguments))
    assert [code for code, _ in outcomes] == [0] * size, outcomes
    return [output for _, output in outcomes]


@needs_ring
def test_a_rank_holds_its_share_of_parameters_and_optimizer(tmp_path, size=2):
    found = [list(map(float, output.split())) for output in run_ranks(tmp_path, HELD, size=size)]
    for held, active, more, total in found:
        assert held == pytest.approx(3 / size, rel=0.01), "parameters and two moments"
        assert active < 3 / size + 0.05
        assert more < 0.5, "one block of eight at a time"
        assert total == found[0][3], "all ranks have rank 0's weights"


FAILS = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.support.tiny import dense
from mlxlora.adapters.prepare import prepare
from mlxlora.adapters.files import read_arrays
from mlxlora.training.checkpoint import initial, save_checkpoint
from mlxlora.training.progress import Progress
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.distributed.ranks import current_ranks
from mlxlora.training.rank_sync import on_rank0
from mlxlora.training.optimizers import make_optimizer
from mlxlora.distributed.sharding import shard

ranks, options, model = current_ranks(), AdapterOptions(train_type="full", num_layers=-1), dense()

class Uncalled(type(model)):
    def __call__(self, tokens):
        return self.lm_head(self.model.layers[0].input_layernorm(self.model.embed_tokens(tokens)))

def tell(run):
    try:
        run()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    assert ranks.totals(1.0) == [2.0], "the ranks are no longer in step"

model.__class__ = Uncalled
tell(lambda: shard(model, ranks))
model = dense()
ranks = shard(model, ranks)
prepare(model, options)
optimizer = make_optimizer(Training(), 1)
initial(model, optimizer)

def save(limit, step):
    if ranks.leads:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    folder = Path(sys.argv[2])
    on_rank0(ranks, model, lambda: save_checkpoint(folder, model, optimizer, Progress(step=step), options), optimizer)

whole = resource.RLIM_INFINITY
tell(lambda: save(whole, 1))
size = (Path(sys.argv[2]) / "checkpoints/0000001/adapters.safetensors").stat().st_size
for part in (0.5, 1.1, 1.9):
    tell(lambda: save(int(size * part), 2))
tell(lambda: save(whole, 2))
"""


@needs_ring
def test_what_rank_0_cannot_do_ends_all_in_step(tmp_path):
    """A model that does not call its blocks, and a disk that is full while rank 0 writes arrays of which every rank has slices."""
    first, second = (output.splitlines() for output in run_ranks(tmp_path, FAILS, tmp_path))
    refused = "--fully-shard: this model reads parameters of a block without calling it; omit the flag ("
    assert first[0].startswith(f"InputError {refused}") and second[0].startswith(f"SharedError {refused}")
    assert [line.split()[0] for line in first[1:]] == ["OSError"] * 3
    assert second[1:] == ["LostError rank 0 could not read or write its files"] * 3
    assert checkpoints(tmp_path) == ["0000001", "0000002"] and newest(tmp_path)[1] == []


# --- slices -----------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=3).map(tuple), st.integers(2, 7))
@settings(deadline=None, max_examples=30)
def test_slices_together_are_the_parameter(shape, size):
    whole = mx.random.normal(shape)
    slices = [cut(whole, Ranks(rank, size)) for rank in range(size)]
    assert {s.shape for s in slices} == {(slice_length(shape, Ranks(size=size)), *[1] * len(shape))}
    (again,) = unsliced(mx.stack([s.reshape(-1) for s in slices]), [shape])
    assert again.shape == shape and mx.array_equal(again, whole)


def test_files_are_those_of_mlx(tmp_path):
    types = (mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint64, mx.int8, mx.bool_)
    arrays = {f"a.{i}": mx.arange(6).reshape(2, 3).astype(dtype) for i, dtype in enumerate(types)} | {"step": mx.array(3)}
    write_stored(tmp_path / "ours.safetensors", arrays)
    found = mx.load(str(tmp_path / "ours.safetensors"))
    assert found.keys() == arrays.keys()
    assert all(found[k].dtype == a.dtype and found[k].shape == a.shape and mx.array_equal(found[k], a) for k, a in arrays.items())


def test_a_checksum_is_in_the_file_whether_arrays_are_whole_or_not(tmp_path):
    arrays = {"b": mx.arange(6).reshape(2, 3).astype(mx.bfloat16), "a": mx.ones((4,)), "step": mx.array(3)}
    file = tmp_path / "adapters.safetensors"
    save_arrays(file, arrays, checked=True)
    wanted = mx.load(str(file), return_metadata=True)[1]["crc32"]
    write_stored(file, arrays, {"more": "text"}, checked="crc32")
    found, metadata = mx.load(str(file), return_metadata=True)
    assert metadata == {"format": "mlx", "more": "text", "crc32": wanted}
    assert all(mx.array_equal(found[name], array) for name, array in arrays.items())
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="its checksum does not match"):
        check_arrays(file)


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
        ({}, {}, {"with_teacher": True}, "use sft on its answers"),
    ],
)
def test_what_has_no_slices_is_refused(training, adapter, how, remedy):
    options = evolve(AdapterOptions(train_type="full"), **adapter)
    with pytest.raises(InputError, match=f"--fully-shard.*{remedy}"):
        check_options(Training(fully_shard=True, **training), options, **{"online": False, "with_teacher": False} | how)
    check_options(Training(**training), options, **{"online": False, "with_teacher": False} | how)


def test_a_module_of_two_blocks_is_refused():
    model = dense()
    first, second = model.layers
    second.mlp = first.mlp
    with pytest.raises(InputError, match=r"--fully-shard: model\.layers\.[01]\.mlp\.\w+ is in several blocks.*omit the flag"):
        shard(model, Ranks(size=2))


def test_quantized_weights_are_refused():
    with pytest.raises(InputError, match="not quantized"):
        shard(quantized(), Ranks(size=2))


def test_the_command_line_refuses_in_one_line(tmp_path):
    run = [python(), "-m", "mlxlora_cli", "sft", "--fully-shard", "--quiet", "--adapter-path", tmp_path / "run"]
    done = subprocess.run(list(map(str, run)), env=environment(tmp_path), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "use --train-type full" in done.stderr
