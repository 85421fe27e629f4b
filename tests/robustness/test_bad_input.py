"""Everything a user can get wrong: one line that says what and where, exit code 2, and nothing written."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlxlora_cli import main

from mlxlora import starter

MODEL = starter.model_path()
GOOD = {"messages": [{"role": "user", "content": "what is 1 plus 2?"}, {"role": "assistant", "content": "1 + 2 = 3"}]}
QUICK = ("--num-layers", 1, "--rank", 2, "--iters", 2, "--batch-size", 1, "--val-batches", 0, "--max-seq-length", 64)


def jsonl(*rows):
    return "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent / "hub"))
    return tmp_path


def mlxlora(*arguments):
    """Exit code of `mlxlora ARGUMENTS`; a traceback would be raised."""
    before, sys.argv = sys.argv, ["mlxlora", *map(str, arguments)]
    try:
        main()
    except SystemExit as stopped:
        return stopped.code
    finally:
        sys.argv = before
    return 0


def sft(*options, data="train.jsonl", model=MODEL):
    return mlxlora("sft", "--model", model, "--data", data, "--adapter-path", "out", *QUICK, *options)


def listing(folder):
    return sorted((path.relative_to(folder), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file())


def line(capsys):
    """The one line on stderr."""
    printed = capsys.readouterr().err
    assert printed.startswith("mlxlora: error: ") and printed.count("\n") == 1, printed
    return printed.strip().removeprefix("mlxlora: error: ")


def refused(place, capsys, *options, **location):
    """The line of a run that is not begun; asserts that it left nothing behind."""
    before = listing(place)
    assert sft(*options, **location) == 2
    assert listing(place) == before and not (place / "out").exists()
    return line(capsys)


ROWS = {
    "broken JSON": (jsonl(GOOD, '{"text": "a"\n'), "train.jsonl:2: not JSON ("),
    "two objects": (jsonl('{"text": "a"} {"text": "b"}\n'), "train.jsonl:1: not JSON ("),
    "NaN": (jsonl('{"text": NaN}\n'), "train.jsonl:1: not JSON ("),
    "no object": (jsonl(GOOD, "[1]\n"), "train.jsonl:2: a row must be a JSON object, got list [1]"),
    "not UTF-8": (jsonl(GOOD) + b'{"text": "\xff\xfe"}\n', "train.jsonl:2: not UTF-8: "),
    "UTF-16": (json.dumps(GOOD).encode("utf-16"), "train.jsonl:1: not "),
    "empty file": (b"", "train.jsonl: no rows; write at least one JSON object"),
    "blank lines": (b"\n \n", "train.jsonl: no rows; write at least one JSON object"),
    "wrong field": (
        jsonl({"question": "x"}),
        "train.jsonl:1: fields not recognized: found question; accepted are 'messages', 'conversations', "
        "'prompt' + 'completion', 'text', or 'instruction' + 'output'; "
        "--messages-key, --prompt-key, --completion-key and --text-key rename them",
    ),
    "missing field": (jsonl(GOOD, {"prompt": "x"}), "train.jsonl:2: fields not recognized: found prompt; accepted are"),
    "no fields": (jsonl({}), "train.jsonl:1: fields not recognized: found none"),
    "null": (jsonl({"text": None}), "train.jsonl:1: fields not recognized: found text"),
    "number for text": (jsonl({"text": 3}), "train.jsonl:1: 'text' must be a string, got int 3"),
    "number for a prompt": (jsonl({"prompt": 3, "completion": "x"}), "train.jsonl:1: 'prompt' must be a string or a list"),
    "empty text": (jsonl({"text": ""}), "train.jsonl:1: 'text' is empty; write a text or remove the row"),
    "empty completion": (jsonl({"prompt": "a", "completion": ""}), "train.jsonl:1: 'completion' is empty; write a completion"),
    "empty output": (jsonl({"instruction": "a", "output": ""}), "train.jsonl:1: 'output' is empty; write an answer"),
    "no messages": (jsonl({"messages": []}), "train.jsonl:1: 'messages' must be a list of at least one message"),
    "messages as text": (jsonl({"messages": "hi"}), "train.jsonl:1: 'messages' must be a list of at least one message"),
    "message without role": (jsonl({"messages": [{"content": "x"}]}), "train.jsonl:1: a message of 'messages' must have a 'role'"),
    "content a number": (jsonl(chat(("user", 3))), "train.jsonl:1: the content of a message of 'messages' must be a string"),
}


@pytest.mark.parametrize(("content", "message"), ROWS.values(), ids=ROWS)
def test_rows(place, capsys, content, message):
    (place / "train.jsonl").write_bytes(content)
    assert refused(place, capsys).startswith(message)


@pytest.mark.parametrize(("content", "message"), [ROWS["broken JSON"], ROWS["wrong field"]], ids=["broken JSON", "wrong field"])
def test_rows_of_other_splits(place, capsys, content, message):
    (place / "data").mkdir()
    (place / "data" / "train.jsonl").write_bytes(jsonl(GOOD))
    (place / "data" / "valid.jsonl").write_bytes(content)
    assert refused(place, capsys, data="data").startswith("data/" + message.replace("train", "valid"))


OPTIONS = {
    "no assistant turn": (
        ("--mask-prompt",),
        [GOOD, chat(("user", "hi"))],
        "train.jsonl:2: --mask-prompt trains assistant turns and this conversation has none (roles: user)",
    ),
    "large batch": (
        ("--batch-size", 3),
        [GOOD, GOOD],
        "--batch-size 3 is larger than the training set of 2 rows; use --batch-size 2 or less",
    ),
    "nothing left": (
        ("--mask-prompt", "--max-seq-length", 4),
        [GOOD, GOOD],
        "none of the 2 rows has a token left to train on after truncation; raise --max-seq-length",
    ),
    "too many layers": (("--num-layers", 99), [GOOD], "--num-layers 99: the model has 4 layers; use 4 or -1 for all"),
    "no layers": (("--num-layers", 0), [GOOD], "--num-layers must be -1 or >= 1, got 0"),
    "unknown module": (("--lora-keys", "a.b"), [GOOD], "--lora-keys: the model has no module a.b; a block has "),
    "no test split": (("--test",), [GOOD], "--test needs a test split: add test.jsonl to the data folder"),
    "nothing to be best at": (("--keep-best",), [GOOD], "--keep-best needs validation: add valid.jsonl or --valid-fraction"),
    "decay without effect": (("--weight-decay", 0.1), [GOOD], "--weight-decay 0.1 has no effect on adam; use --optimizer adamw"),
    "infinite rate": (("--learning-rate", "inf"), [GOOD], "--learning-rate must be a finite number, got inf"),
    "no rate": (("--learning-rate", "nan"), [GOOD], "--learning-rate must be a finite number, got nan"),
    "endless": (("--epochs", "inf"), [GOOD], "--epochs must be a finite number, got inf"),
    "dropout": (("--dropout", 1), [GOOD], "--dropout must be < 1, got 1.0"),
    "no objective": (("--objective", "o.py:o"), [GOOD], "--objective o.py: no such file"),
    "start from nothing": (("--resume-adapter-file", "a.safetensors"), [GOOD], "a.safetensors: no such file; expected a saf"),
    "start from rows": (("--resume-adapter-file", "train.jsonl"), [GOOD], "train.jsonl: not a readable safetensors file ("),
    "both": (("--resume", "--overwrite"), [GOOD], "--resume and --overwrite exclude each other"),
    "file for output": (
        ("--adapter-path", "train.jsonl"),
        [GOOD],
        "--adapter-path train.jsonl: train.jsonl is a file",
    ),
    "file above output": (("--adapter-path", "train.jsonl/out"), [GOOD], "--adapter-path train.jsonl/out: "),
}


@pytest.mark.parametrize(("options", "rows", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(place, capsys, options, rows, message):
    (place / "train.jsonl").write_bytes(jsonl(*rows))
    assert refused(place, capsys, *options).startswith(message)


YAML = {
    "unknown key": ("iters: 2\nlerning_rate: 1", "run.yaml:2: unknown key lerning_rate; did you mean learning_rate?"),
    "wrong value": ("iters: many", "run.yaml:1: iters must be a whole number, got 'many'"),
    "out of range": ("dropout: 2", "run.yaml:1: --dropout must be < 1, got 2.0"),
    "infinite": ("scale: .inf", "run.yaml:1: --scale must be a finite number, got inf"),
    "no YAML": ("iters: [", "run.yaml:1: not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), YAML.values(), ids=YAML)
def test_configuration(place, capsys, text, message):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    (place / "run.yaml").write_text(text)
    assert refused(place, capsys, "-c", "run.yaml").startswith(message)


@pytest.mark.parametrize(
    ("options", "hint"),
    [(("--lerning-rate", 1), "--learning-rate"), (("--iters", "x"), "--iters"), (("--optimizer", "x"), "adamw")],
)
def test_flags_that_typer_reads(place, capsys, options, hint):
    """Typer prints its usage in a few lines of its own."""
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    assert sft(*options) == 2
    printed = capsys.readouterr().err
    assert hint in printed and "Traceback" not in printed
    assert not (place / "out").exists()


def test_data_that_is_not_there(place, capsys):
    assert refused(place, capsys, data="nowhere").startswith("nowhere: no such file; --data takes")
    (place / "data").mkdir()
    assert refused(place, capsys, data="data") == "data: no train.jsonl in this folder; found nothing"
    (place / "rows.csv").write_text("a,b\n")
    assert refused(place, capsys, data="rows.csv").startswith("rows.csv: unknown kind of file; use one of .jsonl")


def test_models_that_are_not_there(place, capsys):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    assert refused(place, capsys, model="no/where/at/all").startswith("--model no/where/at/all: no such folder, and not a hub")
    assert refused(place, capsys, model="nobody/nothing").startswith("--model nobody/nothing: cannot be loaded: ")
    (place / "empty").mkdir()
    assert refused(place, capsys, model="empty") == "--model empty: no config.json in this folder"


def test_damaged_models(place, capsys):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    shutil.copytree(MODEL, place / "model")
    (place / "model" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert refused(place, capsys, model="model").startswith("--model model: cannot be loaded: ")
    (place / "model" / "model.safetensors").unlink()
    assert refused(place, capsys, model="model").startswith("--model model: cannot be loaded: ")
    (place / "model" / "config.json").write_text("{")
    assert refused(place, capsys, model="model").startswith("--model model: cannot be loaded: ")


def with_template(place, template):
    """A copy of the starter's model that has another chat template, or none."""
    folder = shutil.copytree(MODEL, place / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


def test_template_that_rejects_a_conversation(place, capsys):
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages }}"
    (place / "train.jsonl").write_bytes(jsonl(GOOD, chat(("system", "be short"), ("user", "hi"), ("assistant", "hi"))))
    assert refused(place, capsys, model=with_template(place, template)) == (
        "train.jsonl:2: the model's chat template rejects this conversation: System role not supported; "
        "put the text of the system message at the beginning of the first user message"
    )


