"""`mlxlora preview`: rows as the model sees them, with what is trained, cut and dropped."""

import io
import json
import logging

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxlora import starter
from mlxlora.config.options import ModelOptions
from mlxlora.methods import METHODS
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


def test_what_is_trained(mlxlora):
    shown = {flag: mlxlora("preview", *STARTER, "--data", starter.data_path("sft"), *flag).out for flag in ((), ("--mask-prompt",))}
    assert "every token; --mask-prompt trains answers only" in shown[()]
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
    data = {limit: METHODS[method].preview(tokenizer(), data=str(tmp_path), max_seq_length=limit) for limit in (60, 9999)}
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
    found = METHODS["dpo"].preview(tokenizer(), data=str(data))
    screen = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard", highlight=False)
    show_preview(found, console=screen)
    text = screen.file.getvalue()
    assert "[[" not in text and "\x1b[2J" not in text and "\x1b[1;32m" in text and "green: trained" in text


def test_the_file_of_a_run_may_be_given(tmp_path, mlxlora):
    """It has options that a preview has no use for."""
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {starter.model_path()}\ndata: {starter.data_path('sft')}\nmask_prompt: true\niters: 5\nrank: 4\n")
    assert "completions and assistant turns" in mlxlora("preview", "--config", file).out


RUNS = {
    "dpo": ({"beta": 0.2, "delta": 1.0, "prompt_truncation": "left", "lr_schedule": "linear"}, "chosen"),
    "orpo": ({"nll_on_prompt": True}, "prompts and completions: "),
    "kto": ({}, "desirable"),
    "grpo": ({"rewards": ["accuracy"], "report_to": None}, "which the run samples"),
    "gkd": ({"teacher_model": "t"}, "which the run samples"),
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
    METHODS["sft"].preview(reader, data=str(starter.data_path("sft")), max_seq_length=20, mask_prompt=True)
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
    found = METHODS["sft"].preview(tokenizer(), data=str(starter.data_path("sft")))
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    show_preview(found, 1, Console(file=raw, highlight=False, width=100))
    raw.flush()
    assert b"\\n" in raw.buffer.getvalue()


def objects(mlxlora, *arguments):
    """What `mlxlora preview --json` prints, one object a line."""
    done = mlxlora("preview", *STARTER, "--json", *arguments)
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_has_one_object_a_row(tmp_path, mlxlora):
    turns = [
        {"role": role, "content": text} for role, text in (("user", "1+1?"), ("assistant", "2"), ("user", "é?"), ("assistant", "é"))
    ]
    data = write(tmp_path / "rows.jsonl", {"messages": turns}, {"text": "words"}, {"prompt": "a" * 99, "completion": "b"})
    chat, text = objects(mlxlora, "--data", data, "--mask-prompt", "--max-seq-length", 80, "--num", 9)
    assert (chat["file"], chat["line"], text["line"]) == (str(data), 1, 2)
    assert [part.removesuffix("\n") for part in chat["trained"]] == ["2<|im_end|>", "é<|im_end|>"]
    assert tokenizer().decode(chat["tokens"]) == chat["text"] and "<|im_start|>user\né?" in chat["text"]
    assert chat["counts"] == {
        "tokens": len(chat["tokens"]),
        "trained": sum(len(tokenizer().encode(part, add_special_tokens=False)) for part in chat["trained"]),
        "truncated": False,
    }
    assert set(chat) == {"file", "line", "tokens", "text", "trained", "counts"}


def test_json_of_pairs_labels_and_prompts(tmp_path, mlxlora):
    pairs = write(tmp_path / "pairs.jsonl", {"prompt": "a ", "chosen": "yes", "rejected": "no"})
    (pair,) = objects(mlxlora, "--data", pairs, "--method", "dpo")
    assert set(pair) == {"file", "line", "chosen", "rejected"}
    assert [pair[side]["trained"] for side in ("chosen", "rejected")] == [["yes<|im_end|>"], ["no<|im_end|>"]]
    labeled = write(
        tmp_path / "kto.jsonl",
        {"prompt": "a ", "completion": "yes", "label": True},
        {"prompt": "b ", "chosen": "c", "rejected": "d"},
    )
    found = objects(mlxlora, "--data", labeled, "--method", "kto")
    assert [(row["line"], row["label"], row["trained"]) for row in found] == [
        (1, True, ["yes<|im_end|>"]),
        (2, True, ["c<|im_end|>"]),
        (2, False, ["d<|im_end|>"]),
    ]
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": [{"role": "user", "content": "1+1?"}]})
    (prompt,) = objects(mlxlora, "--data", prompts, "--method", "grpo")
    assert prompt["trained"] == [] and prompt["counts"]["trained"] == 0
    assert prompt["text"] == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_json_is_alone_on_standard_output(tmp_path, mlxlora):
    """Notes about the file of another program go to standard error."""
    data = write(tmp_path / "rows.jsonl", {"text": "words"})
    file = tmp_path / "peer.yaml"
    file.write_text(f"train_mode: sft\nmodel: {starter.model_path()}\ndata: {data}\niters: 3\nlora_parameters: {{keys: [a]}}\n")
    done = mlxlora("preview", "--config", file, "--json")
    assert done.code == 0, done.err
    assert [json.loads(line)["text"] for line in done.out.splitlines()] == ["words<|im_end|>"]
    done = mlxlora("preview", "--json", "--num", 1)
    assert len(json.loads(done.out)["tokens"]) and "bundled starter" in done.err


@pytest.mark.parametrize("method", METHODS)
def test_json_shows_the_tokens_that_the_run_trains(method, mlxlora):
    found = METHODS[method].preview(tokenizer(), data=str(starter.data_path(method)))
    shown = objects(mlxlora, "--method", method, "--data", starter.data_path(method), "--num", 2)
    examples = [example for item in found.splits["train"].items[:2] for example in found.source.examples(item)]
    parts = [part for row in shown for part in ([row["chosen"], row["rejected"]] if "chosen" in row else [row])]
    assert [part["tokens"] for part in parts] == [example.tokens.tolist() for example in examples]
    assert [part["counts"]["trained"] for part in parts] == [int(example.loss_mask.sum()) for example in examples]
