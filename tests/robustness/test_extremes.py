"""Numbers, paths, rows and configurations beyond all bounds: one line with the rule and the value, no traceback, no crash."""

import json
import os
import shutil
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxlora import starter
from mlxlora.config.fields import LARGEST_FLOAT, LARGEST_INTEGER, LARGEST_SEED, PATHS, plain_type
from mlxlora.config.method_options import build
from mlxlora.errors import InputError, described, quoted
from mlxlora.methods import METHODS
from mlxlora.models.config_check import check_values
from mlxlora.training.loop import check_trained
from mlxlora.training.progress import Progress
from mlxlora.utils.paths import NAME_BYTES, checked_path

MODEL = starter.model_path()
QUICK = ("--num-layers", 1, "--batch-size", 1, "--val-batches", 0, "--answers", 0, "--quiet")
GROUPS = sorted({kind for method in METHODS.values() for kind in method.kinds.kinds()}, key=lambda kind: kind.__name__)
FIELDS = [(group, field) for group in GROUPS for field in attrs.fields(group) if plain_type(field.type) in (int, float)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "completion": "2"}\n' * 4)
    return tmp_path


@pytest.fixture
def sft(place, mlxlora):
    def run(*more, model=MODEL, data="rows.jsonl", code=2):
        outcome = mlxlora("sft", "--model", model, "--data", data, "--iters", 1, *QUICK, *more)
        assert outcome.code == code, outcome
        assert code == 0 or (outcome.err.count("\n") == 1 and len(outcome.err) < 1500), outcome.err
        return outcome.err

    return run


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "field"), FIELDS, ids=lambda value: getattr(value, "__name__", getattr(value, "name", "")))
def test_every_number_has_bounds(group, field):
    """No option takes a number that MLX cannot hold; the message has the flag."""
    for value in (10**25, -(10**25), 2**64, 1e300, float("inf"), float("nan")):
        if plain_type(field.type) is int and isinstance(value, float):
            continue
        with pytest.raises(InputError, match=f"--{field.name.replace('_', '-')} must be"):
            build(group, {field.name: value})


@given(st.sampled_from(sorted((g.__name__, f.name) for g, f in FIELDS)), st.integers() | st.floats())
def test_what_is_taken_is_within_bounds(named, value):
    group, field = next((g, f) for g, f in FIELDS if (g.__name__, f.name) == named)
    try:
        taken = getattr(build(group, {field.name: value}), field.name)
    except InputError as error:
        assert "\n" not in str(error) and "--" in str(error)
        return
    most = LARGEST_SEED if field.name == "seed" else LARGEST_INTEGER if type(taken) is int else LARGEST_FLOAT
    assert abs(taken) <= most


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rank", 10**9), "--rank must be at most 96, the smaller side of "),
        (("--rank", 97), "--rank must be at most 96, the smaller side of "),
        (("--rank-pattern", "q_proj=1000000"), "--rank-pattern: "),
        (("--rank-pattern", "q_proj=100000000000"), "--rank-pattern must be"),
        (("--alpha-pattern", "q_proj=1e300"), "--alpha-pattern must be"),
        (("--scale", 1e300), "--scale must be at most"),
        (("--epochs", 1e30), "--epochs must be"),
        (("--seed", 2**63), "--seed must be at most"),
    ],
)
def test_numbers_of_a_run(options, told, sft, place):
    assert told in sft(*options) and not (place / "adapters").exists()


def test_a_rank_of_the_smaller_side_is_fine(sft):
    sft("--rank", 96, code=0)


def test_a_run_whose_steps_were_all_skipped_fails(place, mlxlora):
    for progress in (Progress(step=0), Progress(step=3, skipped=2)):
        check_trained(progress)
    outcome = mlxlora("sft", "--iters", 3, "--scale", 1e38, "--learning-rate", 1e30, *QUICK, "--num-layers", -1)
    assert outcome.code == 1 and "every step was skipped (3 of 3 were not finite)" in outcome.err, outcome
    assert (place / "adapters" / "checkpoints").is_dir()


