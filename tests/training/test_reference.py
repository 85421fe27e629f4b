"""The reference's log-probabilities: what is computed, what is kept on disk, and what is believed of it."""

import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxlora.adapters.prepare import disabled, prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import MicroBatch, collate
from mlxlora.data.tokenize import Example
from mlxlora.models.logprobs import scorer
from mlxlora.training import reference
from mlxlora.training.reference import log_probabilities, reference_cache_file, referenced, with_reference
from tests.support.tiny import dense, example, shaken


@pytest.fixture(scope="module")
def model() -> Any:
    return dense()


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return [example(seed, train_prompt=seed % 2 == 1) for seed in range(7)]


@pytest.fixture
def loss_mask(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many sequences each call scored."""
    seen: list[int] = []
    real = log_probabilities

    def counted(examples: Sequence[Example], *rest: Any) -> Any:
        seen.append(len(examples))
        return real(examples, *rest)

    monkeypatch.setattr(reference, "log_probabilities", counted)
    return seen


def direct(model: Any, e: Example) -> np.ndarray:
    """Log-probabilities of the scored tokens of one sequence, without padding and without any of our code."""
    logits = np.array(model(mx.array(e.tokens[None, :-1]))[0].astype(mx.float32)).astype(np.float64)
    logps = logits[np.arange(len(e.tokens) - 1), e.tokens[1:]] - np.log(np.exp(logits).sum(-1))
    return logps[e.loss_mask[1:]]


def right(found: Sequence[Example], model: Any) -> None:
    for e in found:
        np.testing.assert_allclose(e.ref_logps, direct(model, e), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equal_to_the_direct_computation(batch_size: int, model: Any, examples: list[Example]) -> None:
    right(with_reference(examples, scorer(model), batch_size=batch_size), model)


def test_equal_sequences_are_scored_once(model: Any, examples: list[Example], loss_mask: list[int]) -> None:
    again = [evolve(e, location="other.jsonl:1") for e in examples[:3]]
    found = with_reference([*examples, *again, *examples], scorer(model), batch_size=4)
    assert loss_mask == [len(examples)] and [e.location for e in found[7:10]] == ["other.jsonl:1"] * 3
    right(found, model)
    elsewhere = evolve(examples[0], loss_mask=np.arange(len(examples[0].tokens)) > 0)
    right(with_reference([examples[0], elsewhere], scorer(model), batch_size=4), model)
    assert loss_mask[-1] == 2


def test_prompts_that_are_shared_are_read_once(model: Any, examples: list[Example], loss_mask: list[int]) -> None:
    def after(prompt: np.ndarray, *answer: int) -> Example:
        tokens = np.concatenate([prompt, answer]).astype(np.int32)
        return Example(tokens, np.arange(len(tokens)) >= len(prompt), None, "pairs.jsonl:1")

    prompts = [np.array([5, 3, 8, 2, 9]), np.array([4, 4, 1])]
    a, b, c = after(prompts[0], 1, 2), after(prompts[0], 7, 7, 3), after(prompts[0], 6)
    d, e = after(prompts[1], 2), after(prompts[1], 9, 8)
    pairs = [a, b, d, e, a, b, a, c, d, d]  # a pair again, a half of one, a pair of equals
    found = with_reference(pairs, scorer(model), batch_size=4, together=2)
    assert sum(loss_mask) == 5
    right(found, model)


def test_a_second_run_reads(model: Any, examples: list[Example], loss_mask: list[int], tmp_path: Path) -> None:
    notes: list[str] = []
    first = filled(tmp_path / "cache", model, examples[:4], notes)
    second = filled(tmp_path / "cache", model, examples[:4], notes)
    assert notes == ["reference: scoring 4 sequences"] and loss_mask == [4, 1]  # one as a probe
    assert all(np.array_equal(a.ref_logps, b.ref_logps) for a, b in zip(first, second, strict=True))
    right(filled(tmp_path / "cache", model, examples, notes), model)
    right(filled(tmp_path / "cache", model, examples[2:], notes), model)
    assert notes[1:] == ["reference: scoring 3 sequences"] and loss_mask[2:] == [1, 3, 1]


def filled(cache: Path, model: Any, examples: list[Example], notes: list[str]) -> list[Example]:
    return with_reference(examples, scorer(model), batch_size=4, cache=cache, note=notes.append)


@pytest.fixture(scope="module")
def written(model: Any, examples: list[Example], tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("written") / "cache"
    filled(cache, model, examples[:3], [])
    return cache


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit(place: float, bit: int, written: Path, model: Any, examples: list[Example]) -> None:
    content = bytearray(written.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    survives(bytes(content), written, model, examples)


@given(length=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_truncated_file(length: float, written: Path, model: Any, examples: list[Example]) -> None:
    content = written.read_bytes()
    notes = survives(content[: int(length * len(content))], written, model, examples)
    assert "damaged" in notes[0]


def survives(content: bytes, written: Path, model: Any, examples: list[Example]) -> list[str]:
    """The numbers are right whatever the file holds; if it cannot be used, a note says so and it is built again."""
    cache, notes = written.with_name("damaged"), []
    cache.write_bytes(content)
    right(filled(cache, model, examples[:3], notes), model)
    assert not notes or ("damaged" in notes[0] and notes[1] == "reference: scoring 3 sequences")
    again: list[str] = []
    filled(cache, model, examples[:3], again)
    assert not again
    return notes


def test_a_stale_cache(model: Any, examples: list[Example], written: Path, tmp_path: Path) -> None:
    """The weights changed, but not the name of the file: the probe notices."""
    cache, notes = tmp_path / "cache", []
    shutil.copy(written, cache)
    other = shaken(dense(), 0.05)
    right(filled(cache, other, examples, notes), other)
    assert "stale" in notes[0] and notes[1] == "reference: scoring 7 sequences"


def test_a_forged_cache(model: Any, examples: list[Example], written: Path, tmp_path: Path) -> None:
    cache, notes = tmp_path / "cache", []
    known = {digest: logps + 0.5 for digest, logps in reference._read(written).items()}
    reference._write(cache, known)
    right(filled(cache, model, examples[:3], notes), model)
    assert "stale" in notes[0]


def test_a_cache_that_cannot_be_written(model: Any, examples: list[Example], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    notes: list[str] = []
    right(filled(tmp_path / "file" / "cache", model, examples[:2], notes), model)
    assert "cannot be written" in notes[-1]


def test_the_key_is_the_models_files(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    seen = {
        reference_cache_file(str(folder), ""),
        reference_cache_file(str(model_folder), ""),
        reference_cache_file("org/name", ""),
        reference_cache_file("org/other", ""),
    }
    assert len(seen) == 4 and {path.parent for path in seen} == {tmp_path / "cache" / "reference"}
    before = reference_cache_file(str(folder), "")
    assert before == reference_cache_file(f"{folder}/", "") == reference_cache_file(str(folder / ".." / "model"), "")
    for name in ("model.safetensors", "config.json"):
        stat = (folder / name).stat()
        os.utime(folder / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert reference_cache_file(str(folder), "") not in seen
        seen.add(reference_cache_file(str(folder), ""))


def test_the_default_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLXLORA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert reference_cache_file("org/name", "").parent == tmp_path / ".cache" / "mlxlora" / "reference"


# --- from the command line ---------------------------------------------------------------------------


@pytest.fixture
def command(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Two steps of two pairs out of nine, and four to validate on."""
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    for split, letters in (("train", "abcdefghi"), ("valid", "jklm")):
        rows = [{"prompt": "q", "chosen": letter, "rejected": letter * 2} for letter in letters]
        (tmp_path / "data" / f"{split}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    data = ("--model", model_folder, "--data", tmp_path / "data", "--adapter-path", tmp_path / "run", "--overwrite")
    return "dpo", *data, "--num-layers", -1, "--no-shuffle", "--iters", 2, "--batch-size", 2, "--val-batches", 1


def test_only_what_is_used_is_scored(command: tuple[Any, ...], mlxlora: Any) -> None:
    assert scorings(mlxlora(*command)) == [8, 4]
    assert scorings(mlxlora(*command)) == []
    assert scorings(mlxlora(*command, "--val-batches", 0, "--iters", 4)) == [8]
    assert scorings(mlxlora(*command, "--val-batches", -1, "--iters", 99)) == [2, 4]


def scorings(outcome: Any) -> list[int]:
    assert outcome.code == 0, outcome.err
    return [int(line.split("scoring ")[1].split()[0]) for line in outcome.out.splitlines() if "reference: scoring" in line]


def test_without_a_cache(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    assert scorings(mlxlora(*command, "--no-reference-cache")) == [8, 4]
    assert not (tmp_path / "cache").exists()
    assert scorings(mlxlora(*command)) == [8, 4]


def test_a_damaged_cache_is_noted(command: tuple[Any, ...], tmp_path: Path, mlxlora: Any) -> None:
    assert mlxlora(*command).code == 0
    (cache,) = (tmp_path / "cache" / "reference").iterdir()
    before = metrics(tmp_path)
    cache.write_bytes(cache.read_bytes()[:-3])
    outcome = mlxlora(*command)
    assert "is damaged" in outcome.out and scorings(outcome) == [8, 4]
    assert metrics(tmp_path) == before


def metrics(folder: Path) -> list[float]:
    return [orjson.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_bytes().splitlines()]


# --- during the run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_referenced(kind: str, examples: list[Example]) -> None:
    """The column is the model's without its adapters, whatever they have become since."""
    base, model = dense(), prepare(dense(), AdapterOptions(train_type=kind, num_layers=-1))
    make = referenced(lambda items, _: MicroBatch(collate(items), 0, ()), partial(disabled, model), temperature=1.0)
    model.train()
    for _ in range(2):
        shaken(model)
        batch = make(examples, 0).batch
        assert model.training
        with disabled(model):
            assert np.array_equal(batch.ref_logps, scorer(model)(batch, gradient=False)[0])
        np.testing.assert_allclose(batch.ref_logps, scorer(base)(batch, gradient=False)[0], rtol=1e-6, atol=1e-6)
        assert np.abs(np.array(scorer(model)(batch, gradient=False)[0] - batch.ref_logps)).max() > 1e-2


def test_referenced_by_another_model(examples: list[Example]) -> None:
    other = shaken(dense())
    batch = referenced(lambda items, _: MicroBatch(collate(items), 0, ()), partial(nullcontext, other), temperature=2.0)(
        examples, 0
    ).batch
    np.testing.assert_allclose(batch.ref_logps, scorer(other, temperature=2.0)(batch, gradient=False)[0], rtol=1e-6, atol=1e-6)
