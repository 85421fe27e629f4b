"""A sample of tests/torture.py, what it found, and the table that it wrote."""

import errno
import os
import random
import re
import shutil
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import orjson
import pytest

from mlxlora.adapters.files import read_adapter_config, read_arrays, save
from mlxlora.adapters.prepare import attach, load_weights, prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.data.pooled import Pooled
from mlxlora.errors import InputError, RunError
from mlxlora.training.checkpoint import at_best, initial, load_checkpoint, newest, save_checkpoint
from mlxlora.training.progress import Progress, Window
from mlxlora.utils import folders
from mlxlora.utils.files import atomic_directory, sweep
from mlxlora.utils.folders import check_vacant, locked_folder
from tests.robustness import torture, torture_faults
from tests.support.tiny import dense, text_rows

SMALL = AdapterOptions(num_layers=1, rank=1, lora_keys=("self_attn.k_proj",))


WINDOW = Window({"loss": Pooled.mean(0.1), "kl": Pooled.mean(float("nan")), "reward_std": Pooled.of([1, 4], "std")}, steps=1)


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
    path = save_checkpoint(tmp_path, model, optim.Adam(1e-3), Progress(step=3, window=WINDOW), SMALL)
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


@pytest.fixture
def adam(model):
    optimizer = optim.Adam(1e-3)
    initial(model, optimizer)
    return optimizer


def test_a_checkpoint_without_a_digest_of_its_state_is_read(model, adam, tmp_path):
    path = save_checkpoint(tmp_path, model, adam, Progress(step=3), SMALL)
    state = (path / "state.json").read_text(encoding="utf-8")
    (path / "state.json").write_text(re.sub(r'"state.json": "\w+",', "", state), encoding="utf-8")
    assert '"adapters.safetensors"' in state and newest(tmp_path) == (path, [])
    assert orjson.loads((path / "state.json").read_bytes())["sha256"].keys() >= {"optimizer.safetensors"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("step", value) for value in ("x", -5, 2.5, True, None)),
        *(
            ("tokens", "x"),
            ("waited", -1),
            ("skipped", []),
            ("stop", 1),
            ("best", "low"),
            ("window", {"metrics": {"loss": "a"}}),
            ("window", {"metrics": {"loss": {"statistic": "median"}}}),
            ("window", {"metrics": {"loss": {"statistic": "mean", "count": "a"}}}),
            ("window", {"steps": -1}),
            ("window", {"future": 1}),
            ("window", []),
            ("owed", "validation"),
            ("owed", [1]),
            ("rounding", {"batches": {}}),
            ("rounding", [{}]),
            ("origin", []),
            ("origin", {"digests": {"tokenizer": 1}}),
        ),
        *(("future", 1), ("sha256", {}), ("sha256", {"../../secret": "x"}), ("sha256", [])),
    ],
)
def test_a_state_that_no_run_wrote_is_a_damaged_checkpoint(model, adam, tmp_path, field, value):
    path = save_checkpoint(tmp_path, model, adam, Progress(step=3), SMALL)
    state = orjson.loads((path / "state.json").read_bytes())
    del state["sha256"]["state.json"]
    (path / "state.json").write_bytes(orjson.dumps(state))
    assert newest(tmp_path)[0] == path
    (path / "state.json").write_bytes(orjson.dumps(state | {field: value}))
    found, (problem,) = newest(tmp_path)
    assert found is None and problem.startswith(f"{path}: damaged checkpoint (") and "\n" not in problem


def test_a_good_checkpoint_is_not_written_again(model, adam, tmp_path):
    """Whoever is killed while a good one makes room for the same one would lose it."""
    path = save_checkpoint(tmp_path, model, adam, Progress(step=3), SMALL)
    first = path.stat().st_ino
    assert save_checkpoint(tmp_path, model, adam, Progress(step=3), SMALL) == path and path.stat().st_ino == first
    (path / "state.json").write_bytes(b"")
    save_checkpoint(tmp_path, model, adam, Progress(step=3), SMALL)
    assert path.stat().st_ino != first and newest(tmp_path) == (path, [])


def test_no_good_checkpoint_makes_room_for_a_damaged_one(model, adam, tmp_path):
    for step in (3, 6, 9, 12):
        save_checkpoint(tmp_path, model, adam, Progress(step=step), SMALL)
    for step in (9, 12):
        (tmp_path / "checkpoints" / f"{step:07d}" / "state.json").write_bytes(b"")
    assert newest(tmp_path)[0] == tmp_path / "checkpoints" / "0000006"
    save_checkpoint(tmp_path, model, adam, Progress(step=8), SMALL, keep=2)
    assert newest(tmp_path)[0] == tmp_path / "checkpoints" / "0000008"
    assert (tmp_path / "checkpoints" / "0000006").is_dir() and not (tmp_path / "checkpoints" / "0000003").exists()