@pytest.mark.parametrize("option", [("--max-completion-length", 10**25), ("--group-size", 10**25), ("--reward-timeout", 1e300)])
def test_numbers_of_rollouts(option, place, mlxlora):
    outcome = mlxlora("grpo", "--iters", 1, *QUICK, *option)
    assert outcome.code == 2 and f"{option[0]} must be" in outcome.err


# --- rows ---------------------------------------------------------------------------------------

ROWS = (
    '{"text": %s}',
    '{"prompt": "a", "completion": %s}',
    '{"prompt": %s, "completion": "b"}',
    '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "b"}]}',
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": %s}',
    "%s",
)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("depth", [300, 1000, 5000])
def test_rows_nested_deep(row, depth, sft, place):
    (place / "rows.jsonl").write_text(row % ("[" * depth + "]" * depth) + "\n")
    assert "rows.jsonl:1: " in sft()


def test_a_deep_or_long_value_is_described_briefly():
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (deep, {"a": deep}, "x" * 10**7, [["x" * 100] * 1000] * 1000):
        assert len(described(value)) < 80 and len(quoted(value)) <= 200


# --- paths --------------------------------------------------------------------------------------


@given(st.text(st.characters() | st.sampled_from("/\0~.\udcff"), max_size=300))
def test_a_path_is_taken_by_the_file_system_or_refused(text):
    try:
        path = checked_path(text, "--data")
    except InputError as error:
        assert str(error).startswith("--data ") and "\n" not in str(error) and len(str(error)) < 400
        return
    path.exists()  # raises for a name that no file system takes
    assert path == Path(text).expanduser() and max(map(len, os.fsencode(path).split(b"/"))) <= NAME_BYTES + 20


BAD = {
    "long": "x" * 300,
    "deep": "/".join(["y" * 100] * 50),
    "not UTF-8": os.fsdecode(b"a\xff"),
    "empty": "",
    "no user": "~nobody-9/x",
}
PATH_FLAGS = {
    "adapter_path": ("sft",),
    "model": ("sft", "--data", "rows.jsonl"),
    "data": ("sft", "--model", "m"),
    "resume_adapter_file": ("sft",),
    "objective": ("sft",),
    "reward_file": ("grpo",),
    "reward_model": ("grpo",),
    "reference_model_path": ("dpo",),
    "teacher_model": ("distill",),
    "judge_model": ("online-dpo",),
    "save_path": ("fuse",),
    "gguf": ("fuse",),
    "peft": ("export",),
}


@pytest.mark.parametrize("name", sorted(PATHS))
@pytest.mark.parametrize("kind", BAD)
def test_paths_of_options(name, kind, place, mlxlora):
    flag = f"--{name.replace('_', '-')}"
    outcome = mlxlora(*PATH_FLAGS[name], flag, BAD[kind])
    assert outcome.code == 2 and outcome.err.startswith(f"mlxlora: error: {flag} ") and outcome.err.count("\n") == 1, outcome
    assert not (place / "adapters").exists()


@pytest.mark.parametrize("kind", sorted(BAD.keys() - {"empty"}))
def test_paths_of_arguments(kind, place, mlxlora):
    bad, model = BAD[kind], starter.model_path()
    init = ("init", "--config-file", model / "config.json", "--tokenizer", model, "--output", "new")
    lines = [
        ("push", bad, "a/b"),
        ("report", bad),
        ("merge", bad, bad),
        ("merge", "a", "b", "--save-path", bad),
        ("sft", "-c", bad),
    ]
    lines += [(*init[:at], bad, *init[at + 1 :]) for at in (2, 4, 6)]
    for line in lines:
        outcome = mlxlora(*line)
        assert outcome.code == 2 and outcome.err.count("\n") == 1, (line, outcome)
    assert [path.name for path in place.iterdir()] == ["rows.jsonl"]


