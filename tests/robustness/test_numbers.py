"""Numbers stay sane: every case of docs/numbers.md, as real runs of tiny models."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest

from mlxlora import objectives
from mlxlora.data.batching import collate
from mlxlora.models.distribution import statistics
from mlxlora.rollouts.sampling import Sampling, draw_tokens, uniforms
from tests.support.tiny import example

pytestmark = pytest.mark.usefixtures("eager")  # types and options of their own would each build kernels of their own
Rows = Sequence[dict[str, Any]]
PAIRS = [{"prompt": "ab", "chosen": c, "rejected": "no"} for c in ("yes", "yea", "yep", "aye")]
PROMPTS = [{"prompt": p, "answer": "4"} for p in ("1+3", "2+2", "3+1", "0+4")]
TEXTS = [{"prompt": "ab", "completion": c} for c in ("yes", "yea", "yep", "aye")]
LABELS = [{"prompt": f"a{c}", "completion": c, "label": i % 2 == 0} for i, c in enumerate(("yes", "no", "yep", "nay"))]
ROWS: dict[str, Rows] = {
    **dict.fromkeys(("sft", "distill"), TEXTS),
    **dict.fromkeys(("dpo", "orpo", "cpo"), PAIRS),
    **dict.fromkeys(("grpo", "online-dpo", "gkd"), PROMPTS),
    "kto": LABELS,
}
SAMPLED = ("--max-completion-length", 4)
OPTIONS: dict[str, tuple[Any, ...]] = {"grpo": SAMPLED, "online-dpo": SAMPLED, "gkd": SAMPLED, "dpo": ("--no-reference-cache",)}
QUICK = ("--iters", 8, "--batch-size", 1, "--val-batches", 0, "--answers", 0, "--no-shuffle", "--steps-per-report", 1)


@pytest.fixture
def train(tmp_path: Path, model_folder: Path, mlxlora: Any) -> Callable[..., Any]:
    """`train("dpo", "--beta", 0.5)`: a run on four rows of the method, in the folder `run`."""

    def run(method: str, *options: Any, rows: Rows = (), model: Path = model_folder, **splits: Rows) -> Any:
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        for split, some in {"train": rows or ROWS[method], **splits}.items():
            (data / f"{split}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, some)))
        teacher = ("--teacher-model", model_folder) if method in ("distill", "gkd") else ()
        given = ("--model", model, "--data", data, "--adapter-path", tmp_path / "run", *QUICK, *OPTIONS.get(method, ()), *teacher)
        return mlxlora(method, *given, *options)

    return run


def changed(model: Path, folder: Path, change: Callable[[dict[str, mx.array]], None], dtype: mx.Dtype = mx.float32) -> Path:
    """A copy of a model with other weights."""
    shutil.copytree(model, folder)
    weights: Any = {name: array.astype(dtype) for name, array in mx.load(str(model / "model.safetensors")).items()}  # type: ignore[union-attr]
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def records(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    lines = map(orjson.loads, (folder / "metrics.jsonl").read_bytes().splitlines())
    return [line for line in lines if line["split"] == split]


def arrays(file: Path) -> dict[str, np.ndarray]:
    found: Any = mx.load(str(file))
    return {name: np.array(array.astype(mx.float32)) for name, array in found.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def refused(outcome: Any, code: int) -> str:
    """The one line that says why a run ended."""
    *_, last = outcome.err.splitlines()
    assert outcome.code == code and last.startswith("mlxlora: error: ") and "Traceback" not in outcome.out + outcome.err
    assert outcome.err.count("mlxlora: error: ") == 1
    return last.removeprefix("mlxlora: error: ")


# --- steps that are not finite --------------------------------------------------------------------------

GOOD, BAD = ({"prompt": "ab", "chosen": "yes", "rejected": "no", "preference_score": score} for score in (1.0, 1e300))
"""1e300 is a number, and infinite in float32: so is the loss of that row."""


def test_a_skipped_step_leaves_no_trace(train: Any, tmp_path: Path) -> None:
    """Neither in the weights nor in moments, step counter or schedule, bit for bit; the row is named and the step counted."""
    options = ("--optimizer", "adamw", "--learning-rate", 1e-2, "--lr-schedule", "cosine", "--lr-decay-steps", 9, "--warmup", 2)
    found = []
    for rows in ([GOOD, GOOD, BAD, GOOD], [GOOD] * 3):
        done = train("orpo", "--overwrite", *options, "--iters", len(rows), rows=rows)
        assert done.code == 0, done.err
        path = tmp_path / "run" / "checkpoints" / f"{len(rows):07d}"
        state = arrays(path / "optimizer.safetensors")
        state.pop("random_state")
        found.append((arrays(path / "adapters.safetensors"), state, records(tmp_path / "run"), done.out))
    (weights, state, seen, told), (others, other_state, others_seen, _) = found
    assert same(weights, others) and same(state, other_state) and state["step"] == 3
    assert [r["loss"] for r in seen] == [*[r["loss"] for r in others_seen[:2]], None, others_seen[2]["loss"]]
    assert [r.get("skipped", 0) for r in seen] == [0, 0, 1, 0] and not any("skipped" in r for r in others_seen)
    assert "train.jsonl:3): skipped, the weights stay as they were" in told


def test_means_are_those_of_the_steps_that_were_taken(train: Any, tmp_path: Path) -> None:
    assert train("orpo", "--iters", 4, "--steps-per-report", 4, rows=[GOOD, BAD, GOOD, BAD]).code == 0
    (mixed,) = records(tmp_path / "run")
    assert train("orpo", "--overwrite", "--iters", 2, "--steps-per-report", 2, rows=[GOOD, GOOD]).code == 0
    (clean,) = records(tmp_path / "run")
    assert (mixed["skipped"], mixed["loss"], mixed["grad_norm"]) == (2, clean["loss"], clean["grad_norm"])


def test_a_run_of_skips_stops_and_keeps_every_good_checkpoint(train: Any, tmp_path: Path) -> None:
    options = ("--iters", 9, "--save-every", 1, "--save-total-limit", 1)
    rows = [GOOD] * 2 + [BAD] * 5 + [GOOD]
    message = refused(train("orpo", *options, rows=rows), 1)
    assert message.startswith("step 7: loss is inf (rows ") and "the 5th in a row; the weights are those of step 2" in message
    run = tmp_path / "run"
    saved = {path.name: arrays(path / "adapters.safetensors") for path in (run / "checkpoints").iterdir()}
    assert sorted(saved) == [f"{step:07d}" for step in range(2, 8)]
    assert all(same(weights, saved["0000002"]) for weights in (*saved.values(), arrays(run / "adapters.safetensors")))
    assert train("orpo", *options, "--resume", rows=rows).code == 0  # goes on after those rows
    assert [r.get("skipped", 0) for r in records(run)] == [0, 0, 1, 1, 1, 1, 1, 0]  # the last skip is in the first report after it
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["0000009"]


def test_a_run_that_was_stopped_in_between_counts_on(train: Any, tmp_path: Path) -> None:
    rows = [GOOD] + [BAD] * 6
    assert train("orpo", "--iters", 4, rows=rows).code == 0
    assert refused(train("orpo", "--iters", 9, "--resume", rows=rows), 1).startswith("step 6: ")


def test_a_dry_run_says_it_at_once(train: Any) -> None:
    assert refused(train("orpo", "--dry-run", rows=[BAD] * 4), 1).startswith("step 1: loss is inf")


def test_each_batch_of_several_updates_counts_once(train: Any, tmp_path: Path) -> None:
    """Its steps fail together: five batches, ten steps."""
    file = tmp_path / "objective.py"
    file.write_text("import mlxlora as ml\nobjective = (2.0**1000) * ml.objectives.grpo(beta=0.0)\n")
    reward = reward_file(tmp_path, "[float(len(text)) for text in completions]")
    options = ("--objective", f"{file}:objective", "--num-iterations", 2, "--iters", 20, "--beta", 0, *reward)
    assert "the 10th in a row" in refused(train("grpo", *options), 1)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (("--learning-rate", 1e39), mx.float32),
        (("--learning-rate", 1e39), mx.bfloat16),
        (("--learning-rate", 1e7, "--train-type", "full", "--num-layers", 1), mx.float16),
    ],
)
def test_updates_that_overflow_are_not_made(train: Any, tmp_path: Path, model_folder: Path, options: Any, dtype: Any) -> None:
    """The loss and the gradient are finite, the new weights would not be."""
    model = changed(model_folder, tmp_path / "model", lambda _: None, dtype)
    message = refused(train("sft", *options, model=model), 1)
    assert message.startswith("step 5: the updated weights are not finite (rows ")
    assert all(np.isfinite(array).all() for array in arrays(tmp_path / "run" / "adapters.safetensors").values())


# --- poisoned weights -----------------------------------------------------------------------------------


def infinite(weights: dict[str, mx.array]) -> None:
    weights["model.layers.1.mlp.down_proj.weight"][3, 3] = mx.inf


def overflowing(weights: dict[str, mx.array]) -> None:
    for name in ("gate", "up", "down"):
        weights[f"model.layers.0.mlp.{name}_proj.weight"] *= 1e3


@pytest.mark.parametrize("method", ROWS)
def test_an_infinity_in_the_base_stops_every_method(train: Any, tmp_path: Path, model_folder: Path, method: str) -> None:
    model = changed(model_folder, tmp_path / "broken", infinite, mx.bfloat16)
    message = refused(train(method, model=model), 1)
    at_once = "sampling: log-probability nan from the model" if method in OPTIONS and method != "dpo" else "step 5: loss is nan"
    assert message.startswith(at_once)
    assert all(np.isfinite(array).all() for array in arrays(tmp_path / "run" / "adapters.safetensors").values())


def test_half_precision_that_overflows(train: Any, tmp_path: Path, model_folder: Path) -> None:
    """The same weights train in bfloat16, whose exponents are those of float32."""
    half = changed(model_folder, tmp_path / "half", overflowing, mx.float16)
    assert refused(train("sft", model=half), 1).startswith("step 5: ")
    brain = changed(model_folder, tmp_path / "brain", overflowing, mx.bfloat16)
    assert train("sft", "--overwrite", model=brain).code == 0


def test_adapters_with_a_nan_are_refused(train: Any, tmp_path: Path) -> None:
    assert train("sft", "--iters", 1).code == 0
    file: Any = tmp_path / "run" / "adapters.safetensors"
    weights: Any = mx.load(str(file))
    name = sorted(weights)[0]
    weights[name][0, 0] = mx.nan
    mx.save_safetensors(str(tmp_path / "broken.safetensors"), weights)
    message = refused(train("sft", "--overwrite", "--resume-adapter-file", tmp_path / "broken.safetensors"), 2)
    assert message.endswith(f"has NaN or infinity in {name}; use an earlier checkpoint")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "--prompt", "ab", "--adapter-path", "broken"),
        ("eval", "--data", "data", "--split", "train", "--adapter-path", "broken"),
        ("compare", "--prompt", "ab", "--adapter-path", "broken"),
        ("fuse", "--save-path", "new", "--adapter-path", "broken"),
        ("export", "--peft", "new", "--adapter-path", "broken"),
        ("merge", "run", "broken", "--save-path", "new"),
        ("import", "--peft", "broken-peft", "--adapter-path", "new"),
    ],
    ids=lambda command: command[0],
)
def test_adapters_with_a_nan_are_of_no_use(
    train: Any, tmp_path: Path, mlxlora: Any, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Nothing is made of them, whatever reads them."""
    assert train("sft", "--iters", 1).code == 0
    monkeypatch.chdir(tmp_path)
    assert mlxlora("export", "--adapter-path", "run", "--peft", "run-peft").code == 0
    for folder, file in (("", "adapters.safetensors"), ("-peft", "adapter_model.safetensors")):
        weights: Any = mx.load(str(shutil.copytree(f"run{folder}", f"broken{folder}") / Path(file)))
        mx.save_safetensors(f"broken{folder}/{file}", weights | {min(weights): mx.full(weights[min(weights)].shape, mx.inf)})
    message = refused(mlxlora(*command), 2)
    assert message.startswith("broken") and "NaN or infinity in " in message and "lora_" in message.lower()
    assert not Path("new").exists()