def test_no_template(place, capsys):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    message = refused(place, capsys, model=with_template(place, None))
    assert message.startswith("train.jsonl:1: messages need a chat template and the model's tokenizer has none; ")


def test_adapters_that_do_not_fit(place, capsys):
    """The first of what does not fit, and how many more there are."""
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    assert sft("--adapter-path", "first", "--quiet", "--iters", 1) == 0
    capsys.readouterr()
    weights = "first/adapters.safetensors"
    message = refused(place, capsys, "--resume-adapter-file", weights, "--rank", 3)
    assert message.startswith(f"{weights} does not fit the model as configured: ")
    assert message.count(" has shape ") == 3 and message.endswith(" and 11 more")
    message = refused(place, capsys, "--resume-adapter-file", weights, "--num-layers", 2)
    assert " is missing; " in message


def test_a_finished_run_is_not_overwritten(place, capsys):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    assert sft("--quiet") == 0
    capsys.readouterr()
    before = listing(place)
    assert sft("--quiet") == 2
    assert listing(place) == before
    assert line(capsys) == (
        "--adapter-path out already holds a run (adapters.safetensors, metrics.jsonl, checkpoints); "
        "continue it with --resume, replace it with --overwrite, or name another folder"
    )
    assert sft("--quiet", "--resume", "--rank", 3) == 2
    assert line(capsys).startswith("--resume: rank was 2 and is 3; give the options of out/config.yaml")
    assert listing(place) == before
    assert sft("--quiet", "--overwrite") == 0


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_output_that_cannot_be_written(place, capsys, monkeypatch):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    before = listing(place)
    assert sft("--adapter-path", "/proc/self/out" if Path("/proc/self").is_dir() else "/dev/null/out") == 2
    assert "cannot write to" in (message := line(capsys)) or "is a file" in message
    assert listing(place) == before


