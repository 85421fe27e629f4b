"""What a person sees while a run trains: a table of each method's columns that fits the window, whatever the numbers are."""

import io
import itertools
from threading import Thread
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mlxlora.config.options import BaseOptions
from mlxlora.data.rows import read_rows
from mlxlora.errors import InputError
from mlxlora.methods import METHODS
from mlxlora.models.loading import load_tokenizer
from mlxlora.reporting.card import CUSTOM
from mlxlora.reporting.columns import GENERAL, TABLE_COLUMNS, Layout, short_number
from mlxlora.reporting.ending import next_commands
from mlxlora.reporting.reporters import terminal_for
from mlxlora.reporting.screen import Screen
from mlxlora.reporting.stage import announced
from mlxlora.reporting.terminal import Terminal
from mlxlora.utils.stages import shown_by
from mlxlora.utils.ticks import ticking

WIDTHS = (40, 60, 80, 100, 120, 160)
METRICS = (
    *("loss", "reward", "reward_std", "learning_rate", "tokens_per_second", "peak_memory_gb", "rewards/accuracies"),
    *("rewards/margins", "rewards/chosen", "rewards/rejected", "completions/mean_length", "frac_reward_zero_std", "kl"),
)
ESCAPE = "\x1b[2J"


def screen(width, columns=GENERAL, height=24, terminal=True, **changes):
    made = Console(file=io.StringIO(), force_terminal=terminal, width=width, height=height, highlight=False, color_system=None)
    return Screen(columns, console=made, clock=itertools.count(0, 7).__next__, **changes)


def written(seen: Any) -> str:
    return seen.console.file.getvalue()


def lines(seen):
    """Every line that was ever drawn, without the movements of the cursor."""
    return Text.from_ansi(written(seen).replace("\x1b[1A", "\n").replace("\x1b[2K", "\n").replace("\r", "\n")).plain.splitlines()


def run(seen, steps=30, value=2.345678, valid_every=10):
    """A run with reports, validations, samples, notes and answers."""
    seen.start({"beta": 0.1, "model": "m", "method": "sft"})
    seen.overview({"model": "m" * 150, "data": "many words " * 20})
    seen.progress(0, steps)
    for step in range(steps + 1):
        seen.progress(step, steps)
        row = dict.fromkeys(METRICS, value * (1 + step)) | {"step": step}
        if step:
            seen.record(row | {"split": "train"})
            seen.samples(
                step, [{"prompt": f"{ESCAPE}what? " * 9, "completion": "word " * 40, "reward": value, "expected": "w" * 300}]
            )
        if step % valid_every == 0:
            seen.record(
                {name: row[name] for name in ("step", "loss", "rewards/accuracies", "rewards/margins")} | {"split": "valid"}
            )
    seen.note("a warning of many words " * 12, warning=True)
    seen.answers([{"prompt": f"p{ESCAPE}" * 20, "expected": "", "before": "b\n" * 20, "after": "a" * 500}])
    seen.finish({"steps": 30, "seconds": 1e5, "adapters": "out", "report": "/a/long/folder/" * 12})


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("method", METHODS)
def test_no_line_is_longer_than_the_window(method, width):
    seen = screen(width, METHODS[method].columns)
    run(seen)
    too_long = [line for line in lines(seen) if cell_len(line) > width]
    assert not too_long and ESCAPE not in written(seen).replace("\x1b[2K", "")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_five_to_seven_columns_at_60(method):
    names = METHODS[method].columns
    at_60 = Layout.of(names, {"beta": 0.1}, 60)
    assert 5 <= 1 + len(at_60.columns) <= 8 and len(at_60.columns) >= len(names) - 1
    assert Layout.of(names, {"beta": 0.1}, 80).columns == [TABLE_COLUMNS[name] for name in names]
    assert len(at_60.heading().plain) <= 60


@given(st.floats(allow_nan=True, allow_infinity=True), st.integers(0, 10**9))
@settings(deadline=None, max_examples=200)
def test_cells_keep_their_width(value, step):
    row = dict.fromkeys(METRICS, value) | {"step": step}
    for width in (60, 80, 120):
        layout = Layout.of(tuple(TABLE_COLUMNS)[:7], {}, width)
        line = layout.line({"train": row | {"split": "train"}, "valid": row | {"split": "valid"}}, {"loss": 1.0})
        assert len(line.plain) == len(layout.heading().plain) <= width
    assert len(short_number(value)) <= 7


def test_a_validation_goes_into_the_row_of_its_step():
    seen = screen(80)
    run(seen, steps=3, valid_every=2)
    rows = [line.split() for line in lines(seen) if line.strip()[:1].isdigit()]
    assert ["2", "↑7.0370", "↑7.0370"] in [row[:3] for row in rows]


