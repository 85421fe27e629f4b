"""KTO from rows to adapters: labels, mismatched completions, the reference point, resume."""

import re
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
import orjson
import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load

from mlxlora.data.batching import MicroBatch, collate
from mlxlora.data.labeled import Judged, with_mismatched
from mlxlora.data.rows import Row
from mlxlora.data.sources import Context
from mlxlora.data.tokenize import Example
from mlxlora.errors import InputError
from mlxlora.models.logprobs import scorer
from mlxlora.objectives.kto import kto
from mlxlora.training.micro_batch import divide_batch
from mlxlora.training.unpaired import unpaired

LABELED = [{"prompt": f"what is {n}? ", "completion": "abc" * (n % 3 + 1), "label": n % 2 == 0} for n in range(1, 8)]
PAIR = {"prompt": "who? ", "chosen": "me", "rejected": "nobody"}
QUICK = ("--iters", 4, "--num-layers", -1, "--steps-per-report", 1, "--learning-rate", 1e-2)


@pytest.fixture(scope="module")
def loaded(model_folder: Path) -> tuple[nn.Module, Any]:
    return load(str(model_folder))[:2]


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def prepared(tokenizer: Any, rows: list[dict], **options: Any) -> Any:
    source = unpaired("rows.jsonl", **options)
    found = [source.prepare(Row(row, "rows.jsonl", line), tokenizer) for line, row in enumerate(rows, 1)]
    return source, source.arrange([item for item in found if item is not None])


