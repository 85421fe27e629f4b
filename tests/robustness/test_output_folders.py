"""What --overwrite removes: only folders with a marker of the same command, and only files that the marker lists."""

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlora.errors import InputError, RunError
from mlxlora.training.run_files import RUN, check_names, clean, mark_run
from mlxlora.utils.files import atomic_directory, atomic_file, sweep
from mlxlora.utils.folders import check_new_file, check_vacant, written_folder
from mlxlora.utils.marker import MARKER, mark, marker_of, strangers

COMMANDS = ("fuse", "merge", "import", "export", RUN)
QUICK = ("--num-layers", 1, "--batch-size", 1, "--val-batches", 0, "--answers", 0, "--quiet")
NAMES = st.lists(
    st.sampled_from(["a", "b", "config.json", ".git/HEAD", "src/x.py", "src/deep/y", "empty/"]), unique=True, max_size=5
)
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def filled(folder, names):
    folder.mkdir(exist_ok=True)
    for name in names:
        path = folder / name
        path.mkdir(parents=True, exist_ok=True) if name.endswith("/") else path.parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_text(name)
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def replace(folder, command, overwrite=True):
    target = check_vacant(folder, "--save-path", command, overwrite=overwrite)
    with written_folder(target, "--save-path", command) as temporary:
        (temporary / "new").write_text("new")


@FEW
@given(ours=NAMES, theirs=NAMES, by=st.sampled_from(COMMANDS), command=st.sampled_from(COMMANDS), marked=st.booleans())
def test_a_law_of_overwrite(ours, theirs, by, command, marked, tmp_path):
    """Either a folder holds only what the same command wrote, and becomes the new result; or nothing in it changes."""
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    filled(folder, ours)
    if marked:
        mark(folder, by)
    filled(folder, theirs)
    before = contents(folder)
    added = {name.rstrip("/") for name in theirs} - {name.rstrip("/") for name in ours}
    fits = not before or (marked and by == command and not added)
    try:
        replace(folder, command)
    except InputError as error:
        assert not fits and contents(folder) == before
        assert "\n" not in str(error) and str(error).startswith(f"--save-path {folder}")
    else:
        assert fits and contents(folder).keys() == {"new", MARKER}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@FEW
@given(ours=NAMES, theirs=NAMES)
def test_strangers_are_what_the_marker_does_not_list(ours, theirs, tmp_path):
    folder = tmp_path / "out"
    shutil.rmtree(folder, ignore_errors=True)
    filled(folder, ours)
    mark(folder, "fuse")
    filled(folder, theirs)
    marker = marker_of(folder)
    assert marker
    assert set(strangers(folder, marker)) == {name.rstrip("/") for name in theirs} - {name.rstrip("/") for name in ours}


def test_what_appears_meanwhile_stays(tmp_path):
    replace(tmp_path / "out", "fuse")
    with (
        pytest.raises(InputError, match=r"notes.txt there is not from `fuse`"),
        written_folder(tmp_path / "out", "--save-path", "fuse"),
    ):
        (tmp_path / "out" / "notes.txt").write_text("mine")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine" and (tmp_path / "out" / "new").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"command": 1, "files": []}', '{"command": "fuse"}', '{"command": "fuse", "files": [1]}', "x" * (1 << 21)],
)
def test_a_marker_that_is_none(text, tmp_path):
    (tmp_path / MARKER).write_text(text)
    assert marker_of(tmp_path) is None


def test_a_marker_elsewhere_is_none(tmp_path):
    mark(tmp_path, "fuse")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / MARKER).symlink_to(tmp_path / MARKER)
    assert marker_of(tmp_path / "project") is None