def test_a_run_without_validation_has_no_column_for_it():
    seen = screen(80)
    seen.progress(0, 30)
    for step, split in ((10, "train"), (20, "train"), (20, "valid"), (30, "train")):
        seen.progress(step, 30)
        seen.record({"step": step, "split": split, "loss": 1.0})
    seen.finish({})
    headings = [line.split() for line in lines(seen) if line.split()[:2] == ["step", "loss"]]
    assert "valid" not in headings[0] and "valid" in headings[-1]


def test_falls_and_rises_are_marked():
    layout = Layout.of(("loss", "accuracy"), {}, 80)
    rows = {"train": {"step": 5, "split": "train", "loss": 1.0, "rewards/accuracies": 0.5}}
    line = layout.line(rows, {"loss": 2.0, "accuracy": 0.75})
    assert "↓1.0000" in line.plain and "↓50%" in line.plain
    assert [span.style for span in line.spans if span.style] == ["green", "red"]
    assert "v1.0000" in layout.line(rows, {"loss": 2.0}, unicode=False).plain


def test_a_constant_column_is_left_out():
    titles = [column.title for column in Layout.of(METHODS["grpo"].columns, {"beta": 0.0}, 100).columns]
    assert "KL" not in titles and "no signal" in titles


def test_a_tie_is_not_a_failure():
    rows = {"valid": {"step": 0, "loss": 0.6931, "rewards/accuracies": 0.0, "rewards/margins": 1e-8}}
    assert "0.6931  tie" in Layout.of(METHODS["dpo"].columns, {}, 80).line(rows, {}).plain
    rows["valid"] |= {"step": 5, "rewards/margins": -0.5}
    assert "0.6931   0%" in Layout.of(METHODS["dpo"].columns, {}, 80).line(rows, {}).plain


def test_the_bar_always_has_steps_time_and_memory():
    seen = screen(44)
    seen.progress(0, 600)
    seen.progress(20, 600)
    seen.record({"step": 20, "split": "train", "loss": 1.0, "peak_memory_gb": 12.345})
    bars = [line for line in lines(seen) if "20/600" in line]
    seen.finish({})
    assert bars and all(part in bars[-1] for part in ("left", "12.35 GB"))


def test_colors_and_control_need_a_terminal_that_can(monkeypatch):
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as changed:
            changed.setenv("TERM", "xterm-256color")
            changed.setenv(name, value)
            made = Console(file=io.StringIO(), force_terminal=True, width=80, highlight=False)
            seen = Screen(console=made)
            run(seen, steps=4)
            text = written(seen)
            assert "\x1b[3" not in text, "no color"
            assert name == "NO_COLOR" or "\x1b" not in text, "no control at all"


def test_a_pipe_gets_lines():
    assert not isinstance(terminal_for(CUSTOM), Screen)


