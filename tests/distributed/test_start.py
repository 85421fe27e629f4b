"""Ranks find each other and agree on what they train before the first step, or say why not."""

import json
import subprocess

import mlx.core as mx
import pytest

from mlxlora.distributed.watchdog import TIMEOUT, timeout
from mlxlora.errors import InputError
from mlxlora.starter import data_path, model_path
from tests.support.ranks import LIMIT, ended, environment, free_ports, launched, own_lines
from tests.support.warm import python

ring = pytest.mark.skipif(not mx.distributed.is_available("ring"), reason="this MLX was built without the ring backend")

OTHERS = """
import json, os, sys
from mlxlora_cli import main
rank = int(os.environ["MLX_RANK"])
for of_ranks in json.loads(sys.argv[1]):
    sys.argv = ["mlxlora", *of_ranks[rank]]
    try:
        main()
    except SystemExit as stopped:
        print("ended", stopped.code, flush=True)
"""

FULLY_SHARDED = ("--fully-shard", "--train-type", "full", "--num-layers", "-1")


@ring
def test_ranks_that_differ_do_not_train(tmp_path, teacher):
    def command(folder, model, *more):
        base = [
            "sft",
            "--model",
            str(model),
            "--data",
            str(data_path("sft")),
            "--iters",
            "1",
            "--val-batches",
            "0",
            "--answers",
            "0",
        ]
        return [*base, "--adapter-path", str(tmp_path / folder), *more]

    own = model_path()
    runs = [
        [command("options", own, "--quiet"), command("options", own, "--seed", "7", "--scale", "3")],
        [command("weights", own), command("weights", teacher)],
        [command("slices", model, *FULLY_SHARDED) for model in (own, teacher)],
    ]
    (code, output), (other, silent) = ended(launched(tmp_path, 2, OTHERS, json.dumps(runs)))
    assert (code, other) == (0, 0) and output.count("ended 1") == silent.count("ended 1") == 3, (output, silent)
    first, second, third = own_lines(output)
    assert "rank 1 has other options than rank 0 (scale is 3.0, at rank 0 20.0; seed is 7, at rank 0 0)" in first
    assert "rank 1 has other base weights than rank 0" in second and third == second
    assert not list(tmp_path.glob("*/checkpoints"))


@ring
def test_a_rank_that_never_comes_is_named(tmp_path):
    first, second = free_ports(2)
    (tmp_path / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{first}"], [f"127.0.0.1:{second}"]]))
    run = [python(), "-m", "mlxlora_cli", "sft", "--iters", "1", "--adapter-path", str(tmp_path / "run")]
    more = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json"), TIMEOUT: "2"}
    done = subprocess.run(run, env=environment(tmp_path) | more, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0
    (line,) = own_lines(done.stderr)
    assert line == f"mlxlora: error: rank 0 waited 2 s for the other ranks; no answer from rank 1 (127.0.0.1:{second})"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["x", "0", "-1", "nan", "inf", "1e9"])
def test_the_timeout_is_checked_like_a_flag(text, monkeypatch):
    monkeypatch.setenv(TIMEOUT, text)
    with pytest.raises(InputError, match=f"{TIMEOUT} must be seconds above 0"):
        timeout()
    monkeypatch.setenv(TIMEOUT, "2.5")
    assert timeout() == 2.5
