"""A sample of tests/torture.py, what it found, and the table that it wrote."""

import errno
import os
import random
import re
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import orjson
import pytest
import torture
import torture_faults
from tiny import dense

from mlxlora import folders
from mlxlora.adapters import prepare, read_arrays, save
from mlxlora.checkpoint import Progress, load_checkpoint, newest, save_checkpoint
from mlxlora.config import AdapterOptions
from mlxlora.errors import InputError, RunError
from mlxlora.files import sweep
from mlxlora.folders import writing

SMALL = AdapterOptions(num_layers=1, rank=1, lora_keys=("self_attn.k_proj",))


@pytest.fixture
def model():
    return prepare(dense(), SMALL)


def flips(content, every=1):
    """The bytes with one bit changed, another one in each byte."""
    for place in range(0, len(content), every):
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["state.json", "adapter_config.json", "adapters.safetensors", "optimizer.safetensors"])
def test_every_flip_in_a_checkpoint_is_noticed(model, tmp_path, name):
    path = save_checkpoint(tmp_path, model, optim.Adam(1e-3), Progress(step=3, window={"loss": 0.1, "kl": float("nan")}), SMALL)
    assert newest(tmp_path) == (path, [])
    file = path / name
    content = file.read_bytes()
    for changed in [*flips(content), content[:-1], content[: len(content) // 2], b""]:
        file.write_bytes(changed)
        found, (problem,) = newest(tmp_path)
        assert found is None and problem.startswith(f"{path}: damaged checkpoint") and "\n" not in problem
    file.unlink()
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_checkpoint(path, model, optim.Adam(1e-3))


def test_a_checkpoint_without_a_digest_of_its_state_is_read(model, tmp_path):
    adam = optim.Adam(1e-3)
    adam.init(model.trainable_parameters())
    path = save_checkpoint(tmp_path, model, adam, Progress(step=3), SMALL)
    state = (path / "state.json").read_text(encoding="utf-8")
    (path / "state.json").write_text(re.sub(r'"state.json": "\w+",', "", state), encoding="utf-8")
    assert '"adapters.safetensors"' in state and newest(tmp_path) == (path, [])
    assert orjson.loads((path / "state.json").read_bytes())["sha256"].keys() >= {"optimizer.safetensors"}


def test_no_good_checkpoint_makes_room_for_a_damaged_one(model, tmp_path):
    adam = optim.Adam(1e-3)
    for step in (3, 6, 9, 12):
        save_checkpoint(tmp_path, model, adam, Progress(step=step), SMALL)
    for step in (9, 12):
        (tmp_path / "checkpoints" / f"{step:07d}" / "state.json").write_bytes(b"")
    assert newest(tmp_path)[0] == tmp_path / "checkpoints" / "0000006"
    save_checkpoint(tmp_path, model, adam, Progress(step=8), SMALL, keep=2)
    assert newest(tmp_path)[0] == tmp_path / "checkpoints" / "0000008"
    assert (tmp_path / "checkpoints" / "0000006").is_dir() and not (tmp_path / "checkpoints" / "0000003").exists()


def test_every_flip_in_adapters_is_noticed_or_harmless(model, tmp_path):
    save(model, tmp_path, SMALL)
    file = tmp_path / "adapters.safetensors"
    content, wanted, noticed = file.read_bytes(), read_arrays(file), 0
    for changed in flips(content):
        file.write_bytes(changed)
        try:
            found = read_arrays(file)
        except InputError as error:
            noticed += str(file) in str(error)
            continue
        assert found.keys() == wanted.keys() and all(mx.array_equal(found[name], wanted[name]) for name in wanted)
    assert noticed > 0.95 * len(content)


# --- one run in a folder ---------------------------------------------------------------------------


def test_a_second_run_is_refused(tmp_path, mlxlora):
    with writing(tmp_path / "run", "--adapter-path"):
        before = sorted(tmp_path.rglob("*"))
        for more in ((), ("--resume",), ("--overwrite",)):
            outcome = mlxlora("sft", "--iters", 1, "--adapter-path", tmp_path / "run", *more)
            assert outcome.code == 2 and outcome.err.count("\n") == 1 and "another run is writing there" in outcome.err
        assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "run").exists(), "a folder in which nothing was written stays"


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    with writing(tmp_path, "--adapter-path"), writing(tmp_path, "--adapter-path"):
        (tmp_path / "file").touch()
    assert (tmp_path / "file").exists()


def test_nothing_is_left_of_folders_for_nothing(tmp_path):
    with pytest.raises(InputError), writing(tmp_path / "a" / "b", "--adapter-path"):
        raise InputError("no such data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "make the folder writable")])
def test_what_cannot_be_written_is_one_line(tmp_path, number, told):
    with pytest.raises(RunError, match=told) as raised, writing(tmp_path, "--adapter-path"):
        raise OSError(number, os.strerror(number), str(tmp_path / "metrics.jsonl"))
    assert "--resume" in str(raised.value) and str(tmp_path) in str(raised.value)
    with pytest.raises(OSError), writing(tmp_path / "run", "--adapter-path"):
        raise OSError(number, os.strerror(number), "/elsewhere")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in (".0000003.tmp", ".0000003.before.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".mine.tmp", ".x.safetensors.12.tmp", ".y.safetensors.13.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".x.safetensors.12.tmp", (0, time.time() - 100))
    sweep(tmp_path, "[0-9]*")
    sweep(tmp_path, "*.safetensors", older=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", ".y.safetensors.13.tmp"]


# --- the script ------------------------------------------------------------------------------------


def test_a_sample(tmp_path):
    tallies = torture.torture({"kill -9: sft": 1, "a write that ends early": 1}, jobs=2, seed=3, root=tmp_path)
    assert [(t.tried, t.problems) for t in tallies.values()] == [(1, [])] * 2


def test_what_is_lost_is_counted(tmp_path, monkeypatch):
    def loses(*_):
        raise torture_faults.Lost("gone")

    def skips(*_):
        raise torture_faults.Skipped("needs root")

    monkeypatch.setattr(torture, "FAULTS", {"a": loses, "b": skips})
    a, b = torture.torture({"a": 2, "b": 1}, jobs=1, seed=0, root=tmp_path).values()
    assert (a.row("a"), b.row("b")) == ("| a | 2 | 0 | 2 |  |", "| b | 0 | 0 | 0 | needs root |")


def test_rows_of_a_report_are_tried_again():
    every = {name: torture.Tally(2) for name in torture.FAULTS}
    text = torture.updated(torture.report(every, "first", 60), {"disk full": torture.Tally(5, 1)}, "second")
    assert "| disk full | 5 | 4 | 1 |  |" in text and "| quota used up | 2 | 2 | 0 |  |" in text
    assert f"| all | {2 * len(every) + 3} | {2 * len(every) + 2} | 1 |  |" in text and text.endswith("`second`.\n")


def test_damage_changes_a_file(tmp_path):
    rng = random.Random(0)
    for _ in range(50):
        (tmp_path / "file").write_bytes(bytes(range(1, 100)))
        torture_faults.damage(tmp_path / "file", rng)
        assert not (tmp_path / "file").exists() or (tmp_path / "file").read_bytes() != bytes(range(1, 100))


def test_the_table_is_of_this_script_and_nothing_was_lost():
    table = Path(__file__).with_name("TORTURE.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("| ")][1:]
    found = {name: tuple(map(int, numbers)) for name, *numbers, _ in rows if name != "---"}
    assert found.keys() - {"all"} == torture_faults.FAULTS.keys()
    assert all(lost == 0 and tried == survived > 0 for tried, survived, lost in found.values())
    assert sum(tried for name, (tried, *_) in found.items() if name.startswith("kill -9")) >= 200