def test_damaged_checkpoints_take_no_place_once_an_earlier_one_is_loaded(model, adam, tmp_path):
    def names():
        return sorted(path.name.strip(".") for path in (tmp_path / "checkpoints").iterdir())

    for step in (3, 6, 9):
        save_checkpoint(tmp_path, model, adam, Progress(step=step), SMALL)
    (tmp_path / "checkpoints" / "0000009" / "state.json").write_bytes(b"")
    assert load_checkpoint(tmp_path / "checkpoints" / "0000006", model, adam).step == 6
    assert names() == ["0000003", "0000006", "0000009.damaged.tmp"] and newest(tmp_path)[1] == []
    assert load_checkpoint(tmp_path / "checkpoints" / "0000003", model, adam).step == 3
    assert names()[1] == "0000006", "a good one is put aside"
    save_checkpoint(tmp_path, model, adam, Progress(step=8), SMALL, keep=2)
    save_checkpoint(tmp_path, model, adam, Progress(step=12), SMALL, keep=2)
    assert names() == ["0000008", "0000012"]


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


def test_mlx_opens_files_itself(model, tmp_path, monkeypatch):
    """A thread of MLX that still holds on to a file of Python's when the interpreter ends would abort it."""
    save(model, tmp_path, SMALL)
    opened, load = [], mx.load
    monkeypatch.setattr(mx, "load", lambda file, *more, **options: opened.append(file) or load(file, *more, **options))
    read_arrays(tmp_path)
    assert opened == [str(tmp_path / "adapters.safetensors")]


def test_another_configuration_beside_the_adapters_is_named(model, tmp_path, capsys):
    save(model, tmp_path, SMALL)
    file = tmp_path / "adapter_config.json"
    config = read_adapter_config(tmp_path)
    for changed, told in (
        (config, False),
        (config | {"model": "elsewhere"}, False),
        (config | {"lora_parameters": config["lora_parameters"] | {"scale": 6.0}}, True),
    ):
        file.write_bytes(orjson.dumps(changed, option=orjson.OPT_SORT_KEYS))  # laid out in another way, too
        attach(dense(), tmp_path)
        err = capsys.readouterr().err
        assert bool(err) == told and err.count("\n") == told
    assert err.startswith(f"warning: {tmp_path}/adapters.safetensors: adapter_config.json has changed since it was written")
    load_weights(model, tmp_path)
    assert capsys.readouterr().err == err


RUN = (
    "--iters",
    4,
    "--save-every",
    2,
    "--steps-per-eval",
    2,
    "--val-batches",
    1,
    "--batch-size",
    1,
    "--num-layers",
    1,
    "--rank",
    1,
)


@pytest.fixture
def finish(tmp_path, model_folder, mlxlora):
    """A run, or the rest of one."""
    rows = text_rows(tmp_path, longest=2, train=4, valid=2)
    return lambda *more: mlxlora("sft", "--model", model_folder, "--data", rows, *RUN, "--adapter-path", tmp_path / "run", *more)


def test_a_finished_run_writes_damaged_adapters_again(finish, tmp_path):
    assert finish().code == 0
    file = tmp_path / "run" / "adapters.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-1] + bytes([whole[-1] ^ 1]), b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        done = finish("--resume")
        assert done.code == 0 and "written again from a checkpoint" in done.out, done.err
        assert file.read_bytes() == whole
    assert "written again" not in finish("--resume").out


def test_the_best_adapters_are_written_again_from_their_checkpoint_or_not_at_all(finish, tmp_path):
    assert finish("--keep-best", "--learning-rate", 1e-2).code == 0
    file, (first, last) = tmp_path / "run" / "adapters.safetensors", sorted((tmp_path / "run" / "checkpoints").iterdir())
    whole = file.read_bytes()
    assert whole == (last / file.name).read_bytes() != (first / file.name).read_bytes()
    lines = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    best = min(line["loss"] for line in lines if line["split"] == "valid")
    assert at_best(tmp_path / "run", best) == last
    file.write_bytes(b"")
    assert finish("--resume").code == 0 and file.read_bytes() == whole
    shutil.rmtree(first)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(metrics.replace(b'"valid"', b'"other"'))
    file.write_bytes(b"")
    done = finish("--resume", "--keep-best")
    assert done.code == 2 and done.err.count("\n") == 1 and "the best adapters are in no checkpoint: take another" in done.err