def test_rows_are_cut_and_dropped_and_counted(place, capsys):
    long = chat(("user", "what is 1 plus 2? " * 20), ("assistant", "3"))
    (place / "train.jsonl").write_bytes(jsonl(GOOD, GOOD, long))
    assert sft("--mask-prompt", "--max-seq-length", 48) == 0
    printed = capsys.readouterr().out
    assert "warning: train: 1 rows dropped: too long for --max-seq-length 48" in printed
    assert sft("--max-seq-length", 48, "--overwrite") == 0
    assert "warning: train: 1 rows were cut to --max-seq-length 48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (("--optimizer", "sgd", "--learning-rate", 1e30), 2),
        (("--learning-rate", 1e30, "--max-grad-norm", 0), 2),
        (("--scale", 1e38), 1),
    ],
)
def test_losses_that_are_not_finite(place, capsys, options, step):
    """Exit code 1 after five of them; the state before the first is saved, and the line says which step and rows."""
    from mlx.core import isfinite, load

    (place / "train.jsonl").write_bytes(jsonl(GOOD, GOOD))
    assert sft("--quiet", "--iters", 9, "--no-shuffle", *options) == 1
    message = line(capsys)
    last = step + 4
    assert message.startswith((f"step {last}: loss is ", f"step {last}: grad_norm is "))
    assert f"(rows train.jsonl:{2 - last % 2}), the 5th in a row; the weights are those of step {step - 1}" in message
    assert all(isfinite(weights).all().item() for weights in load("out/adapters.safetensors").values())
    assert [path.name for path in Path("out/checkpoints").iterdir()] == [f"{last:07d}"]