def test_the_end_says_what_improved_and_what_comes_next(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    told = {}
    for terminal in (True, False):
        made = Console(file=io.StringIO(), force_terminal=terminal, width=60, highlight=False, color_system=None)
        seen = Screen(console=made, evaluated=True) if terminal else Terminal(console=made, evaluated=True)
        seen.start({"model": "org/a model", "method": "sft", "test": True})
        for step, loss in ((0, 2.5), (10, 1.25), (20, float("nan")), (30, 1.5)):
            seen.record({"step": step, "split": "valid", "loss": loss})
        seen.answers([{"prompt": "what's 2 + 2?", "before": "5", "after": "4"}])
        seen.finish({"steps": 30, "shapes compiled": 3, "seconds": 70.2, "adapters": str(tmp_path / "out")})
        told[terminal] = written(seen)
    for text in told.values():
        words = " ".join(text.split())
        assert "2.5000 at step 0, 1.2500 at step 10 (best), 1.5000 at step 30" in words and "shapes" not in words
    assert "1:10 (30 steps)" in told[True]
    commands = [
        "mlxlora generate --adapter-path out --prompt 'what'\"'\"'s 2 + 2?'",
        "mlxlora eval --adapter-path out --split test",
        "mlx_lm.chat --model 'org/a model' --adapter-path out",
        "mlxlora fuse --adapter-path out --save-path out-fused",
    ]
    assert [line.removeprefix("next: ") for line in told[False].splitlines() if line.startswith("next: ")] == commands
    joined = told[True].replace(" \\\n     ", "")
    assert all(command in joined for command in commands)


def test_no_commands_where_none_would_work():
    for config, summary in (({}, {"adapters": "out"}), ({"model": "m"}, {"stopped": "after step 3"})):
        seen = screen(80)
        seen.start(config)
        seen.finish(summary)
        assert "Next" not in written(seen)


def test_long_work_before_the_first_step_has_a_bar_and_a_line(monkeypatch):
    clock = itertools.count(0, 0.25).__next__
    monkeypatch.setattr("mlxlora.reporting.stage.time.monotonic", clock)
    for width in (40, 80):
        seen = screen(width)
        with announced(seen, "tokenizing rows", 8):
            assert sum(ticking(range(8))) == 28
        bars = [line for line in lines(seen) if "tokenizing rows" in line]
        assert any("4/8" in line for line in bars) and max(map(cell_len, bars)) <= width
        assert "tokenizing rows: 8 in" in lines(seen)[-1] or any("tokenizing rows: 8 in" in line for line in bars)


def test_the_bar_of_a_run_stays_while_prompts_are_answered():
    seen = screen(80)
    seen.progress(0, 600)
    seen.progress(20, 600)
    before = len(lines(seen))
    with announced(seen, "answering prompts", 3):
        pass
    shown = [line for line in lines(seen)[before:] if line.strip()]
    seen.finish({})
    assert shown and all("20/600" in line and "left" in line for line in shown)


def test_a_log_gets_one_line_for_work_of_more_than_a_second():
    for step, told in ((0.01, ""), (1.0, "tokenizing rows: 3.0 s\n")):
        made = Console(file=io.StringIO(), width=80)
        seen = Terminal(console=made, clock=itertools.count(0, step).__next__)
        seen.stage("tokenizing rows", 0, 4)
        seen.stage("tokenizing rows", 2, 4)
        seen.stage("tokenizing rows", 3, 4)
        seen.stage("")
        assert written(seen) == told


def test_rows_are_counted_as_they_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("mlxlora.reporting.stage.time.monotonic", itertools.count(0, 0.25).__next__)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 7)
    seen, silent = screen(80), screen(80)
    with announced(seen, "reading rows", at_once=False):
        assert len(read_rows(tmp_path / "rows.jsonl")) == 7
    assert any(line.startswith("reading rows  7  ") for line in lines(seen)), "as far as it is known"
    assert any(line.startswith("reading rows: 7 in ") for line in lines(seen)), "when it is over"
    with announced(silent, "reading rows", at_once=False):
        pass
    assert not written(silent), "a hub data set draws bars of its own"


def test_a_download_is_shown_in_megabytes(monkeypatch, tmp_path):
    def download(name, tqdm_class, **_):
        with tqdm_class(unit="B", name="x.transfer", total=9) as other, tqdm_class(unit="B", total=0, desc="Reconstructing") as bar:
            other.update(5)
            bar.total = 5_000_000
            bar.update(2_000_000)
            bar.set_description("complete")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    seen = screen(80)
    with shown_by(seen.stage), pytest.raises(InputError):
        load_tokenizer(BaseOptions(model="org/name"))  # the folder is empty
    bars = [line for line in lines(seen) if line.strip()]
    assert any("downloading org/name, MB  2/5" in line for line in bars) and not any("0/0" in line for line in bars)


def test_a_log_says_what_the_first_step_took():
    for step, told in ((0.4, ""), (60.0, "first step, compiled once per run: 60.0 s\n")):
        made = Console(file=io.StringIO(), width=80)
        seen = Terminal(console=made, clock=itertools.count(0, step).__next__)
        for number in (5, 6, 7):
            seen.progress(number, 9)
        assert written(seen) == told


def test_the_bar_is_not_drawn_while_a_line_is_printed(monkeypatch):
    seen, order, threads = screen(80), [], []
    seen.progress(0, 9)
    printed = seen.console.print

    def slowly(*texts, **how):
        if not threads:
            threads.append(Thread(target=lambda: (seen.progress(0, 9), order.append("bar"))))
            threads[0].start()
            threads[0].join(0.05)
            order.append("line")
        printed(*texts, **how)

    monkeypatch.setattr(seen.console, "print", slowly)
    seen.note("a line")
    threads[0].join()
    seen.finish({})
    assert order == ["line", "bar"], "else the bar erases a line of the table"


def test_the_first_step_says_that_it_compiles():
    seen = screen(80)
    seen.progress(0, 600)
    assert any("0/600  compiling, once per run" in line for line in lines(seen))
    seen.finish({})


def test_a_run_with_rewards_is_evaluated_by_them():
    config = {"model": "m", "method": "grpo", "rewards": ["accuracy", "length(20)"], "reward_file": "mine.py"}
    commands = next_commands(config, "out", validated=True)
    assert "mlxlora eval --adapter-path out --split valid --rewards 'accuracy,length(20)' --reward-file mine.py" in commands
