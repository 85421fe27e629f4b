"""What a run tells: lines that align and can be grepped, a bar in a terminal, and a metrics file that survives a kill."""

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxlora.methods import METHODS
from mlxlora.reporting.reporter import MetricsFile, truncate_after
from mlxlora.reporting.screen import Screen
from mlxlora.reporting.terminal import Terminal, record_line, show_example
from mlxlora.reporting.text import shorten, sparkline, trend

ROW = {
    "step": 10,
    "split": "train",
    "loss": 2.34567,
    "grad_norm": 1.5,
    "learning_rate": 1e-5,
    "tokens": 12345,
    "tokens_per_second": 1234.5,
    "peak_memory_gb": 1.234,
    "seconds": 4.5,
    "accuracy": 0.51,
}


def console(terminal=False):
    return Console(
        file=io.StringIO(), force_terminal=terminal, width=200, highlight=False, color_system="standard" if terminal else None
    )


def written(screen):
    return screen.file.getvalue()


def tell(screen, quiet=False, clock=lambda: 0.0):
    """A run of one report."""
    kind = Screen if screen.is_terminal else Terminal
    seen = kind(quiet=quiet, console=screen, clock=clock)
    seen.progress(0, 600)
    seen.progress(10, 600)
    seen.record(ROW)
    seen.record({"step": 10, "split": "valid", "loss": 2.0})
    seen.note("checkpoint written")
    seen.note("3 rows dropped", warning=True)
    seen.finish({"test loss": 1.5, "adapters": "adapters"})
    return written(screen)


def test_plain_lines():
    times = iter([0.0, 20.0])
    assert tell(console(), clock=lambda: next(times)).splitlines() == [
        "step  10/600  train  loss 2.3457  grad_norm 1.500  lr 1.00e-05  tokens 12,345  tok/s 1,234  GB 1.23  accuracy 0.5100"
        "  left 19:40",
        "step  10/600  valid  loss 2.0000",
        "checkpoint written",
        "warning: 3 rows dropped",
        "test loss  1.500",
        "adapters   adapters",
    ]


def test_quiet_prints_results_and_warnings():
    assert tell(console(), quiet=True).splitlines() == ["warning: 3 rows dropped", "test loss  1.500", "adapters   adapters"]


def test_bar_in_a_terminal():
    text = tell(console(terminal=True))
    assert "10/600" in text and "2.3457" in text and "2.0000" in text
    assert text.endswith("\n") and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


def test_markup_in_the_users_text_is_text():
    screen = console()
    Terminal(console=screen).note("[bold]file[/nothing] [0]")
    assert written(screen) == "[bold]file[/nothing] [0]\n"


def test_lines_align():
    lines = [record_line({"step": step, "split": split, "loss": 1.0}, 600) for step in (5, 600) for split in ("train", "test")]
    assert len({line.index("loss") for line in lines}) == 1


def test_time_left_after_a_resume():
    times = iter([100.0, 110.0])
    seen = Terminal(console=console(), clock=lambda: next(times))
    seen.progress(500, 600)
    seen.progress(510, 600)
    seen.record(ROW | {"step": 510})
    assert "left 1:30" in written(seen.console)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=30))
@settings(deadline=None)
def test_sparkline_has_a_character_a_value(values):
    assert len(sparkline(values)) == len(values)


def test_sparkline_and_trend():
    assert sparkline([8, 4, 1]) == "█▄▁" and sparkline([2, 2]) == "▁▁" and sparkline([1, float("nan"), 2]) == "▁ █"
    assert [trend(pair) for pair in ([1.0], [1.0, 1.0], [1.0, 2.0], [2.0, 1.0])] == ["=", "=", "+", "-"]


def test_metrics_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.start({})
    file.record(ROW)
    file.record(ROW | {"step": 20, "loss": float("nan")})
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [ROW, ROW | {"step": 20, "loss": None}]


def test_truncate_keeps_earlier_steps(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 2, 3):
        MetricsFile(path).record({"step": step})
    with path.open("ab") as file:
        file.write(b'{"step": 2, "lo')
    truncate_after(path, 2)
    MetricsFile(path).record({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_without_a_file(tmp_path):
    truncate_after(tmp_path / "metrics.jsonl", 2)
    assert not list(tmp_path.iterdir())


def decode(tokens):
    """Words joined by spaces, the first one's space left out, as SentencePiece does."""
    return " ".join(f"w{token}" if token else "<|end|>" for token in tokens)


@pytest.mark.parametrize(
    ("loss_mask", "expected"),
    [
        ([False, False, True, True], "w1 w2[[ w3 <|end|>]]"),
        ([True, True, True, True], "[[w1 w2 w3 <|end|>]]"),
        ([False, True, False, True], "w1[[ w2]] w3[[ <|end|>]]"),
    ],
)
def test_example_marks_the_scored_part(loss_mask, expected):
    screen = console()
    show_example([1, 2, 3, 0], loss_mask, decode, screen)
    assert written(screen).splitlines()[1] == expected


def test_example_in_a_terminal_uses_color_and_escapes_the_datas_own():
    screen = console(terminal=True)
    show_example([1, 2], [False, True], lambda tokens: "a\x1b[31m"[: len(tokens) * 3], screen)
    assert "[[" not in written(screen) and "\x1b[31m" not in written(screen) and "\\x1b" in written(screen)


def test_long_example_loses_its_middle():
    screen = console()
    show_example(range(1, 1000), [False] * 999, decode, screen, limit=40)
    assert "characters] ..." in written(screen) and len(written(screen)) < 150
    assert shorten("abc", 3) == "abc"


def test_imports_no_mlx():
    code = "import sys, mlxlora.reporting.screen; sys.exit('mlx' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_sampled_run_leads_with_its_reward():
    row = {"step": 1, "split": "train", "loss": -1e-9, "grad_norm": 1.0, "reward": 0.25, "tokens_per_second": 5.0}
    assert record_line(row) == "step 1  train  loss 0.0000  reward 0.2500  grad_norm 1.000  tok/s 5"
    screen = console(terminal=True)
    seen = Screen(METHODS["grpo"].columns, console=screen)
    seen.progress(0, 4)
    seen.record(row)
    seen.record(row | {"step": 2, "reward": 0.5})
    seen.record(row | {"step": 2, "split": "valid", "reward": 0.75})
    seen.finish({})
    text = written(screen)
    assert "0.250" in text and "reward ▁█" in text and "0.7500" in text and "0.0000" not in text


def test_answers_before_and_after():
    screen = console()
    rows = [
        {"prompt": "2 + 2?", "expected": "4", "before": "5", "after": "\x1b[2J4"},
        {"prompt": "a\nb", "expected": "", "before": "", "after": "c"},
    ]
    Terminal(console=screen).answers(rows)
    assert written(screen).splitlines() == [
        *("", "prompt    2 + 2?", "expected  4", "before    5", "after     \\x1b[2J4"),
        *("", "prompt  a b", "before  ", "after   c"),
    ]
