"""Text from outside is shown on its way to a terminal, a log or an error: no escape sequence is sent, and any text prints."""

import ast
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import orjson
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from mlxlora import starter
from mlxlora.errors import InputError, RunError, listed, one_line, plain, printable, quoted, reason
from mlxlora.reporting.terminal import Terminal
from mlxlora.utils.console import SafeConsole
from mlxlora.utils.launch import warn
from mlxlora.utils.output import echo, guard_streams, json_line, one_line_of, say, showable
from mlxlora.utils.trust import announce

ROOT = Path(__file__).resolve().parents[2]
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "a\n\x1b[2J\x1b]0;t\x07\x9b31m\r\u202eb"  # clears, sets a title, a one-byte sequence, back to the start, right to left
TEXTS = st.text(st.characters() | st.sampled_from("\x1b\r\n\t\x07\x9b\u202e\u2066\ud800"), max_size=40)
CHAT = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
FOREIGN = [{"role": EVIL + "\n" + "x" * 4000, "content": "1"}, CHAT[1]]
QUICK = ("--num-layers", 1, "--iters", 1, "--batch-size", 1, "--val-batches", 0, "--answers", 0)


def harmless(text):
    assert not OBEYED.search(text), repr(OBEYED.search(text))
    return text


# --- the function and the edges -----------------------------------------------------------------


@given(TEXTS)
@example(EVIL)
def test_no_edge_lets_anything_through(text):
    harmless(printable(text))
    assert "\n" not in harmless(one_line_of(text))
    for error in (InputError(text), RunError(text), ValueError(InputError(text))):
        harmless(str(error))
    for shown in (plain(text), quoted(text), listed([text, text]), reason(ValueError(text)), one_line(KeyError(text))):
        harmless(one_line_of(shown))
    line = json_line({text: text})
    assert "\n" not in harmless(line) and json.loads(line) == {text: text}


@given(TEXTS, st.sampled_from(["utf-8", "latin-1", "ascii", "cp1252", "koi8-r", "no such encoding"]))
@example(EVIL, "latin-1")
def test_any_terminal_shows_any_text(text, encoding):
    stream = type("Stream", (io.StringIO,), {"encoding": encoding})()
    shown = showable(printable(text), encoding)
    if encoding != "no such encoding":
        shown.encode(encoding)
    console = SafeConsole(file=stream, highlight=False, width=60)
    table = Table()
    table.add_column(text)
    table.add_row(Text(text, style="bold"))
    for part in (Text(text), table, text):
        console.print(part, markup=False)
    harmless(stream.getvalue())


@given(TEXTS)
@example(EVIL)
def test_styles_are_sent_and_nothing_else(text):
    console = SafeConsole(file=io.StringIO(), force_terminal=True, color_system="standard", width=60, highlight=False)
    console.print(Text(text, style="red"))
    harmless(re.sub(r"\x1b\[[0-9;]*m", "", console.file.getvalue()))  # type: ignore[attr-defined]


def test_messages_outside_of_a_run(capsys):
    for tell in (say, warn, announce):
        tell(f"{EVIL}\nmlxlora: error: forged")
    echo(EVIL)
    echo(EVIL, err=True, end="")
    caught = capsys.readouterr()
    assert caught.err.count("\n") == 4  # echo prints text as it is, with its line ends
    harmless(caught.out + caught.err)


def test_logs_and_warnings_of_libraries(capsys):
    before = logging.getLogRecordFactory(), warnings.showwarning
    try:
        guard_streams()
        handler = logging.StreamHandler(sys.stderr)
        logger = logging.getLogger("mlxlora-test")
        logger.addHandler(handler)
        logger.error("bad %s", EVIL)
        warnings.showwarning(EVIL, UserWarning, EVIL, 1)
        logger.removeHandler(handler)
    finally:
        logging.setLogRecordFactory(before[0])
        warnings.showwarning = before[1]
    told = capsys.readouterr().err
    assert "bad a" in told
    harmless(told)


EDGES = {"mlxlora/utils/output.py", "mlxlora/utils/console.py"}
ALLOWED = {
    "cli/__init__.py: typer.echo": "the help, which rich has styled",
    "cli/help_text.py: Console": "the help, too",
    "cli/doctor.py: typer.secho": "our own remedies, in color",
}


