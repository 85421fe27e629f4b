"""A configuration that can be reached beside a model is never trusted, whatever links and copies lead to it."""

import os
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlora.config.options import Output
from mlxlora.errors import InputError
from mlxlora.utils.trust import CODE, PLACES, REPLACES, SENDS, came_with_model, check_config

MODELS = {
    "weights": ("model.safetensors", ""),
    "adapters": ("adapter_config.json", "{}"),
    "architecture": ("config.json", '{"model_type": "llama"}'),
}
ASKED = {
    "trust_remote_code": True,
    "reward_file": "rewards.py",
    "objective": "mine.py:x",
    "push_to_hub": "me/mine",
    "report_to": ["wandb"],
    "overwrite": True,
    "resume": True,
    "adapter_path": "/elsewhere",
    "save_path": "../..",
    "gguf": "model.gguf",
    "peft": "out",
    "output": "/elsewhere/answers.jsonl",
}
FOLDERS = st.lists(st.sampled_from(["a", "b", "c", "snapshots", "blobs", "configs"]), max_size=4)
STEPS = st.lists(st.sampled_from(["link to file", "link to folder", "relative link", "move below a link", "way up"]), max_size=4)


def test_every_option_that_could_harm_is_asked():
    assert ASKED.keys() == CODE | SENDS | REPLACES | PLACES


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(file, name, value):
    with pytest.raises(InputError) as caught:
        check_config(file, {name: value}, (), {})
    message = str(caught.value)
    assert message.startswith(f"{file}: {name} ") and f"add --{name.replace('_', '-')}" in message and "\n" not in message
    check_config(file, {name: value}, (name,), {})  # the user said so


def reached(place, file, steps):
    """Another path of the file, made of links."""
    for number, step in enumerate(steps):
        new = place / f"way{number}"
        match step:
            case "link to file":
                new.symlink_to(file)
                file = new
            case "relative link":
                new.mkdir()
                (new / "x.yaml").symlink_to(os.path.relpath(file.parent.resolve() / file.name, new))
                file = new / "x.yaml"
            case "link to folder":
                new.symlink_to(file.parent, target_is_directory=True)
                file = new / file.name
            case "move below a link":
                real = place / f"real{number}"
                real.mkdir()
                new.symlink_to(real, target_is_directory=True)
                (real / file.name).symlink_to(file)
                file = new / file.name
            case "way up":
                file = file.parent / ".." / file.parent.resolve().name / file.name
    return file


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(MODELS)),
    above=FOLDERS,
    below=FOLDERS,
    steps=STEPS,
    blob=st.booleans(),
    asked=st.sampled_from(sorted(ASKED)),
)
def test_a_configuration_reachable_beside_a_model_is_never_trusted(kind, above, below, steps, blob, asked, place):
    shutil.rmtree(place / "tree", ignore_errors=True)
    root = place / "tree"
    model = root.joinpath("m", *above)
    model.joinpath(*below).mkdir(parents=True)
    name, text = MODELS[kind]
    (model / name).write_text(text)
    file = model.joinpath(*below, "train.yaml")
    if blob:  # as in a cache: the folder holds a link, the file lies elsewhere
        (root / "store").mkdir()
        (root / "store" / "0123").write_text("iters: 1\n")
        file.symlink_to(root / "store" / "0123")
    else:
        file.write_text("iters: 1\n")
    way = reached(root, file, steps)
    assert way.is_file() and came_with_model(way)
    refused(way, asked, ASKED[asked])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(above=FOLDERS, below=FOLDERS, steps=STEPS)
def test_a_configuration_of_the_user_is_trusted(above, below, steps, place):
    shutil.rmtree(place / "tree", ignore_errors=True)
    root = place / "tree"
    folder = root.joinpath("work", *above, *below)
    folder.mkdir(parents=True)
    (root / "work" / "other").mkdir(exist_ok=True)
    (root / "work" / "other" / "model.safetensors").touch()  # beside, not above
    (place / "config.json").write_text('{"name": "a package"}')
    (folder / "train.yaml").write_text("iters: 1\n")
    way = reached(root, folder / "train.yaml", list(steps))
    check_config(way, ASKED, (), {})


@pytest.fixture
def snapshot(place):
    """A model in the hub's cache, whose files are links into blobs/."""
    repository = place / "hub" / "models--org--name"
    folder = repository / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, name in enumerate(("config.json", "model.safetensors", "configs/train.yaml")):
        (repository / "blobs" / f"{number}").write_text("{}")
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(repository / "blobs" / f"{number}", (folder / name).parent))
    return folder


def test_the_cache_of_the_hub_is_foreign_by_every_way(snapshot, place):
    inside = snapshot / "configs" / "train.yaml"
    (place / "linked.yaml").symlink_to(inside)
    (place / "linked").symlink_to(snapshot)
    shutil.copytree(snapshot, place / "copied")
    ways = (
        inside,
        inside.resolve(),
        place / "linked.yaml",
        place / "linked/configs/train.yaml",
        place / "copied/configs/train.yaml",
    )
    for way in ways:
        for name, value in ASKED.items():
            if not (name == "gguf" or name == "peft"):
                refused(way, name, value)


def test_a_configuration_of_the_cache_runs_nothing(snapshot, place, mlxlora):
    marker = place / "ran"
    (place / "rewards.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    file = snapshot / "configs" / "train.yaml"
    file.resolve().write_text("reward_file: rewards.py\n")
    outcome = mlxlora("grpo", "-c", file, "--model", "absent", "--data", "rows.jsonl")
    assert outcome.code == 2 and not marker.exists()
    assert "reward_file runs code, which a configuration beside a model or adapters may not" in outcome.err


@pytest.mark.parametrize("option", ["overwrite", "resume"])
def test_a_downloaded_configuration_leaves_the_default_folder_alone(option, place, mlxlora):
    (place / "theirs").mkdir()
    (place / "theirs" / "model.safetensors").touch()
    (place / "theirs" / "train.yaml").write_text(yaml.safe_dump({option: True}))
    (place / Output().adapter_path).mkdir()
    (place / Output().adapter_path / "adapters.safetensors").write_text("mine")
    outcome = mlxlora("sft", "-c", "theirs/train.yaml")
    assert outcome.code == 2 and f"theirs/train.yaml:1: {option} changes earlier results" in outcome.err
    assert (place / "adapters" / "adapters.safetensors").read_text() == "mine"


def test_folders_that_hold_everything_are_no_models(place, monkeypatch):
    (place / "model.safetensors").touch()
    (place / "project").mkdir()
    (place / "project" / "train.yaml").touch()
    (place / "train.yaml").touch()
    assert came_with_model(place / "project" / "train.yaml")
    monkeypatch.setattr(Path, "home", lambda: place)
    assert not came_with_model(place / "project" / "train.yaml")
    assert came_with_model(place / "train.yaml")


def test_links_in_a_circle_are_no_hang(place):
    (place / "a").symlink_to(place / "b")
    (place / "b").symlink_to(place / "a")
    assert not came_with_model(place / "a")
