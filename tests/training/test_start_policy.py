"""The reference is the policy as training starts: the base if the adapters are new, else the resumed adapters."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest

from mlxlora.adapters.prepare import load_weights, prepare
from mlxlora.config.options import AdapterOptions
from mlxlora.models.modes import evaluating
from mlxlora.training.reference import cache_of_start, policy_at_start
from tests.support.paths import Outcome
from tests.support.tiny import dense, same, shaken, snapshot

WORDS = ("zero", "one", "two", "three", "four")
REWARDS = "def spread(completion_ids, **columns):\n    return [sum(ids) % 97 / 97 for ids in completion_ids]\n"
KINDS = {
    "lora": (),
    "dora": ("--train-type", "dora"),
    "full": ("--train-type", "full"),
    "qlora": ("--quantize", 4),
    "pissa": ("--init-lora-weights", "pissa"),
}
SAMPLED = ("--max-completion-length", 4, "--group-size", 2, "--temperature", 1.0, "--val-batches", 0)
METHODS = {
    "dpo": (),
    "kto": (),
    "grpo": ("--beta", 0.1, *SAMPLED),
    "online-dpo": SAMPLED,
    "xpo": ("--xpo-alpha", 1e-3, *SAMPLED),
}
pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of `../shared/field/dpo_from_sft_adapter`: numbers to say, and pairs of the right and a wrong word."""
    folder = tmp_path_factory.mktemp("numbers")
    pairs = [{"prompt": f"Say {n}: ", "chosen": word, "rejected": WORDS[(n + 1) % 5]} for n, word in enumerate(WORDS)]
    write(folder / "sft.jsonl", [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs] * 2)
    write(folder / "pairs.jsonl", pairs)
    write(folder / "prompts.jsonl", [{"prompt": pair["prompt"], "answer": pair["chosen"]} for pair in pairs])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))


def records(folder: Path) -> list[dict[str, Any]]:
    rows = map(orjson.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [row for row in rows if row["split"] == "train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of runs of sft by what they train; filled when they are needed."""
    return {}


@pytest.fixture
def train(
    model_folder: Path,
    data: Path,
    trained: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    mlxlora: Callable[..., Outcome],
) -> Callable[..., list[dict[str, Any]]]:
    """The records of a run of two steps of a method, on adapters of sft if `resumed`."""

    def run(method: str, kind: str, *more: Any, resumed: bool, folder: Path) -> list[dict[str, Any]]:
        adapter = ("--model", model_folder, "--num-layers", -1, "--batch-size", 2, *KINDS[kind])
        if resumed and kind not in trained:
            trained[kind] = tmp_path_factory.mktemp(kind)
            options = ("--data", data / "sft.jsonl", "--iters", 6, "--learning-rate", 3e-2, "--adapter-path", trained[kind])
            done = mlxlora("sft", *adapter, *options, "--overwrite", "--answers", 0)
            assert done.code == 0, done.err
        start = ("--resume-adapter-file", trained[kind] / "adapters.safetensors") if resumed else ()
        rows = data / ("pairs.jsonl" if method in ("dpo", "kto") else "prompts.jsonl")
        rewards = () if method in ("dpo", "kto") else ("--reward-file", data / "rewards.py", "--rewards", "spread")
        steps = ("--iters", 2, "--steps-per-report", 1, "--learning-rate", 1e-2, "--answers", 0)
        name = "online-dpo" if method == "xpo" else method
        done = mlxlora(name, *adapter, "--data", rows, *METHODS[method], *rewards, *steps, *start, *more, "--adapter-path", folder)
        assert done.code == 0, done.err
        return records(folder)

    return run


STARTS = [(kind, resumed) for kind in KINDS for resumed in (False, True) if not (kind == "pissa" and resumed)]  # PiSSA is a start


@pytest.mark.parametrize(("kind", "resumed"), STARTS, ids=[f"{kind}-{'resumed' if resumed else 'new'}" for kind, resumed in STARTS])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_compares_the_policy_with_itself(method: str, kind: str, resumed: bool, train: Any, tmp_path: Path) -> None:
    """log π - log π_ref is 0: DPO's loss is log 2, KTO's 1/2, GRPO's KL 0, and rewards are 0; at the second step they are not."""
    first, second = train(method, kind, resumed=resumed, folder=tmp_path / "run")
    if method == "grpo":
        assert abs(first["kl"]) < 1e-7 < 1e-5 < second["kl"]
        return
    if method != "xpo":  # whose loss has a term more
        assert first["loss"] == pytest.approx({"kto": 0.5}.get(method, math.log(2)), abs=2e-5)
    for side in ("rewards/chosen", "rewards/rejected"):
        assert abs(first.get(side, 0.0)) < 2e-5
    assert max(abs(second.get(f"rewards/{side}", 0.0)) for side in ("chosen", "rejected")) > 1e-4


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resumed_twice(kind: str, train: Any, tmp_path: Path) -> None:
    """A run that was stopped has the reference that it began with, not the weights of its checkpoint."""
    options = ("--save-every", 1)
    whole = train("dpo", kind, *options, resumed=True, folder=tmp_path / "whole")
    train("dpo", kind, *options, "--iters", 1, resumed=True, folder=tmp_path / "stopped")
    stopped = train("dpo", kind, *options, "--iters", 2, "--resume", resumed=True, folder=tmp_path / "stopped")
    assert [row["loss"] for row in stopped] == [row["loss"] for row in whole]


def test_a_resumed_run_keeps_the_adapters_that_are_its_reference(
    train: Any, trained: dict[str, Path], tmp_path: Path, mlxlora: Any
) -> None:
    """Options that --resume does not name are those of the run; other adapters would be another reference."""
    train("dpo", "lora", resumed=True, folder=tmp_path / "run")
    shutil.copytree(trained["lora"], tmp_path / "other")
    other = ("--resume-adapter-file", tmp_path / "other" / "adapters.safetensors")
    refused = mlxlora("dpo", "--resume", "--adapter-path", tmp_path / "run", "--iters", 3, *other)
    assert refused.code == 2 and "resume_adapter_file was" in refused.err and refused.err.count("\n") == 1
    assert mlxlora("dpo", "--resume", "--adapter-path", tmp_path / "run", "--iters", 3).code == 0


def test_the_cache_is_of_the_adapters_too(train: Any, cache: Path, tmp_path: Path) -> None:
    """One file for the base, one for the base with these adapters; a second run reads them."""
    for resumed in (False, True, True):
        train("dpo", "lora", "--overwrite", resumed=resumed, folder=tmp_path / "run")
    assert len(list((cache / "reference").glob("*.safetensors"))) == 2


def test_answers_before_training_are_of_the_resumed_adapters(
    train: Any,
    trained: dict[str, Path],
    data: Path,
    model_folder: Path,
    tmp_path: Path,
    mlxlora: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train("dpo", "lora", resumed=True, folder=tmp_path / "sft")
    seen: list[np.ndarray] = []

    def generated(model: Any, *_: Any, **__: Any) -> str:
        seen.append(np.array(dict(model.named_modules())["model.layers.0.self_attn.q_proj"].lora_b))
        return "text"

    monkeypatch.setattr("mlxlora.training.answers.generate", generated)
    start = trained["lora"] / "adapters.safetensors"
    options = ("--model", model_folder, "--num-layers", -1, "--batch-size", 2, "--data", data / "pairs.jsonl")
    done = mlxlora(
        "dpo", *options, "--iters", 1, "--answers", 1, "--resume-adapter-file", start, "--adapter-path", tmp_path / "run"
    )
    assert done.code == 0, done.err
    saved = dict(mx.load(str(start)))["model.layers.0.self_attn.q_proj.lora_b"]
    assert np.array_equal(seen[0], saved) and not np.array_equal(seen[-1], saved)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_the_policy_at_the_start_outlives_training(kind: Any, tmp_path: Path) -> None:
    """Whatever the parameters become, in the context they are those of the start; after it, those of now."""
    model = prepare(dense(), AdapterOptions(train_type=kind, num_layers=-1))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), snapshot_arrays(shaken(model)))
    fresh = prepare(dense(), AdapterOptions(train_type=kind, num_layers=-1))
    load_weights(fresh, tmp_path / "adapters.safetensors")
    options = AdapterOptions(train_type=kind, num_layers=-1, resume_adapter_file=str(tmp_path / "adapters.safetensors"))
    policy, tokens = policy_at_start(fresh, options), mx.array([[1, 2, 3]])
    with evaluating(fresh):
        start = np.array(fresh(tokens))
    now = snapshot(shaken(fresh).trainable_parameters())
    with policy() as reference, evaluating(reference):
        assert np.array_equal(reference(tokens), start)
    assert same(snapshot(fresh.trainable_parameters()), now)
    with evaluating(fresh):
        assert not np.array_equal(fresh(tokens), start)


def snapshot_arrays(model: Any) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in snapshot(model.trainable_parameters()).items()}


