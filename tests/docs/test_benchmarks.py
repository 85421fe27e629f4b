"""The benchmarks run and write what they promise; how fast anything is, no test asserts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.common import cost, interleaved, markdown  # noqa: E402
from benchmarks.sft import cases, definition, file_lengths, make_rows, mixed_lengths, our_epoch, quick_cases, their_epoch  # noqa: E402
from tests.support.warm import python  # noqa: E402

KEYS = {"case": str, "ours": int, "peer": int, "speed_ratio": float, "memory_ratio": float, "cpu_ratio": float}


def test_sft_writes_its_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    command = [python(), "-m", "benchmarks.sft", "--quick", "--device", "cpu", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert [row["case"] for row in rows] == [case.name for case in quick_cases()]
    for row in rows:
        assert row["case"] in done.stdout
        assert {key: type(row[key]) for key in KEYS} == KEYS
        assert min(row["ours"], row["peer"], row["speed_ratio"], row["memory_ratio"]) > 0


OTHERS = {  # the modules with the columns that each row must have as numbers
    **dict.fromkeys(("attention", "grpo", "logprobs", "preference", "recurrences", "rollouts", "startup"), ("ours",)),
    "kernels": ("us", "times", "ms"),
    "normalization": ("logps", "entropy", "dlogps", "dentropy"),
    "scaling": (),
}
SHORTER = {"startup": ("--device", "cpu", "--only=first step"), "scaling": ("--seconds", "0.3")}  # they start processes
PEERS = ("peer", "speed_ratio", "memory_ratio")  # a number, or nothing and why where the peer is not installed
ALWAYS = ("attention", "logprobs", "recurrences", "rollouts", "startup")  # their peers are what we depend on


@pytest.mark.parametrize("name", OTHERS)
def test_the_others_write_their_rows(name: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    flags = SHORTER.get(name, ("--device", "cpu"))
    command = [python(), "-m", f"benchmarks.{name}", "--quick", *flags, "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = json.loads(file.read_text())
    assert rows and done.stdout.count("\n|") >= len(rows)
    assert all(row[column] > 0 for row in rows for column in OTHERS[name])
    numbers = [row[column] for row in rows for column in PEERS if isinstance(row.get(column), int | float)]
    assert all(number > 0 for number in numbers) and (numbers or name not in ALWAYS)


def test_every_benchmark_is_run() -> None:
    """Those with --quick; the architectures have tests of their own."""
    quick = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if "--quick" in path.read_text() or "flags(" in path.read_text()
    }
    assert quick - {"common", "small"} == {*OTHERS, "sft"}


def test_both_sides_start_from_the_same_loss() -> None:
    case = quick_cases()[1]
    rows = make_rows(case)
    exact = definition(case, rows[: case.batch_size])
    assert our_epoch(case, rows)[1] == pytest.approx(exact, rel=1e-5)
    assert their_epoch(case, rows)[1] == pytest.approx(exact, rel=0.05)  # mlx-lm scores a pad token in each row, too


def test_cases_have_scored_tokens_and_whole_batches() -> None:
    for case in [*cases(mixed_lengths(32)), *quick_cases()]:
        assert all(0 < loss_mask <= length for length, loss_mask in case.lengths)
        assert len(case.lengths) % case.batch_size == 0, "mlx-lm drops what does not fill a batch"


def test_lengths_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "12345678", "answer": "1234"}\n{"prompt": "1234", "completion": "12345678"}\n')
    assert file_lengths(str(file), 2) == [(4, 1), (4, 2)]
    with pytest.raises(SystemExit, match="2 rows, 3 are needed"):
        file_lengths(str(file), 3)


def test_costs_are_medians_and_the_calls_take_turns() -> None:
    calls: list[str] = []
    interleaved([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    assert calls == ["a", "b", "b", "a"]
    assert cost(lambda: None).peak == 0


def test_a_table_escapes_bars() -> None:
    assert markdown([{"a": "x|y"}], {"a": "A"}).endswith("| x\\|y |")