# --- one run in a folder ---------------------------------------------------------------------------


def test_a_second_run_is_refused(tmp_path, mlxlora):
    with locked_folder(tmp_path / "run", "--adapter-path"):
        (tmp_path / "run" / "config.yaml").touch()
        before = sorted(tmp_path.rglob("*"))
        for more in ((), ("--resume",), ("--overwrite",)):
            outcome = mlxlora("sft", "--iters", 1, "--adapter-path", tmp_path / "run", *more)
            assert outcome.code == 2 and outcome.err.count("\n") == 1 and "another run is writing there" in outcome.err
        assert sorted(tmp_path.rglob("*")) == before
        (tmp_path / "run" / "config.yaml").unlink()
    assert not (tmp_path / "run").exists(), "a folder in which nothing was written stays"


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(folders.fcntl, "flock", none)
    with locked_folder(tmp_path, "--adapter-path"), locked_folder(tmp_path, "--adapter-path"):
        (tmp_path / "file").touch()
    assert (tmp_path / "file").exists()
    told = f"warning: --adapter-path {tmp_path}: its file system has no locks (not supported); do not start a second run there\n"
    assert capsys.readouterr().err == told * 2


def test_nothing_is_left_of_folders_for_nothing(tmp_path):
    with pytest.raises(InputError), locked_folder(tmp_path / "a" / "b", "--adapter-path"):
        raise InputError("no such data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "make the folder writable")])
def test_what_cannot_be_written_is_one_line(tmp_path, number, told):
    with pytest.raises(RunError, match=told) as in_loraplus_group, locked_folder(tmp_path, "--adapter-path"):
        raise OSError(number, os.strerror(number), str(tmp_path / "metrics.jsonl"))
    assert "--resume" in str(in_loraplus_group.value) and str(tmp_path) in str(in_loraplus_group.value)
    with pytest.raises(OSError), locked_folder(tmp_path / "run", "--adapter-path"):
        raise OSError(number, os.strerror(number), "/elsewhere")


def test_what_a_killed_writer_left_is_removed(tmp_path):
    for name in ("0000003", ".0000003.tmp", ".0000003.before.tmp", ".0000006.damaged.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in (".mine.tmp", ".x.safetensors.12.tmp", ".y.safetensors.13.tmp"):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".x.safetensors.12.tmp", (0, time.time() - 100))
    sweep(tmp_path, "[0-9]*")
    sweep(tmp_path, "*.safetensors", older=50)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", ".y.safetensors.13.tmp", "0000003"]


class Killed(BaseException):
    """Stands for SIGKILL where the test goes on."""


def kills(monkeypatch, number):
    """Nothing is renamed or removed from a rename on, as if the process were gone."""
    seen, rename, remove = [], Path.replace, shutil.rmtree

    def replace(path, target):
        seen.append(path)
        if len(seen) >= number:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **o: None if len(seen) >= number else remove(*a, **o))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("again", ["sweep", "check", "fails", "succeeds"])
def test_a_kill_while_a_folder_is_replaced_loses_neither(tmp_path, monkeypatch, number, again):
    folder = tmp_path / "0000003"

    def write(text):
        with atomic_directory(folder) as temporary:
            (temporary / "file").write_text(text)
            if text == "never":
                raise Killed

    write("old")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kills(patch, number)
        write("new")
    assert folder.exists() == (number == 1)
    if again == "check":
        with pytest.raises(InputError, match="exists and is not empty"):
            check_vacant(folder, "--save-path", "fuse", overwrite=False)
    if again in ("check", "sweep"):
        sweep(tmp_path, "[0-9]*")
    elif again == "fails":
        with pytest.raises(Killed):
            write("never")
    else:
        write("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["0000003"]
    assert (folder / "file").read_text() == ("newer" if again == "succeeds" else "old")


def test_renames_reach_the_disk(tmp_path, monkeypatch):
    """A folder is synchronised after the rename in it, and its files before."""
    seen, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: seen.append((os.fstat(handle).st_ino, (tmp_path / "a").exists())) or sync(handle)
    )
    with atomic_directory(tmp_path / "a") as temporary:
        (temporary / "file").touch()
    wanted = [(tmp_path / "a" / "file", False), (tmp_path / "a", False), (tmp_path, True)]
    assert seen == [(path.stat().st_ino, there) for path, there in wanted]


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
    assert found.keys() - {"all"} == torture.FAULTS.keys()
    assert all(lost == 0 and tried == survived > 0 for tried, survived, lost in found.values())
    assert sum(tried for name, (tried, *_) in found.items() if name.startswith("kill -9")) >= 200
