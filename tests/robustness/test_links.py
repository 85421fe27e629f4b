"""No link leads out of a folder that is read: what it leads to would end in a result, and be uploaded."""

import shutil
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlora import starter
from mlxlora.adapters.files import CONFIG, WEIGHTS, read_adapter_config, read_arrays
from mlxlora.adapters.hub import stage
from mlxlora.errors import InputError
from mlxlora.reporting.history import METRICS, SETTINGS, past_run
from mlxlora.utils.paths import check_links, leaves_folder, within

QUICK = ("--num-layers", 1, "--iters", 1, "--batch-size", 1, "--val-batches", 0, "--answers", 0, "--quiet")
SECRET = "hf_secret_token"


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(SECRET)
    return tmp_path / "home" / "token"


def nothing_leaked(folder):
    return not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(links=st.lists(st.booleans(), min_size=1, max_size=4), ends_outside=st.booleans(), outer=st.booleans())
def test_a_link_leaves_where_its_last_step_does(links, ends_outside, outer, tmp_path):
    """Whatever chain of links, absolute or relative, leads to the file; also where the folder is itself named by a link."""
    shutil.rmtree(tmp_path / "tree", ignore_errors=True)
    folder, away = tmp_path / "tree" / "folder", tmp_path / "tree" / "away"
    folder.mkdir(parents=True)
    away.mkdir()
    goal = (away if ends_outside else folder) / "goal"
    goal.write_text("x")
    for number, absolute in enumerate(links):
        link = folder / f"link{number}"
        link.symlink_to(goal if absolute else Path("..") / goal.parent.name / goal.name)
        goal = link
    (tmp_path / "tree" / "named").symlink_to(folder)
    file = (tmp_path / "tree" / "named" if outer else folder) / goal.name
    assert leaves_folder(file) is ends_outside
    if ends_outside:
        with pytest.raises(InputError, match="is a link that leaves its folder"):
            within(file)
        with pytest.raises(InputError, match="is a link that leaves the folder"):
            check_links(file.parent, "--model m")
    else:
        assert within(file) == file
        check_links(file.parent, "--model m")


def test_the_cache_of_the_hub_is_read(tmp_path):
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "0123").write_text("{}")
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "snapshots" / "0" / "config.json").symlink_to("../../blobs/0123")
    check_links(repository / "snapshots" / "0", "--model org/name")


@pytest.fixture
def model(tmp_path):
    shutil.copytree(starter.model_path(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("name", ["chat_template.jinja", "notes.py", "generation_config.json", "vocab.txt"])
def test_a_secret_beside_a_model_is_copied_nowhere(name, model, secret, tmp_path, mlxlora, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mlxlora("sft", "--model", "model", "--data", starter.data_path("sft"), *QUICK).code == 0
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(secret)
    for line in (
        ("fuse", "--adapter-path", "adapters", "--save-path", "fused"),
        ("init", "--config-file", "model/config.json", "--tokenizer", "model", "--output", "new"),
        ("sft", "--model", "model", "--data", starter.data_path("sft"), "--adapter-path", "other", *QUICK),
    ):
        outcome = mlxlora(*line)
        assert outcome.code == 2 and f"{name} is a link that leaves the folder" in outcome.err and SECRET not in outcome.err, line
    assert nothing_leaked(tmp_path / "adapters") and not any((tmp_path / made).exists() for made in ("fused", "new", "other"))


def test_weights_may_be_links_but_are_not_fused(model, tmp_path, mlxlora, monkeypatch):
    """Weights on another disk are read; a fused model would hold them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (model / "model.safetensors").rename(tmp_path / "disk" / "model.safetensors")
    (model / "model.safetensors").symlink_to(tmp_path / "disk" / "model.safetensors")
    assert mlxlora("sft", "--model", "model", "--data", starter.data_path("sft"), *QUICK).code == 0
    outcome = mlxlora("fuse", "--adapter-path", "adapters", "--save-path", "fused")
    assert outcome.code == 2 and "model.safetensors is a link that leaves the folder" in outcome.err


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "adapter_config.json", "README.md", "adapters.safetensors"])
def test_a_secret_beside_adapters_is_not_uploaded(name, secret, tmp_path):
    folder, target = tmp_path / "adapters", tmp_path / "staged"
    folder.mkdir()
    target.mkdir()
    (folder / CONFIG).write_bytes(orjson.dumps({"model": "m"}))
    (folder / WEIGHTS).touch()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(InputError, match=f"{name} is a link that leaves its folder"):
        stage(folder, target, (WEIGHTS, CONFIG, SETTINGS, METRICS, "README.md"))
    assert nothing_leaked(target)


def test_readers_follow_no_link_out(secret, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name, read in (
        (CONFIG, read_adapter_config),
        (WEIGHTS, read_arrays),
        (METRICS, past_run),
    ):
        (folder / name).symlink_to(secret)
        with pytest.raises(InputError, match="is a link that leaves its folder") as caught:
            read(folder)
        assert SECRET not in str(caught.value)
        (folder / name).unlink()