# --- validation -----------------------------------------------------------------------------------------


def test_the_best_checkpoint_has_a_finite_loss(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A NaN that comes first would otherwise stay the best for good."""
    from mlxlora.training import prepared as runs

    losses, make = iter([1.0, np.nan, 3.0, 2.0, np.nan]), runs.make_evaluate

    def evaluates(*arguments: Any) -> Any:
        evaluate = make(*arguments)
        return lambda micros: {**evaluate(micros), "loss": float(next(losses))}

    monkeypatch.setattr(runs, "make_evaluate", evaluates)
    options = ("--keep-best", "--val-batches", 1, "--steps-per-eval", 1, "--save-every", 1, "--save-total-limit", 0)
    done = train("sft", "--iters", 4, "--learning-rate", 1e-2, *options, valid=TEXTS)
    assert done.code == 0 and "best valid loss  2" in done.out
    best, third = (arrays(tmp_path / "run" / path / "adapters.safetensors") for path in ("", "checkpoints/0000003"))
    assert same(best, third)
    assert [r["loss"] for r in records(tmp_path / "run", "valid")] == [1.0, None, 3.0, 2.0, None]


def test_without_a_finite_validation_the_last_weights_are_kept(train: Any, tmp_path: Path) -> None:
    options = ("--keep-best", "--patience", 2, "--val-batches", 1, "--steps-per-eval", 1, "--test")
    done = train("orpo", *options, rows=[GOOD] * 4, valid=[BAD], test=[GOOD])
    assert done.code == 0, done.err
    assert "no better validation loss in 2 validations" in done.out
    assert same(*(arrays(tmp_path / "run" / path / "adapters.safetensors") for path in ("", "checkpoints/0000002")))


def test_a_metric_that_is_not_finite_stops_nothing_and_resumes(train: Any, tmp_path: Path) -> None:
    file = tmp_path / "objective.py"
    file.write_text(
        "import mlxlora as ml\nfrom mlxlora.objectives.objective import token_mean, watch\n"
        "objective = ml.objectives.sft() + watch('odd', lambda logps, batch: logps / 0, token_mean())\n"
    )
    options = ("--objective", f"{file}:objective", "--steps-per-report", 4, "--save-every", 1)
    assert train("sft", *options, "--iters", 2).code == 0
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert train("sft", *options, "--iters", 4, "--resume").code == 0
    (seen,) = records(tmp_path / "run")
    assert seen["odd"] is None and seen["loss"] > 0


# --- vocabularies ---------------------------------------------------------------------------------------


def test_more_embeddings_than_tokens(train: Any, tmp_path: Path) -> None:
    """288 against 257: what is sampled beyond decodes to nothing and is trained on like any token."""
    reward = reward_file(tmp_path, "[float(max(ids) >= 257) for ids in completion_ids]")
    done = train("grpo", "--beta", 0, "--group-size", 8, "--iters", 4, "--max-completion-length", 8, *reward)
    assert done.code == 0, done.err
    assert all(np.isfinite([r["loss"], r["grad_norm"]]).all() for r in records(tmp_path / "run"))
    assert max(r["reward"] for r in records(tmp_path / "run")) > 0


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "grpo"])
def test_more_tokens_than_embeddings(train: Any, tmp_path: Path, model_folder: Path, method: str) -> None:
    """MLX would read what lies behind the table."""

    def shortened(weights: dict[str, mx.array]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:40]

    model = changed(model_folder, tmp_path / "short", shortened)
    config = orjson.loads((model / "config.json").read_bytes())
    (model / "config.json").write_bytes(orjson.dumps(config | {"vocab_size": 40}))
    rows = [{**row, "prompt": "ab"} if method == "grpo" else row for row in ROWS[method]]
    message = refused(train(method, rows=rows, model=model), 2)
    assert "train.jsonl:1: token " in message and "is not among the model's 40" in message
    assert not (tmp_path / "run").exists()


# --- log-probabilities and sampling ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_logits_of_ten_thousand(dtype: mx.Dtype) -> None:
    logits, targets = mx.array([[1e4, -1e4, 0, 3], [-1e4] * 4, [1e4] * 4], dtype), mx.array([1, 2, 0])
    low = float((logits[0, 1].astype(mx.float32) - logits[0, 0].astype(mx.float32)).item())  # type: ignore[arg-type]

    def scores(logits: mx.array) -> mx.array:
        return statistics(logits, targets, {"entropy": True})

    np.testing.assert_allclose(scores(logits)[0], [low, -np.log(4), -np.log(4)], atol=1e-3)
    np.testing.assert_allclose(scores(logits)[1], [0, np.log(4), np.log(4)], atol=1e-3)
    assert mx.isfinite(mx.grad(lambda z: scores(z).sum())(logits)).all().item()


def test_logits_of_minus_infinity() -> None:
    """A token that cannot be is -inf, the others are as if it were not there; where none can be it is NaN: the step is skipped."""
    logits = mx.array([[0, -mx.inf, 0], [0, -mx.inf, 0], [-mx.inf] * 3])
    logps, entropies = statistics(logits, mx.array([0, 1, 0]), {"entropy": True}).tolist()  # type: ignore[misc]
    np.testing.assert_allclose(logps, [-np.log(2), -np.inf, np.nan], rtol=1e-6)
    np.testing.assert_allclose(entropies, [np.log(2), np.log(2), np.nan], rtol=1e-6)
    gradient = mx.grad(lambda z: statistics(z, mx.array([0]), {"entropy": True}).sum())(logits[:1])
    np.testing.assert_allclose(gradient, [[0.5, 0, -0.5]])


@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-6, 1e-3, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1e4, 1e30])
def test_sampling_at_any_temperature(temperature: float, scale: float) -> None:
    """Towards 0 it is the likeliest token, towards infinity any; the log-probability is finite as long as
    logits/temperature is."""
    logits = (
        mx.array(np.random.default_rng(0).permuted(np.tile(np.arange(300.0), (16, 1)), axis=1).astype(np.float32)) / 300 * scale
    )
    noise = uniforms(mx.random.split(mx.random.key(0), 16), 1)[:, 0]
    tokens, logps = draw_tokens(logits, Sampling(temperature=temperature), noise)
    if temperature == 0 or scale / temperature > 1e5:
        assert (tokens == logits.argmax(axis=-1)).all().item() or scale / temperature > 3e38
    assert mx.isfinite(logps).all().item() or (temperature and scale / temperature > 3e38)


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_training_at_the_ends_of_temperature(train: Any, tmp_path: Path, temperature: float) -> None:
    reward = reward_file(tmp_path, "[float(len(text)) for text in completions]")
    assert train("grpo", "--beta", 0, "--temperature", temperature, "--iters", 3, *reward).code == 0
    assert all(np.isfinite([r["loss"], r["grad_norm"]]).all() for r in records(tmp_path / "run"))


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo", "reinforce"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_importance_ratios_do_not_overflow(loss_type: str, level: str, gap: float) -> None:
    if level == "sequence" and loss_type in ("vespo", "reinforce"):
        pytest.skip("has no ratio of this kind")
    objective = objectives.grpo(loss_type=loss_type, importance_level=level, beta=0.1, max_completion_length=8)
    batch = collate([example(seed) for seed in range(2)], advantages=mx.array([1.0, -1.0]))
    logps = mx.full(batch.targets.shape, -2.0)
    batch = batch._replace(old_logps=logps - gap, ref_logps=logps + gap, entropy=mx.ones(logps.shape))
    loss, gradient = mx.value_and_grad(lambda x: objective(x, batch)[0])(logps)
    assert mx.isfinite(loss).item() and mx.isfinite(mx.square(gradient).sum()).item()


# --- degenerate batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "orpo", "cpo"])
def test_identical_pairs(train: Any, tmp_path: Path, method: str) -> None:
    done = train(method, rows=[{"prompt": "ab", "chosen": "yes", "rejected": "yes"}] * 4)
    assert done.code == 0, done.err
    for seen in records(tmp_path / "run"):
        assert "skipped" not in seen and np.isfinite([seen["loss"], seen["grad_norm"]]).all()
        assert seen["rewards/margins"] == pytest.approx(0, abs=1e-6)
        if method == "dpo":
            assert seen["loss"] == pytest.approx(np.log(2)) and seen["grad_norm"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo", "cpo", "kto"])
def test_completions_of_one_token(train: Any, tmp_path: Path, method: str) -> None:
    options = ("--mask-prompt",) if method == "sft" else ()
    done = train(method, "--max-seq-length", 3, *options, rows=[{**row, "prompt": f"a{i}"} for i, row in enumerate(ROWS[method])])
    assert done.code == 0, done.err
    assert all(np.isfinite([r["loss"], r["grad_norm"]]).all() and "skipped" not in r for r in records(tmp_path / "run"))


def ends_at_once(weights: dict[str, mx.array]) -> None:
    """Every hidden state is the same, and the end of the sequence (token 256) by far the likeliest after it."""
    for name, array in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            weights[name] = mx.zeros_like(array)
        elif "norm" in name or "embed" in name:
            weights[name] = mx.ones_like(array)
    weights["lm_head.weight"][256] = 1.0


def test_completions_that_end_at_once(train: Any, tmp_path: Path, model_folder: Path) -> None:
    """They are their stop token, decode to an empty text and have a reward like any."""
    model = changed(model_folder, tmp_path / "ended", ends_at_once)
    reward = reward_file(tmp_path, "[float(text == '') for text in completions]")
    assert train("grpo", "--beta", 0, *reward, model=model).code == 0
    for seen in records(tmp_path / "run"):
        assert (seen["completions/max_length"], seen["completions/clipped_ratio"]) == (1, 0)
        assert (seen["reward"], seen["frac_reward_zero_std"], seen["grad_norm"]) == (1, 1, 0)


UNTRAINED = {
    "all rewards equal": ("[1.0 for _ in completions]", ()),
    "a group of one": ("[float(len(text)) for text in completions]", ("--group-size", 1, "--baseline", "batch", "--batch-size", 1)),
    "no reward applies": ("[None for _ in completions]", ()),
    "all truncated and masked": ("[float(len(ids) + i) for i, ids in enumerate(completion_ids)]", ("--mask-truncated",)),
}


@pytest.mark.parametrize(("answer", "options"), UNTRAINED.values(), ids=UNTRAINED)
def test_groups_without_signal_train_nothing(train: Any, tmp_path: Path, answer: str, options: Any) -> None:
    """Advantage 0, no division by zero; the share of such groups is a metric, and so is that of cut completions."""
    done = train("grpo", "--beta", 0, "--max-completion-length", 2, *options, *reward_file(tmp_path, answer))
    assert done.code == 0, done.err
    for seen in records(tmp_path / "run"):
        assert (seen["loss"], seen["grad_norm"]) == (0, 0) and "skipped" not in seen
        assert seen["frac_reward_zero_std"] == 1 or seen["completions/clipped_ratio"] == 1
    found = arrays(tmp_path / "run" / "adapters.safetensors")
    assert not any(array.any() for name, array in found.items() if name.endswith("lora_b"))


REWARDS = {
    "nan": ("[float('nan') for _ in completions]", (), "answered nan; return a finite number, or None where it does not apply"),
    "infinite": ("[float('-inf') for _ in completions]", (), "answered -inf; return a finite number"),
    "huge": ("[1e30 for _ in completions]", (), "answered 1e+30; return a finite number"),
    "text": ("['good' for _ in completions]", (), "answered 'good'; return a finite number"),
    "heavy": (
        "[float(i) for i, _ in enumerate(completions)]",
        ("--reward-weights", 1e30),
        "a reward of 3e+30",
    ),
}


@pytest.mark.parametrize(("answer", "options", "told"), REWARDS.values(), ids=REWARDS)
def test_rewards_that_are_no_numbers(train: Any, tmp_path: Path, answer: str, options: Any, told: str) -> None:
    assert told in refused(train("grpo", "--beta", 0, *options, *reward_file(tmp_path, answer)), 2)


def test_the_largest_rewards(train: Any, tmp_path: Path) -> None:
    reward = reward_file(tmp_path, "[1e15 * (-1) ** i for i, _ in enumerate(completions)]")
    assert train("grpo", "--beta", 0, *reward).code == 0
    assert all(np.isfinite([r["loss"], r["grad_norm"]]).all() and "skipped" not in r for r in records(tmp_path / "run"))


def reward_file(folder: Path, answer: str) -> tuple[Any, ...]:
    """The options of a reward function that returns this expression."""
    file = folder / "rewards.py"
    file.write_text(f"def own(prompts, completions, completion_ids, **columns):\n    return {answer}\n")
    return "--reward-file", file, "--rewards", "own"


# --- the dtype of adapters ------------------------------------------------------------------------------


def dtypes(file: Path) -> set[mx.Dtype]:
    found: Any = mx.load(str(file))
    return {array.dtype for name, array in found.items() if mx.issubdtype(array.dtype, mx.floating) and name != "learning_rate"}


@pytest.mark.parametrize(("options", "dtype"), [((), mx.float32), (("--adapter-dtype", "bfloat16"), mx.bfloat16)])
@pytest.mark.parametrize("kind", [(), ("--train-type", "dora"), ("--init-lora-weights", "pissa")], ids=["lora", "dora", "pissa"])
def test_adapters_and_moments_keep_their_dtype(
    train: Any, tmp_path: Path, model_folder: Path, options: Any, dtype: mx.Dtype, kind: Any
) -> None:
    """Whatever the model's is; also where a run is resumed, which goes on bit for bit."""
    model = changed(model_folder, tmp_path / "brain", lambda _: None, mx.bfloat16)
    run, options = tmp_path / "run", (*options, *kind, "--learning-rate", 1e-2)
    assert train("sft", *options, "--iters", 4, model=model).code == 0
    whole = arrays(run / "adapters.safetensors")
    assert train("sft", *options, "--iters", 2, "--overwrite", model=model).code == 0
    assert train("sft", *options, "--iters", 4, "--resume", model=model).code == 0
    assert same(arrays(run / "adapters.safetensors"), whole)
    assert dtypes(run / "adapters.safetensors") == dtypes(run / "checkpoints" / "0000004" / "optimizer.safetensors") == {dtype}


def test_adapters_of_another_dtype_are_cast(train: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("sft", "--adapter-dtype", "bfloat16", "--iters", 1).code == 0
    shutil.copytree(run, tmp_path / "before")
    assert train("sft", "--resume-adapter-file", tmp_path / "before", "--iters", 1, "--overwrite").code == 0
    assert dtypes(run / "adapters.safetensors") == {mx.float32}
    assert "--adapter-dtype is for adapters" in refused(
        train("sft", "--train-type", "full", "--adapter-dtype", "bfloat16", "--overwrite"), 2
    )
