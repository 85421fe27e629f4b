"""Metrics over several batches: each is the statistic of all values that there were, however the batches divide them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import orjson
import pytest

from mlxlora.adapters.prepare import load, prepare
from mlxlora.batch import Batch
from mlxlora.config.options import AdapterOptions
from mlxlora.data.batching import MicroBatch, collate, singles
from mlxlora.data.pooled import Pooled
from mlxlora.models.logprobs import scorer
from mlxlora.objectives.scores import sum_logps
from mlxlora.objectives.terms import nll, watch_labels
from mlxlora.training.evaluate import make_evaluate, mean_measures
from mlxlora.training.loop import LoopOptions, train
from mlxlora.training.progress import Progress
from mlxlora.training.step import make_step
from tests.support.tiny import dense, example

pytestmark = pytest.mark.usefixtures("eager")
OBJECTIVE = nll() + watch_labels("logps", sum_logps)


def batch(seed: int, labels: Sequence[bool]) -> Batch:
    examples = [example(seed * 10 + i, longest=20) for i in range(len(labels))]
    return collate(examples, label=mx.array(list(labels)))


LABELS = [(True,), (True, False, True), (False,), (True, True)]
BATCHES = [batch(seed, labels) for seed, labels in enumerate(LABELS)]


def expected(side: bool) -> float:
    """The mean of Σ log π over all completions of a label."""
    found = []
    for labels, one in zip(LABELS, BATCHES, strict=True):
        logps, sequence = np.array(scorer(model())(one)[0]), np.array(one.sequence)
        found += [logps[sequence == s].sum() for s, label in enumerate(labels) if label == side]
    return float(np.mean(found))


def model() -> Any:
    mx.random.seed(0)
    return prepare(dense(), AdapterOptions(num_layers=-1, rank=2))


def micro(one: Batch, **metrics: Pooled) -> MicroBatch:
    return MicroBatch(one, one.tokens.size, ("row",), metrics, groups=singles(one.sequences))


def window(groups: Sequence[Sequence[MicroBatch]]) -> dict[str, float]:
    """The report of steps that change nothing, on these batches."""
    progress, step = Progress(), make_step(model(), optim.SGD(0.0), OBJECTIVE)
    train(step, iter([tuple(group) for group in groups]), progress, len(groups), (), LoopOptions())
    return progress.window.report()


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_a_label_that_a_batch_lacks_does_not_count(accumulated: int) -> None:
    micros = [micro(one) for one in BATCHES]
    seen = window([micros[start : start + accumulated] for start in range(0, 4, accumulated)])
    assert seen["logps/chosen"] == pytest.approx(expected(True), rel=1e-5)
    assert seen["logps/rejected"] == pytest.approx(expected(False), rel=1e-5)


def test_a_label_that_no_batch_has_is_not_reported() -> None:
    good = [micro(one) for labels, one in zip(LABELS, BATCHES, strict=True) if all(labels)]
    seen = window([good])
    assert "logps/chosen" in seen and "logps/rejected" not in seen
    evaluated = make_evaluate(model(), OBJECTIVE, scorer(model()))(good)
    assert "logps/chosen" in evaluated and "logps/rejected" not in evaluated


def test_evaluation_pools_too() -> None:
    seen = make_evaluate(model(), OBJECTIVE, scorer(model()))(map(micro, BATCHES))
    assert seen["logps/chosen"] == pytest.approx(expected(True), rel=1e-5)
    assert seen["logps/rejected"] == pytest.approx(expected(False), rel=1e-5)


def test_the_loss_is_the_mean_of_the_steps_and_the_sum_of_its_terms() -> None:
    """As its terms are; the mean over tokens would be another number."""
    alone = [window([[micro(one)]])["loss"] for one in BATCHES]
    seen = window([[micro(one)] for one in BATCHES])
    assert seen["loss"] == seen["nll"] == pytest.approx(np.mean(alone), rel=1e-6)


VALUES = [[3.0, 9.0], [1.0], [np.nan, 4.0, 8.0], [np.nan]]
PRESENT = [3.0, 9.0, 1.0, 4.0, 8.0]
STATISTICS = {"mean": np.mean, "min": np.min, "max": np.max, "std": lambda values: np.std(values, ddof=1)}


@pytest.mark.parametrize("accumulated", [1, 2, 4])
def test_what_sources_measure_is_pooled(accumulated: int) -> None:
    micros = [
        micro(one, **{statistic: Pooled.of(values, statistic) for statistic in STATISTICS})  # type: ignore[arg-type]
        for one, values in zip(BATCHES, VALUES, strict=True)
    ]
    seen = window([micros[start : start + accumulated] for start in range(0, 4, accumulated)])
    for statistic, of in STATISTICS.items():
        assert seen[statistic] == pytest.approx(of(PRESENT), rel=1e-12)


def test_validation_of_what_is_sampled_is_pooled() -> None:
    micros = [micro(one, reward=Pooled.of(values)) for one, values in zip(BATCHES, VALUES, strict=True)]
    assert mean_measures(micros) == {"loss": -np.mean(PRESENT), "reward": np.mean(PRESENT)}
    assert np.isnan(mean_measures([micro(BATCHES[0], reward=Pooled.of([np.nan]))])["loss"])


# --- through the command line -----------------------------------------------------------------------


def records(folder: Path) -> list[dict[str, Any]]:
    rows = map(orjson.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [row for row in rows if row["split"] == "train"]


def kto_rows(labels: Sequence[bool]) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {n}: ", "completion": "one two three"[: 3 + n], "label": label} for n, label in enumerate(labels)]


@pytest.mark.parametrize("case", ["mixed", "good", "mixed of the field", "good of the field"])
def test_kto(case: str, shared: Any, tmp_path: Path, model_folder: Path, mlxlora: Any) -> None:
    """Means over a window are those of the completions in it; a label that is not there is not reported."""
    from mlxlora import starter

    if case.endswith("field"):
        data, model = shared(f"field/kto_edges/{case.split()[0]}.jsonl"), starter.model_path()
        labels = [orjson.loads(line)["label"] for line in data.read_bytes().splitlines()]
    else:
        labels = [True] * 6 if case == "good" else [True, False, False, True, False, False]
        data, model = tmp_path / "rows.jsonl", model_folder
        data.write_bytes(b"\n".join(map(orjson.dumps, kto_rows(labels))))
    steps = len(labels)
    options = ("--model", model, "--data", data, "--batch-size", 1, "--iters", steps, "--learning-rate", 1e-12, "--answers", 0)
    for name, every in (("each", 1), ("all", steps)):
        done = mlxlora("kto", *options, "--steps-per-report", every, "--adapter-path", tmp_path / name)
        assert done.code == 0, done.err
    each, (whole,) = records(tmp_path / "each"), records(tmp_path / "all")
    for side, label in (("chosen", True), ("rejected", False)):
        seen = [row[f"logps/{side}"] for row in each if f"logps/{side}" in row]
        assert len(seen) == labels.count(label)
        if seen:
            assert whole[f"logps/{side}"] == pytest.approx(np.mean(seen), rel=1e-5)
        assert (f"logps/{side}" in whole) == bool(seen)


def test_rewards_that_are_none(shared: Any, tmp_path: Path, mlxlora: Any) -> None:
    """Each function's mean is over the prompts that it rewards."""
    from mlxlora import starter

    folder = shared("field/grpo_none_rewards")
    options = ("--model", starter.model_path(), "--data", folder / "prompts.jsonl", "--reward-file", folder / "rewards.py")
    rewards = ("--rewards", "math_only", "--rewards", "code_only", "--rewards", "never")
    steps = ("--iters", 4, "--batch-size", 1, "--group-size", 2, "--max-completion-length", 4, "--steps-per-report", 4)
    done = mlxlora("grpo", *options, *rewards, *steps, "--answers", 0, "--adapter-path", tmp_path / "run")
    assert done.code == 0, done.err
    (row,) = records(tmp_path / "run")
    assert row["rewards/math_only/mean"] == 1.0 and row["rewards/code_only/mean"] == 0.5
    assert row["reward"] == 0.75 and "rewards/never/mean" not in row


