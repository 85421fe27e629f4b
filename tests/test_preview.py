"""`mlxlora preview`: rows as the model sees them, with what is scored, cut and dropped."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxlora import starter
from mlxlora.config import DataOptions, ModelOptions, PairData
from mlxlora.preview import histogram, look, show_preview
from mlxlora.recipes import load_tokenizer

STARTER = ("--model", starter.model_path())


def tokenizer():
    return load_tokenizer(ModelOptions(model=str(starter.model_path())))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_histogram_counts_every_row_once(lengths, bins):
    lines = histogram(lengths, bins=bins)
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == len(lengths)
    assert len(lines) <= bins


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "cpo", "kto", "grpo", "online-dpo"])
def test_the_starter(method, mlxlora):
    done = mlxlora("preview", "--method", method, "--num", 1)
    assert done.code == 0, done.err
    assert "<|im_start|>user⏎" in done.out and "tokens in a row: " in done.out and "none cut, none dropped" in done.out
    sides = {"sft": 1, "kto": 1, "grpo": 0, "online-dpo": 0}.get(method, 2)
    assert done.out.count("[[") == done.out.count("]]") == sides
    assert ("chosen" in done.out) == (sides == 2) and ("desirable" in done.out) == (method == "kto")


def test_what_is_scored(mlxlora):
    shown = {flag: mlxlora("preview", *STARTER, "--data", starter.data_path("sft"), *flag).out for flag in ((), ("--mask-prompt",))}
    assert "every token; --mask-prompt scores answers only" in shown[()]
    assert "completions and assistant turns (--mask-prompt)" in shown[("--mask-prompt",)]
    assert "[[37 + 28 = 65<|im_end|>]]" in shown[("--mask-prompt",)]
    prompts = ("--method", "orpo", *STARTER, "--data", starter.data_path("orpo"))
    assert "prompts and completions: " in mlxlora("preview", *prompts, "--nll-on-prompt").out
    assert "--use-chat-template" in mlxlora("preview", *prompts).out


def test_cut_and_dropped_rows_are_counted_and_named(tmp_path, mlxlora):
    rows = [{"prompt": "add 1 and 2.", "completion": " 3"}, {"prompt": "add " * 40, "completion": " 3"}]
    rows += [{"prompt": "add 1.", "completion": " 3" * 40}, {"text": "2 + 2 = 4"}]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = mlxlora("preview", *STARTER, "--data", data, "--mask-prompt", "--max-seq-length", 24).out
    assert f"4 rows, 1 cut to --max-seq-length 24 (25.0%), 1 dropped (25.0%): {data}:2" in out
    assert "3 strings joined as they are, no chat template, 1 plain texts as they are" in out
    assert ", cut" in out


def test_a_terminal_has_colours_and_the_datas_own_escapes_are_text(tmp_path):
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a\x1b[2J", "chosen": " yes", "rejected": " no"}) + "\n")
    found = look("dpo", tokenizer(), PairData(data=str(data)))
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard", highlight=False)
    show_preview(found, console=screen)
    text = screen.file.getvalue()
    assert "[[" not in text and "\x1b[2J" not in text and "\x1b[1;32m" in text and "green: scored" in text


def test_the_file_of_a_run_may_be_given(tmp_path, mlxlora):
    """It has options that a preview has no use for."""
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {starter.model_path()}\ndata: {starter.data_path('sft')}\nmask_prompt: true\niters: 5\nrank: 4\n")
    assert "completions and assistant turns" in mlxlora("preview", "--config", file).out


def test_no_weights_are_read(mlxlora, monkeypatch):
    monkeypatch.setattr("mlx_lm.utils.load", None)
    assert mlxlora("preview").code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ppo"), "'ppo' is not one of 'sft', 'dpo'"),
        (("--model", "/no/such", "--data", starter.data_path("sft")), "--model /no/such: no such folder"),
        ((*STARTER, "--data", starter.data_path("grpo")), "train.jsonl:1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, mlxlora):
    done = mlxlora("preview", *arguments)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1


def test_without_unicode():
    found = look("sft", tokenizer(), DataOptions(data=str(starter.data_path("sft"))))
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show_preview(found, 1, Console(file=raw, highlight=False, width=100))
    raw.flush()
    assert b"\\n" in raw.buffer.getvalue()