TEXT = st.text(max_size=20)
VALUES = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | TEXT, lambda v: st.lists(v, max_size=2), max_leaves=3)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | VALUES, "content": TEXT | VALUES}), max_size=3
)
NAMES = st.sampled_from(["text", "prompt", "completion", "messages", "conversations", "instruction", "output", "system", "tools"])
OBJECTS = st.dictionaries(NAMES, TEXT | MESSAGES | VALUES, max_size=4)
LINES = st.one_of(
    OBJECTS.map(json.dumps),
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}).map(json.dumps),
    st.fixed_dictionaries({"messages": MESSAGES}).map(json.dumps),
    TEXT,
)


@given(st.lists(LINES, min_size=1, max_size=3), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_rows(place, capsys, lines, mask, template):
    """Either the run trains, or it says in one line why not."""
    (place / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = [flag for flag, wanted in (("--mask-prompt", mask), ("--use-chat-template", template)) if wanted]
    code = sft("--quiet", "--iters", 1, *flags)
    assert code in (0, 2)
    if code == 2:
        assert line(capsys) and not (place / "out").exists()
    else:
        assert (place / "out" / "adapters.safetensors").is_file()
        shutil.rmtree(place / "out")
        capsys.readouterr()


@pytest.mark.parametrize("command", [("eval", "--data", "data"), ("generate", "--prompt", "hi")], ids=lambda command: command[0])
def test_adapters_of_another_model(place, capsys, command):
    """Evaluation and generation name some of it, too."""
    (place / "data").mkdir()
    for name in ("train.jsonl", "test.jsonl"):
        (place / "data" / name).write_bytes(jsonl(GOOD))
    assert sft("--quiet", data="data") == 0
    config = place / "out" / "adapter_config.json"
    config.write_text(config.read_text().replace('"rank": 2', '"rank": 3'))
    capsys.readouterr()
    assert mlxlora(*command, "--model", MODEL, "--adapter-path", "out") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.count("does not match model parameter shape") == 3 and told.endswith(" and 11 more")
    assert mlxlora(*command, "--model", MODEL, "--adapter-path", "nowhere") == 2
    assert "nowhere: no adapters there (adapter_config.json: No such file or directory)" in line(capsys)


def test_splits_that_are_not_there(place, capsys):
    (place / "train.jsonl").write_bytes(jsonl(GOOD))
    assert mlxlora("eval", "--model", MODEL, "--data", "train.jsonl") == 2
    assert line(capsys) == "train.jsonl: no test split; found train"