def records(folder: Path) -> list[dict]:
    return [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


# --- rows ----------------------------------------------------------------------------------------


def test_a_completion_is_trained_and_labeled(loaded: Any) -> None:
    _, items = prepared(loaded[1], [*LABELED[:2], PAIR])
    assert [item.label for item in items] == [False, True, True, False]
    loss_mask = [loaded[1].decode(i.example.tokens[i.example.loss_mask].tolist()) for i in items]
    assert loss_mask == ["abcabc<|im_end|>", "abcabcabc<|im_end|>", "me<|im_end|>", "nobody<|im_end|>"]


def test_mismatched_completions_follow_the_prompts_of_others(loaded: Any) -> None:
    _, items = prepared(loaded[1], [*LABELED[:2], PAIR])
    texts = [loaded[1].decode(i.mismatched.tokens.tolist()) for i in items]
    assert texts == [
        "what is 1? nobody<|im_end|>",
        "what is 2? abcabc<|im_end|>",
        "who? abcabcabc<|im_end|>",
        "who? abcabcabc<|im_end|>",  # the completion just before has the same prompt
    ]
    assert [int(i.mismatched.loss_mask.sum()) for i in items] == [7, 7, 10, 10]


@given(prompts=st.lists(st.integers(0, 3), min_size=2, max_size=12), limit=st.integers(3, 12))
@settings(deadline=None, max_examples=60)
def test_a_partner_has_another_prompt(prompts: list[int], limit: int) -> None:
    """Sequence i is [prompt, 100 + i, 200 + i]: what it is joined with can be read from the tokens."""

    def judged(i: int, prompt: int) -> tuple[Judged, ...]:
        tokens = np.array([prompt, 100 + i, 200 + i], np.int32)
        return (Judged(Example(tokens, np.array([False, True, True]), None, f"rows.jsonl:{i + 1}"), True),)

    rows = [judged(i, prompt) for i, prompt in enumerate(prompts)]
    if len(set(prompts)) == 1:
        with pytest.raises(InputError, match=r"rows.jsonl:1: all rows have one prompt"):
            with_mismatched(rows, limit)
        return
    for prompt, item in zip(prompts, with_mismatched(rows, limit), strict=True):
        assert item.mismatched is not None
        own, first, second = item.mismatched.tokens.tolist()
        assert own == prompt and prompts[first - 100] != prompt and second == first + 100
        assert item.mismatched.loss_mask.tolist() == [False, True, True]


def test_without_a_reference_point_nothing_is_joined(loaded: Any) -> None:
    source, items = prepared(loaded[1], [LABELED[0]], reference_point=False)
    assert [item.mismatched for item in items] == [None]
    assert len(source.examples(items[0])) == 1 and not source.live


def test_over_long_rows_are_cut_or_dropped(loaded: Any) -> None:
    rows = [*LABELED[:2], {"prompt": "y" * 40, "completion": "a", "label": True}]
    source, items = prepared(loaded[1], rows, max_seq_length=16)
    assert len(items) == 2 and all(len(e.tokens) <= 16 for item in items for e in source.examples(item))


# --- the reference point --------------------------------------------------------------------------


def micro_of(model: nn.Module, tokenizer: Any, rows: list[dict], shift: float) -> tuple[MicroBatch, list[Judged]]:
    """The micro-batch of all rows, with a reference that finds every token less likely by `shift` nats."""
    source, items = prepared(tokenizer, rows)
    score = scorer(model)
    known = [
        source.rebuild(item, [evolve(e, ref_logps=one(score, e) - np.float32(shift)) for e in source.examples(item)])
        for item in items
    ]
    return source.make(Context(model, tokenizer, 0))(known, 0), known


def one(score: Any, example: Example) -> np.ndarray:
    return np.array(score(collate([example]))[0])[: int(example.loss_mask.sum())]


@pytest.mark.parametrize("shift", [0.25, -0.25])
def test_it_is_the_mean_log_ratio_of_mismatched_completions(loaded: Any, shift: float) -> None:
    micro, items = micro_of(loaded[0], loaded[1], LABELED[:4], shift)
    tokens = np.mean([item.mismatched.loss_mask.sum() for item in items])  # type: ignore[union-attr]
    np.testing.assert_allclose(np.array(micro.batch.reference_point), max(shift * tokens, 0.0), rtol=1e-4)
    assert micro.batch.label.tolist() == [False, True, False, True]


def test_it_follows_the_policy(model_folder: Path) -> None:
    model, tokenizer = load(str(model_folder))[:2]
    source, items = prepared(tokenizer, LABELED[:4])
    score = scorer(model)
    known = [source.rebuild(item, [evolve(e, ref_logps=one(score, e) - 1) for e in source.examples(item)]) for item in items]
    make = source.make(Context(model, tokenizer, 0))
    before = make(known, 0).batch.reference_point
    model.update({"lm_head": {"weight": model.lm_head.weight * 3}})  # type: ignore[attr-defined]
    after = make(known, 1).batch.reference_point
    assert abs(before[0].item() - after[0].item()) > 0.1  # type: ignore[index]


def test_divided_batches_keep_it(loaded: Any) -> None:
    """A mean over the whole batch, so a divided batch keeps it."""
    micro, _ = micro_of(loaded[0], loaded[1], LABELED[:4], 0.25)
    objective, score = kto(), scorer(loaded[0])
    whole = objective(*score(micro.batch))[0].item()
    parts = divide_batch(micro, 3)
    counts = objective.counts(micro.batch)
    assert len(parts) == 2
    np.testing.assert_allclose(sum(objective(*score(p.batch), counts)[0].item() for p in parts), whole, rtol=1e-5)


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [LABELED, [*LABELED[:5], PAIR]], ids=["labeled", "pairs too"])
def test_it_trains(rows: list[dict], model_folder: Path, tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "data" / "train.jsonl", rows)
    write(tmp_path / "data" / "valid.jsonl", rows[2:6])
    command = ("kto", "--model", model_folder, "--data", tmp_path / "data", *QUICK, "--adapter-path", tmp_path / "run")
    outcome = mlxlora(*command, "--iters", 12, "--batch-size", 7)
    assert outcome.code == 0, outcome.err
    found = [r for r in records(tmp_path / "run") if r["split"] == "train"]
    assert found[0]["kto"] == pytest.approx(0.5, abs=1e-4) and found[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert found[-1]["loss"] < found[0]["loss"] - 0.01 and found[-1]["kl"] >= 0
    assert found[-1]["rewards/chosen"] > found[-1]["rewards/rejected"]


@pytest.mark.parametrize("flags", [("--train-type", "full"), ("--loss-type", "apo_zero_unpaired")], ids=str)
def test_variants(flags: tuple, model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    data = write(tmp_path / "rows.jsonl", LABELED)
    flags = (*QUICK, *flags, "--learning-rate", 1e-3, "--no-reference-cache", "--batch-size", 7)
    assert mlxlora("kto", "--model", model_folder, "--data", data, *flags, "--adapter-path", tmp_path / "run").code == 0
    found = [r["loss"] for r in records(tmp_path / "run")]
    assert found[0] == pytest.approx(0.5, abs=1e-4) and found[-1] < found[0]


def test_resumed(model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    data = write(tmp_path / "rows.jsonl", LABELED)
    command = ("kto", "--model", model_folder, "--data", data, *QUICK, "--no-reference-cache", "--dropout", 0.2, "--batch-size", 2)
    command += ("--save-every", 3, "--grad-accumulation-steps", 2)
    assert mlxlora(*command, "--iters", 8, "--adapter-path", tmp_path / "whole").code == 0
    assert mlxlora(*command, "--iters", 5, "--adapter-path", tmp_path / "stopped").code == 0
    assert mlxlora(*command, "--iters", 8, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    for name in ("loss", "kl", "grad_norm"):
        assert [r[name] for r in records(tmp_path / "stopped")] == [r[name] for r in records(tmp_path / "whole")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "rows.jsonl:1: .*'label'"),
        ([{"prompt": "a", "completion": "b", "label": "yes"}], "rows.jsonl:1: 'label' must be true or false, got str 'yes'"),
        ([LABELED[0] | {"completion": "z"}, LABELED[0]], "rows.jsonl:1: all rows have one prompt"),
    ],
)
def test_bad_rows(rows: list[dict], message: str, model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    data = write(tmp_path / "rows.jsonl", rows)
    flags = ("--batch-size", 1, "--adapter-path", tmp_path / "run")
    outcome = mlxlora("kto", "--model", model_folder, "--data", data, *flags)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and re.search(message, outcome.err), outcome.err