def test_home_is_expanded(place, mlxlora, monkeypatch):
    monkeypatch.setenv("HOME", str(place / "home"))
    (place / "home").mkdir()
    (place / "home" / "rows.jsonl").write_bytes((place / "rows.jsonl").read_bytes())
    (place / "c.yaml").write_text(f"model: {starter.model_path()}\ndata: ~/rows.jsonl\nadapter_path: ~/out\n")
    assert mlxlora("sft", "-c", "c.yaml", "--iters", 1, *QUICK).code == 0
    assert mlxlora("sft", "--adapter-path=~/out", "--resume", "--iters", 2).code == 0
    assert (place / "home" / "out" / "adapters.safetensors").exists() and not (place / "~").exists()


def test_pipes_are_refused_by_name(sft, place, mlxlora):
    os.mkfifo(place / "pipe.jsonl")
    assert "--data pipe.jsonl is a pipe" in sft(data="pipe.jsonl")
    outcome = mlxlora("sft", "-c", "pipe.jsonl")
    assert outcome.code == 2 and "--config pipe.jsonl is a pipe" in outcome.err


# --- configurations of models -------------------------------------------------------------------

SIZES = json.loads((starter.model_path() / "config.json").read_text())
CONFIGS = {
    "text": {"rope_theta": "x"},
    "a list": {"rope_theta": [1]},
    "a token beyond 31 bits": {"eos_token_id": 2**31},
    "a negative token": {"bos_token_id": [-1]},
    "a path": {"model_type": "../x"},
    "a long name": {"model_type": "x" * 6000},
    "no layers": {"num_hidden_layers": 0},
    "layers without end": {"num_hidden_layers": 10**9},
    "a vocabulary without end": {"vocab_size": 10**12},
    "a negative size": {"hidden_size": -1},
    "half a unit": {"hidden_size": 1.5},
    "a deep value": {"text_config": {"vocab_size": 10**12}},
    "a part that is none": {"text_config": 3},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_models(name, sft, place, mlxlora):
    shutil.copytree(starter.model_path(), place / "model")
    (place / "model" / "config.json").write_text(json.dumps({**SIZES, **CONFIGS[name]}))
    key = next(iter(CONFIGS[name].get("text_config", 0) or CONFIGS[name])) if name == "a deep value" else next(iter(CONFIGS[name]))
    assert f"--model model: {key} in its config.json must be" in sft(model="model")
    outcome = mlxlora("init", "--config-file", "model/config.json", "--tokenizer", starter.model_path(), "--output", "new")
    assert outcome.code == 2 and f"{key} in its config.json must be" in outcome.err and not (place / "new").exists()


@pytest.mark.parametrize("templates", [[{"name": "../../x", "template": "a"}], {"../../x": "a"}, [{"name": 3, "template": "a"}]])
def test_names_of_chat_templates(templates, sft, place):
    """A tokenizer that is saved would write a file of that name."""
    shutil.copytree(starter.model_path(), place / "model")
    file = place / "model" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": templates}))
    assert "a chat template in its tokenizer_config.json must have a name" in sft(model="model")


def test_no_heads(place, mlxlora):
    (place / "config.json").write_text(json.dumps({**SIZES, "num_attention_heads": 0}))
    outcome = mlxlora("init", "--config-file", "config.json", "--tokenizer", starter.model_path(), "--output", "new")
    assert outcome.code == 2 and "mlx-lm cannot build this model" in outcome.err


@given(
    st.dictionaries(st.sampled_from(sorted(SIZES)), st.none() | st.integers() | st.floats() | st.text() | st.lists(st.integers()))
)
def test_a_configuration_is_taken_or_refused(values):
    try:
        check_values({**SIZES, **values}, "--model m")
    except InputError as error:
        assert str(error).startswith("--model m: ") and "\n" not in str(error) and len(str(error)) < 500


def test_a_long_name_in_adapters(place, mlxlora):
    (place / "adapters").mkdir()
    (place / "adapters" / "adapter_config.json").write_text(json.dumps({"model": "y" * 6000}))
    for line in (("generate", "--adapter-path", "adapters", "--prompt", "a"), ("fuse",)):
        outcome = mlxlora(*line)
        assert outcome.code == 2 and outcome.err.count("\n") == 1 and len(outcome.err) < 500, outcome