@pytest.mark.parametrize("name", [".", "..", "../work", "/"])
def test_the_folder_of_the_command_is_not_replaced(name, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with pytest.raises(InputError, match="the command runs in there"):
        check_vacant(name, "--save-path", "fuse", overwrite=True)


def test_a_folder_that_cannot_be_replaced_is_one_line(tmp_path, monkeypatch):
    replace(tmp_path / "out", "fuse")

    def busy(self, target):
        raise OSError(16, "Device or resource busy", str(self))

    monkeypatch.setattr(Path, "replace", busy)
    with pytest.raises(RunError, match=r"--save-path .*out: cannot be written \(Device or resource busy\)"):
        replace(tmp_path / "out", "fuse")


# --- links and other things in the way ----------------------------------------------------------


@pytest.fixture
def outside(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    yield tmp_path / "outside"
    assert contents(tmp_path / "outside") == {"mine": b"mine"}, "written or deleted outside of the folder"


@pytest.mark.parametrize("to", ["outside", "outside/mine", "nothing"])
def test_planted_temporary_links_lead_nowhere(to, outside, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    for name in (f".x.{os.getpid()}.tmp", ".y.tmp", ".y.before.tmp", ".z.before.tmp"):
        (work / name).symlink_to(tmp_path / to)
    with atomic_file(work / "x") as temporary:
        temporary.write_text("x")
    with atomic_directory(work / "y") as temporary:
        (temporary / "file").write_text("y")
    sweep(work, "*")
    assert contents(work) == {"x": b"x", "y": None, "y/file": b"y"}


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    for _ in range(2):
        replace(tmp_path / "out", "fuse")
        assert (tmp_path / "out").is_symlink() and contents(tmp_path / "disk").keys() == {"new", MARKER}


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a link to nothing"):
        check_vacant(tmp_path / "out", "--save-path", "fuse", overwrite=True)


def test_pipes_and_folders_are_not_replaced_by_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, told in (("pipe", "is a pipe"), ("folder", "is a folder")):
        with pytest.raises(InputError, match=told), atomic_file(tmp_path / name):
            pass
        with pytest.raises(InputError, match="name a file"):
            check_new_file(tmp_path / name, "--output", overwrite=True)
    for name in ("/dev/null", "/dev/stdout"):
        with pytest.raises(InputError):
            check_new_file(name, "--output", overwrite=True)
    with pytest.raises(InputError, match="is a device"), atomic_file(Path("/dev/null")):
        pass


# --- the folder of a run ------------------------------------------------------------------------

RUN_NAMES = ("config.yaml", "report.html", "samples.jsonl", "metrics.jsonl", "metrics.png", "adapters.safetensors")


@pytest.mark.parametrize("name", RUN_NAMES)
@pytest.mark.parametrize("more", [(), ("--overwrite",)])
def test_a_run_replaces_no_file_of_the_user(name, more, tmp_path, mlxlora):
    (tmp_path / name).write_text("mine")
    outcome = mlxlora("sft", "--adapter-path", tmp_path, "--iters", 1, *QUICK, *more)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and name in outcome.err
    assert contents(tmp_path) == {name: b"mine"}


@FEW
@given(listed=st.booleans(), names=st.lists(st.sampled_from(RUN_NAMES), unique=True), copies=st.booleans())
def test_a_run_removes_what_a_run_wrote(listed, names, copies, tmp_path):
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    filled(
        folder,
        [*names, "notes.txt", "checkpoints/0000004/state.json", *(["checkpoints/0000004-good/state.json"] if copies else [])],
    )
    if not listed:
        with pytest.raises(InputError, match="is not from a run"):
            check_names(folder, resume=False)
        return
    mark_run(folder)
    check_names(folder, resume=False)
    clean(folder)
    left = {"notes.txt", MARKER, *({"config.yaml"} & set(names))}
    assert contents(folder).keys() - {"checkpoints", "checkpoints/0000004-good"} == left | (
        {"checkpoints/0000004-good/state.json"} if copies else set()
    )


@pytest.mark.parametrize("name", [*RUN_NAMES, "checkpoints", "tensorboard"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_follows_no_link_out_of_its_folder(name, resume, outside, tmp_path):
    (tmp_path / "run").mkdir()
    mark_run(tmp_path / "run")
    (tmp_path / "run" / name).symlink_to(outside if name in ("checkpoints", "tensorboard") else outside / "mine")
    with pytest.raises(InputError, match=f"{name} is a link"):
        check_names(tmp_path / "run", resume=resume)


def test_a_folder_in_place_of_a_file(tmp_path, mlxlora):
    (tmp_path / "metrics.jsonl").mkdir()
    outcome = mlxlora("sft", "--adapter-path", tmp_path, "--overwrite", *QUICK)
    assert outcome.code == 2 and "metrics.jsonl is a folder; move it" in outcome.err


def test_commands_leave_alone_what_others_wrote(tmp_path, mlxlora, monkeypatch):
    """A training run is neither fused over, merged over nor imported over; a project with a config.json is not fused over."""
    monkeypatch.chdir(tmp_path)
    for name in ("run", "other"):
        assert mlxlora("sft", "--adapter-path", name, "--iters", 1, *QUICK).code == 0
    filled(tmp_path / "project", ["config.json", ".git/HEAD"])
    run, project = contents(tmp_path / "run"), contents(tmp_path / "project")
    assert json.loads(run[MARKER] or "")["command"] == RUN
    for line in (
        ("fuse", "--adapter-path", "other", "--save-path", "project"),
        ("fuse", "--adapter-path", "other", "--save-path", "run"),
        ("merge", "other", "other", "--save-path", "run"),
        ("merge", "other", "other", "--save-path", "project"),
        ("export", "--adapter-path", "other", "--peft", "run"),
    ):
        outcome = mlxlora(*line, "--overwrite")
        assert outcome.code == 2 and "would delete something else" in outcome.err, line
    assert contents(tmp_path / "run") == run and contents(tmp_path / "project") == project
    assert mlxlora("sft", "--adapter-path", "run", "--iters", 1, "--overwrite", *QUICK).code == 0
    for _ in range(2):
        assert mlxlora("merge", "run", "other", "--save-path", "sum", "--overwrite").code == 0
    assert mlxlora("report", "run", "--output", "page.html").code == 0
    (tmp_path / "page.html").write_text("mine")
    outcome = mlxlora("report", "run", "--output", "page.html")
    assert outcome.code == 2 and "replace it with --overwrite" in outcome.err and (tmp_path / "page.html").read_text() == "mine"
    assert mlxlora("report", "run", "--output", "page.html", "--overwrite").code == 0
    assert mlxlora("report", "run", "--output", tmp_path).code == 2