def test_token_metrics_of_sft(tmp_path: Path, model_folder: Path, mlxlora: Any) -> None:
    """Entropy and accuracy by hand, from the logits of the untrained model; tokens of the rows, added up over the run."""
    rows = [{"prompt": f"Say {n}: ", "completion": "one two three"[: 3 + n]} for n in range(4)]
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    options = ("--model", model_folder, "--data", data, "--batch-size", 4, "--iters", 3, "--learning-rate", 1e-12, "--answers", 0)
    done = mlxlora("sft", *options, "--steps-per-report", 1, "--mask-prompt", "--adapter-path", tmp_path / "run")
    assert done.code == 0, done.err
    language_model, tokenizer = load(str(model_folder))
    entropies, hits, count = [], [], 0
    for row in rows:
        prompt, answer = (tokenizer.encode(row[name], add_special_tokens=False) for name in ("prompt", "completion"))
        tokens = [*prompt, *answer, tokenizer.eos_token_id]
        probs = np.array(mx.softmax(language_model(mx.array([tokens[:-1]])), axis=-1), np.float64)[0, len(prompt) - 1 :]
        entropies += (-(probs * np.log(probs)).sum(axis=-1)).tolist()
        hits += (probs.argmax(axis=-1) == np.array(tokens[len(prompt) :])).tolist()
        count += len(tokens)
    for step, seen in enumerate(records(tmp_path / "run"), 1):
        assert seen["entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)
        assert seen["mean_token_accuracy"] == pytest.approx(np.mean(hits))
        assert seen["num_tokens"] == seen["tokens"] == step * count