def prints(path):
    """Calls that write to a terminal by themselves."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("print", "Console", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write", "rich.print"):
                yield f"{path.relative_to(ROOT).as_posix()}: {called}"


def test_everything_is_printed_at_the_edges():
    sources = [path for folder in ("mlxlora", "cli") for path in (ROOT / folder).rglob("*.py")]
    found = {line for path in sources if path.relative_to(ROOT).as_posix() not in EDGES for line in prints(path)}
    assert found <= ALLOWED.keys()


# --- through the command line -------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    shutil.copytree(starter.model_path(), tmp_path / "model")
    (tmp_path / "rows.jsonl").write_bytes(orjson.dumps({"prompt": "1 + 1 =", "completion": "2"}) + b"\n")
    return tmp_path


def changed(file, **entries):
    file.write_bytes(json.dumps({**json.loads(file.read_bytes()), **entries}).encode())


def rows(*values):
    Path("rows.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


def hostile_template(text, messages=CHAT):
    changed(Path("model/tokenizer_config.json"), chat_template=text)
    Path("model/chat_template.jinja").unlink(missing_ok=True)
    rows({"messages": messages})


def renamed_tensor():
    import mlx.core as mx

    arrays = mx.load("model/model.safetensors")
    arrays[EVIL] = mx.zeros((2, 2))  # type: ignore[index]
    mx.save_safetensors("model/model.safetensors", arrays)  # type: ignore[arg-type]


def foreign_run():
    Path("run").mkdir()
    record = {"step": 1, "split": "train", "loss": 1.0, EVIL: 2.0}
    Path("run/metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({**record, "split": EVIL}) + "\n")
    Path("run/config.yaml").write_text(yaml.safe_dump({"model": EVIL, EVIL: EVIL, "method": EVIL}))


SFT = ("sft", "--model", "model", "--data", "rows.jsonl", *QUICK)
HOSTILE = {
    "field": (lambda: rows({EVIL: "x"}), SFT),
    "value": (lambda: rows({"prompt": "x", "completion": {EVIL: EVIL}}), SFT),
    "row": (lambda: Path("rows.jsonl").write_text(EVIL + "\n"), SFT),
    "text": (lambda: rows({"text": EVIL}), (*SFT, "--dry-run")),
    "shown rows": (lambda: rows({"text": EVIL}), ("preview", "--model", "model", "--data", "rows.jsonl")),
    "rows as JSON": (lambda: rows({"text": EVIL}), ("preview", "--model", "model", "--data", "rows.jsonl", "--json")),
    "role": (lambda: rows({"messages": [{"role": EVIL, "content": "x"}]}), SFT),
    "role of an answer": (lambda: rows({"prompt": CHAT[:1], "chosen": FOREIGN, "rejected": CHAT[1:]}), ("dpo", *SFT[1:])),
    "role that a template drops": (
        lambda: hostile_template("{% for m in messages if m.role in ['user', 'assistant'] %}{{ m.content }}{% endfor %}", FOREIGN),
        SFT,
    ),
    "key of a message": (lambda: rows({"messages": [{EVIL: "user", "content": "x"}]}), SFT),
    "template error": (lambda: hostile_template("{{ raise_exception('" + EVIL + "') }}"), SFT),
    "template": (lambda: hostile_template("{% " + EVIL + " %}"), SFT),
    "model type": (lambda: changed(Path("model/config.json"), model_type=EVIL), SFT),
    "model file": (lambda: changed(Path("model/config.json"), model_file=EVIL), SFT),
    "number of a model": (lambda: changed(Path("model/config.json"), hidden_size=EVIL), SFT),
    "tensor": (renamed_tensor, SFT),
    "key of a configuration": (lambda: Path("c.yaml").write_text(json.dumps({EVIL: 1})), (*SFT, "-c", "c.yaml")),
    "value of a configuration": (lambda: Path("c.yaml").write_text(json.dumps({"rank": EVIL})), (*SFT, "-c", "c.yaml")),
    "method of a configuration": (lambda: Path("c.yaml").write_text(json.dumps({"train_mode": EVIL})), (*SFT, "-c", "c.yaml")),
    "syntax of a configuration": (lambda: Path("c.yaml").write_text("a: [" + EVIL), (*SFT, "-c", "c.yaml")),
    "metric": (foreign_run, ("report", "run")),
    "folder": (lambda: None, ("sft", "--model", EVIL, "--data", "rows.jsonl", *QUICK)),
    "data": (lambda: None, ("sft", "--model", "model", "--data", EVIL, *QUICK)),
    "flag": (lambda: None, ("sft", f"--{EVIL}", "1")),
    "value of a flag": (lambda: None, ("sft", "--rank", EVIL)),
    "choice of a flag": (lambda: None, ("sft", "--train-type", EVIL)),
    "command": (lambda: None, (EVIL,)),
    "lora keys": (lambda: None, (*SFT, "--lora-keys", EVIL)),
    "reward": (lambda: None, ("grpo", "--model", "model", "--data", "rows.jsonl", "--rewards", EVIL, *QUICK)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown(name, place, mlxlora):
    prepare, line = HOSTILE[name]
    prepare()
    outcome = mlxlora(*line)
    assert outcome.code in (0, 1, 2) and (outcome.out or outcome.err)
    harmless(outcome.out + outcome.err)
    if outcome.code:
        assert outcome.err.count("\n") == 1, outcome.err


def test_the_warning_about_code_cannot_be_erased(place, mlxlora):
    code = "x\x1b[2K\r.py"
    (place / "model" / code).write_text("from mlx_lm.models.llama import Model, ModelArgs\n")
    changed(place / "model" / "config.json", model_file=code)
    outcome = mlxlora("generate", "--model", "model", "--prompt", "1", "--max-tokens", 1, "--trust-remote-code")
    assert r"running Python code: model/x\x1b[2K .py (model_file of --model model" in outcome.err
    harmless(outcome.out + outcome.err)


def test_a_terminal_that_lacks_characters_kills_no_run(capsys):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    terminal = Terminal(console=SafeConsole(file=stream, highlight=False))
    terminal.note("5 € ▁▂▃", warning=True)
    terminal.samples(1, [{"prompt": "日本", "completion": "€\x1b[2J", "reward": 1.0}])
    terminal.finish({"€": "日本"})
    stream.flush()
    told = stream.buffer.getvalue()  # type: ignore[attr-defined]
    assert b"\\u20ac" in told and b"\x1b" not in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_standard_output_is_not_the_folders_fault(place):
    with open("/dev/full", "w") as full:  # noqa: PTH123
        line = [sys.executable, "-m", "mlxlora_cli", *map(str, SFT)]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "standard output cannot be written (No space left on device)" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
