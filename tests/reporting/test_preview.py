"""`mlxlora preview`: rows as the model sees them, with what is scored, cut and dropped."""

import io
import json
import logging

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxlora_cli.preview import METHODS
from rich.console import Console

from mlxlora import starter
from mlxlora.config.options import DataOptions, ModelOptions, PairData
from mlxlora.methods import look
from mlxlora.models.loading import load_tokenizer
from mlxlora.reporting.preview import histogram, show_preview

STARTER = ("--model", starter.model_path())


def tokenizer():
    return load_tokenizer(ModelOptions(model=str(starter.model_path())))


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=60), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_histogram_counts_every_row_once(lengths, bins):
    lines = histogram(lengths, bins=bins)
    assert sum(int(line.split()[-1].replace(",", "")) for line in lines) == len(lengths)
    assert len(lines) <= bins


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_the_limit_divides_the_bars(lengths, limit):
    """The rows above the line are those that fit."""
    lines = histogram(lengths, limit=limit)
    marks = [i for i, line in enumerate(lines) if "--max-seq-length" in line]
    bars = [int(line.split()[-1]) for line in lines if "--max-seq-length" not in line]
    assert sum(bars) == len(lengths) and bool(marks) == (max(lengths) > limit)
    if marks:
        assert sum(bars[: marks[0]]) == sum(length <= limit for length in lengths)


@pytest.mark.parametrize("method", METHODS)
def test_the_starter(method, mlxlora):
    done = mlxlora("preview", "--method", method, "--num", 1)
    assert done.code == 0, done.err
    assert "<|im_start|>user⏎" in done.out and "tokens in a row: " in done.out and "none cut, none dropped" in done.out
    sides = {"sft": 1, "distill": 1, "kto": 1, "grpo": 0, "online-dpo": 0, "gkd": 0}.get(method, 2)
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


@pytest.mark.parametrize("method", METHODS)
def test_lengths_are_those_of_whole_rows(method, tmp_path):
    """Of every row, also of those that are cut or dropped."""
    words = [" word" * count for count in (1, 3, 5, 40)]
    rows = [{"prompt": f"say{text}", "chosen": text, "rejected": " no", "completion": text, "answer": "x"} for text in words]
    if method == "kto":
        rows = [{"prompt": row["prompt"], "completion": row["completion"], "label": True} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[-2:]))
    data = {limit: look(method, tokenizer(), METHODS[method](data=str(tmp_path), max_seq_length=limit)) for limit in (60, 9999)}
    assert data[60].lengths == data[9999].lengths and len(data[60].lengths) == 6
    assert data[60].lengths[3] == data[60].lengths[5] == max(data[60].lengths) > 60
    screen = Console(file=io.StringIO(), width=120, highlight=False)
    show_preview(data[60], 1, screen)
    told = screen.file.getvalue()
    longest = max(data[60].lengths)
    assert f"--max-seq-length 60 keeps 66.7% of the rows whole; {longest} would keep 95% of them, {longest} all" in told
    assert "-  --max-seq-length 60" in told


def test_a_terminal_has_colors_and_the_datas_own_escapes_are_text(tmp_path):
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


RUNS = {
    "dpo": ({"beta": 0.2, "delta": 1.0, "prompt_truncation": "left", "lr_schedule": "linear"}, "chosen"),
    "orpo": ({"nll_on_prompt": True}, "prompts and completions: "),
    "kto": ({}, "desirable"),
    "grpo": ({"rewards": ["accuracy"], "report_to": None}, "sampled during the run"),
    "gkd": ({"teacher_model": "t"}, "sampled during the run"),
    "distill": ({"teacher_model": "t", "mask_prompt": True}, "completions and assistant turns"),
}


@pytest.mark.parametrize("method", RUNS)
def test_the_file_of_a_run_says_the_method(method, tmp_path, mlxlora):
    options, shown = RUNS[method]
    places = {"method": method, "model": str(starter.model_path()), "data": str(starter.data_path(method)), "iters": 3}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(places | options))
    done = mlxlora("preview", "--config", file, "--num", 1)
    assert (done.code, done.err) == (0, "") and shown in done.out and "note: " not in done.out


def test_a_peers_file_says_the_method(tmp_path, mlxlora):
    file = tmp_path / "peer.yaml"
    file.write_text(f"train_mode: dpo\nmodel: {starter.model_path()}\ndata: {starter.data_path('dpo')}\niters: 3\n")
    assert "rejected  " in mlxlora("preview", "--config", file).out
    assert "fields not recognized" in mlxlora("preview", "--config", file, "--method", "sft").err


def test_long_rows_are_cut_without_a_word_of_transformers(monkeypatch):
    said, reader = [], tokenizer()
    monkeypatch.setattr(reader._tokenizer, "model_max_length", 4)
    monkeypatch.setattr(logging.getLogger("transformers.tokenization_utils_base"), "warning", lambda *told: said.append(told))
    look("sft", reader, DataOptions(data=str(starter.data_path("sft")), max_seq_length=20, mask_prompt=True))
    assert said == []
    reader._tokenizer.deprecation_warnings.clear()
    reader._tokenizer.encode("words " * 9)
    assert len(said) == 1, "it would have said it"


def test_options_of_a_run_are_not_offered(mlxlora):
    told = mlxlora("preview", "--help").out
    assert "--max-seq-length" in told and "--shuffle" not in told and "--token-cache" not in told


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