def test_the_cache_is_the_base_s_without_earlier_adapters(tmp_path: Path) -> None:
    model, cache = prepare(dense(), AdapterOptions(num_layers=-1)), tmp_path / "base.safetensors"
    resumed = AdapterOptions(num_layers=-1, resume_adapter_file="any")
    assert cache_of_start(cache, model, AdapterOptions(num_layers=-1)) == cache
    first = cache_of_start(cache, model, resumed)
    assert first != cache and cache_of_start(cache, model, resumed) == first
    assert cache_of_start(cache, model, AdapterOptions(num_layers=-1, scale=3.0, resume_adapter_file="any")) != first
    assert cache_of_start(cache, shaken(model), resumed) != first


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_field_case(kind: str, shared: Any, tmp_path: Path, mlxlora: Any) -> None:
    """Rows from the field: sft, then dpo on its adapters."""
    from mlxlora import starter

    rows = shared("field/dpo_from_sft_adapter")
    shutil.copytree(rows, tmp_path / "rows")
    model = ("--model", starter.model_path(), "--num-layers", 2, "--batch-size", 2, "--answers", 0, *KINDS[kind])
    first = ("--iters", 5, "--learning-rate", 1e-2, "--adapter-path", tmp_path / "sft")
    done = mlxlora("sft", *model, "--data", tmp_path / "rows" / "train.jsonl", *first)
    assert done.code == 0, done.err
    second = ("--iters", 1, "--resume-adapter-file", tmp_path / "sft" / "adapters.safetensors", "--adapter-path", tmp_path / "dpo")
    done = mlxlora("dpo", *model, "--data", tmp_path / "rows" / "pairs.jsonl", *second)
    assert done.code == 0, done.err
    (row,) = records(tmp_path / "dpo")
    assert row["loss"] == pytest.approx(math.log(2), abs=2e-5) and abs(row["rewards/margins"]) < 2e-4
