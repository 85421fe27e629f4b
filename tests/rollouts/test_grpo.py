"""`mlxlora grpo`: what a run leaves, how it stops and goes on, the reference, rewards of all kinds, and that it learns."""

import json
import random
import signal
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest
from mlx_lm.utils import load

from mlxlora.config.options import AdapterOptions, Training
from mlxlora.objectives.grpo import grpo
from mlxlora.rollouts.rewards import NamedReward
from mlxlora.rollouts.sampling import Sampling
from mlxlora.rollouts.source import Rollouts, prompts
from mlxlora.training.session import run
from tests.support.loss_types import loss_types
from tests.support.paths import Outcome
from tests.training.test_resume import stop

Run = Callable[..., Outcome]
REWARDS = """
import asyncio

def spread(completion_ids, **columns):
    return [sum(ids) % 97 / 97 for ids in completion_ids]

def peer_style(prompts: list, completions: list, answer: list, types: list = None) -> list[float]:
    assert types is None and all(isinstance(text, str) for text in (*prompts, *completions, *answer))
    return [float(len(text) > len(solution)) for text, solution in zip(completions, answer)]

def trl_style(prompts, completions, solution, completion_ids, **kwargs):
    return [len(set(ids)) / len(ids) for ids in completion_ids]

async def slow(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(len(text)) for text in completions]

def picky(prompts, completions, **kwargs):
    return [1 / len(prompt.strip("d")) for prompt in prompts]

def equal(completions, **kwargs):
    return [1.0] * len(completions)

def math_only(completions, kind, **kwargs):
    return [1.0 if k == "math" else None for k in kind]

def code_only(completions, kind, **kwargs):
    return [0.5 if k == "code" else None for k in kind]

def never(completions, **kwargs):
    return [None] * len(completions)
"""
CLOCK = ("seconds", "per_second", "memory")
TINY = ("--iters", 2, "--steps-per-report", 1, "--max-completion-length", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with answers, and a file of rewards."""
    folder, rng = tmp_path_factory.mktemp("prompts"), random.Random(0)
    for split, count in (("train", 7), ("valid", 3)):
        rows = [{"prompt": "abc" * rng.randint(1, 5), "answer": str(n)} for n in range(count)]
        (folder / f"{split}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def command(model_folder: Path, folder: Path) -> tuple[Any, ...]:
    """`mlxlora grpo` of the tiny model: two prompts, three completions each, of up to twelve tokens."""
    optimization = ("--learning-rate", 1e-3, "--batch-size", 2, "--group-size", 3, "--max-completion-length", 12)
    rewards = ("--reward-file", folder / "rewards.py", "--rewards", "spread")
    return "grpo", "--model", model_folder, "--data", folder, "--num-layers", -1, *optimization, *rewards


def records(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The lines of a file of the run without what depends on the clock and the machine."""
    lines = map(orjson.loads, (folder / name).read_bytes().splitlines())
    return [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in lines]


def train_records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in records(folder) if record["split"] == "train"]


def same_run(ours: Path, theirs: Path) -> None:
    """The same metrics and samples, and the same adapters bit for bit."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert records(ours, name) == records(theirs, name)
    assert (ours / "adapters.safetensors").read_bytes() == (theirs / "adapters.safetensors").read_bytes()


# --- what a run leaves ----------------------------------------------------------------------------------


def test_rewards_that_are_none(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    """A mean is over the completions that a function rewards, and a function that rewards none is told once."""
    rows = [{"prompt": f"say {n}", "kind": ("code", "math")[n % 2]} for n in range(4)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
    more = ("--data", tmp_path / "rows.jsonl", "--batch-size", 1, "--group-size", 2, "--val-batches", 0, "--beta", 0)
    rewards = ("--rewards", "math_only,code_only,never", "--max-completion-length", 4, "--adapter-path", tmp_path / "run")
    outcome = mlxlora(*command[:-2], *more, *rewards, "--iters", 8, "--steps-per-report", 4)
    assert outcome.code == 0, outcome.err
    found = train_records(tmp_path / "run")
    assert [(r["rewards/math_only/mean"], r["rewards/code_only/mean"], r["reward"]) for r in found] == [(1, 0.5, 0.75)] * 2
    assert not any("never" in name for record in found for name in record)
    assert (outcome.out + outcome.err).count("reward never returned None for all of the first 8 completions") == 1


def test_files(command: tuple[Any, ...], model_folder: Path, tmp_path: Path, mlxlora: Run) -> None:
    outcome = mlxlora(*command, *TINY, "--beta", 0, "--adapter-path", tmp_path)
    assert outcome.code == 0, outcome.err
    train, valid = train_records(tmp_path), [r for r in records(tmp_path) if r["split"] == "valid"]
    assert [r["step"] for r in train] == [1, 2] and [r["step"] for r in valid] == [0, 2]
    assert {"loss", "grad_norm", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "reward", "reward_std"} <= train[
        0
    ].keys()
    assert {"frac_reward_zero_std", "completions/mean_length", "rewards/spread/mean", "rewards/spread/std"} <= train[0].keys()
    assert all(record["loss"] == -record["reward"] for record in valid)
    samples = records(tmp_path, "samples.jsonl")
    assert [sample["step"] for sample in samples] == [1] * 4 + [2] * 4
    assert samples[0].keys() == {"step", "prompt", "completion", "reward", "rewards", "where"}
    plain, adapted = load(str(model_folder))[0], load(str(model_folder), adapter_path=str(tmp_path))[0]
    tokens = mx.array([[1, 2, 3]])
    assert not mx.array_equal(plain(tokens), adapted(tokens))


def test_validation_is_the_same_at_every_seed(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    first: list[Any] = []
    for seed in (0, 1):
        assert mlxlora(*command, *TINY, "--beta", 0, "--seed", seed, "--adapter-path", tmp_path / str(seed)).code == 0
        first.append((records(tmp_path / str(seed))[0], records(tmp_path / str(seed), "samples.jsonl")[:4]))
    assert first[0][0] == first[1][0] and first[0][1] != first[1][1]


# --- stopping and going on ------------------------------------------------------------------------------

LENGTHS = ("--iters", 8, "--steps-per-report", 1, "--steps-per-eval", 4, "--save-every", 2)
VARIANTS = {
    "plain": ("--beta", 0),
    "several steps on a rollout": ("--beta", 0, "--num-iterations", 2, "--save-every", 3),
    "all at once": ("--beta", 0.1, "--num-iterations", 2, "--dropout", 0.2, "--grad-accumulation-steps", 2, "--dynamic-sampling"),
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_killed_and_resumed(command: tuple[Any, ...], variant: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    command, rng = (*command, *LENGTHS, *variant), random.Random(str(variant))
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0
    stopped = (*command, "--adapter-path", tmp_path / "stopped")
    assert stop(signal.SIGKILL, stopped, tmp_path / "stopped", rng.randrange(2, 7), rng.uniform(0, 0.05)) == -signal.SIGKILL
    outcome = mlxlora(*stopped, "--resume")
    assert outcome.code == 0, outcome.err
    same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("options", [("--beta", 0), ("--beta", 0.1, "--num-iterations", 2, "--dropout", 0.2)])
def test_ctrl_c_during_a_rollout(
    command: tuple[Any, ...], options: tuple[Any, ...], tmp_path: Path, mlxlora: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*command, *LENGTHS, *options, "--val-batches", 0, "--save-every", 0)
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0
    steps = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 40:  # in the middle of the fourth rollout: signals reach Python between two of its lines
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    from mlxlora.rollouts.engine import _step as step

    with monkeypatch.context() as patch:
        patch.setattr("mlxlora.rollouts.engine._step", interrupted)
        outcome = mlxlora(*command, "--adapter-path", tmp_path / "stopped")
    assert outcome.code == 130 and "--resume" in outcome.out and "Traceback" not in outcome.err
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == [
        f"{3 * (1 + ('--num-iterations' in options)):07d}"
    ]
    assert mlxlora(*command, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


def test_ctrl_c_from_outside(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    command = (*command, "--iters", 5, "--steps-per-report", 1, "--beta", 0, "--max-completion-length", 40, "--val-batches", 0)
    log = tmp_path / "log"
    assert stop(signal.SIGINT, (*command, "--adapter-path", tmp_path / "stopped"), tmp_path / "stopped", 2, 0.1, log) == 130
    assert "Traceback" not in log.read_text()
    assert mlxlora(*command, "--adapter-path", tmp_path / "stopped", "--resume").code == 0
    assert mlxlora(*command, "--adapter-path", tmp_path / "whole").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


# --- several steps on a rollout, and the reference -------------------------------------------------------


def test_second_step_on_a_rollout_is_off_policy(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    more = ("--beta", 0, "--num-iterations", 2, "--iters", 4, "--learning-rate", 2e-2, "--steps-per-report", 1)
    assert mlxlora(*command, *more, "--epsilon", 0.01, "--adapter-path", tmp_path).code == 0
    found = train_records(tmp_path)
    clipped = [record["clip_ratio/region_mean"] for record in found]
    assert clipped[0] == clipped[2] == 0 and clipped[1] > 0 and clipped[3] > 0
    assert [r["reward"] for r in found][::2] == [r["reward"] for r in found][1::2]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every model that is loaded."""
    from mlxlora.adapters import prepare
    from mlxlora.models import loading

    original, seen = prepare.load_with_config, []

    def counted(options: Any, *how: Any, **more: Any) -> Any:
        seen.append(str(options.model))
        return original(options, *how, **more)

    for module in (loading, prepare):
        monkeypatch.setattr(module, "load_with_config", counted)
    return seen


@pytest.mark.parametrize("train_type", ["lora", "dora", "full"])
def test_reference(command: tuple[Any, ...], train_type: str, tmp_path: Path, mlxlora: Run, loads: list[str]) -> None:
    """It is the policy as training starts, so no second model is loaded."""
    more = (*TINY, "--iters", 4, "--train-type", train_type, "--learning-rate", 2e-2, "--val-batches", 0)
    outcome = mlxlora(*command, *more, "--beta", 0.1, "--adapter-path", tmp_path / "beta")
    assert outcome.code == 0, outcome.err
    assert len(loads) == 1
    kl = [record["kl"] for record in train_records(tmp_path / "beta")]
    assert abs(kl[0]) < 1e-6 and all(value > 1e-4 for value in kl[1:])
    assert mlxlora(*command, *more, "--beta", 0, "--adapter-path", tmp_path / "no").code == 0
    assert len(loads) == 2 and "kl" not in train_records(tmp_path / "no")[0]


def test_reference_model_path(command: tuple[Any, ...], model_folder: Path, tmp_path: Path, mlxlora: Run, loads: list[str]) -> None:
    (tmp_path / "other").mkdir()
    for file in model_folder.iterdir():
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    weights = mx.load(str(model_folder / "model.safetensors"))
    mx.save_safetensors(str(tmp_path / "other" / "model.safetensors"), {k: 1.5 * v for k, v in weights.items()}, {"format": "mlx"})
    more = ("--reference-model-path", tmp_path / "other", "--beta", 0.1, "--adapter-path", tmp_path / "run")
    assert mlxlora(*command, *TINY, *more).code == 0
    assert loads == [str(model_folder), str(tmp_path / "other")] and train_records(tmp_path / "run")[0]["kl"] > 1e-3


def test_dropout_is_active_with_a_reference(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    norms = []
    for dropout in (0.0, 0.5):
        path = tmp_path / str(dropout)
        assert mlxlora(*command, *TINY, "--beta", 0.1, "--dropout", dropout, "--adapter-path", path).code == 0
        norms.append(train_records(path)[0]["grad_norm"])
    assert norms[0] != norms[1]


def test_full_training_of_a_loaded_model_has_its_start_as_reference(model_folder: Path, folder: Path, tmp_path: Path) -> None:
    source = prompts(
        str(folder), Rollouts((NamedReward("equal", lambda completions: [1.0] * len(completions)),), 2, Sampling(max_tokens=16))
    )
    full, loaded = AdapterOptions(train_type="full", num_layers=-1), load(str(model_folder))[:2]
    run(*loaded, grpo(beta=0.1), source, Training(iters=1, batch_size=2), adapter=full, adapter_path=str(tmp_path), quiet=True)
    assert abs(train_records(tmp_path)[0]["kl"]) < 1e-6


def test_an_epoch_is_a_pass_over_the_prompts(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    more = ("--epochs", 1, "--num-iterations", 2, "--beta", 0, "--val-batches", 0, "--adapter-path", tmp_path)
    assert mlxlora(*command, *TINY, *more).code == 0
    assert len(train_records(tmp_path)) == 8, "four batches of the seven prompts, two steps on each"


# --- rewards -----------------------------------------------------------------------------------------------


def test_rewards_of_a_file(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    more = ("--rewards", "peer_style,trl_style,slow,length(max_length=4)", "--reward-weights", "1,0.5,0.25,2", "--beta", 0)
    outcome = mlxlora(*command[:-1], *more[1:], *TINY, "--adapter-path", tmp_path)
    assert outcome.code == 0, outcome.err
    for sample in records(tmp_path, "samples.jsonl"):
        parts = [sample["rewards"][name] for name in ("peer_style", "trl_style", "slow", "length")]
        assert sample["reward"] == pytest.approx(np.dot(parts, [1, 0.5, 0.25, 2]), abs=1e-6)
        assert parts[2] == len(sample["completion"])


def test_a_reward_that_raises(command: tuple[Any, ...], folder: Path, tmp_path: Path, mlxlora: Run) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "abc"}\n{"prompt": "ddd"}\n')
    outcome = mlxlora(*command[:-1], "picky", "--data", data, *TINY, "--beta", 0, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"{data}:2: reward picky raised ZeroDivisionError" in outcome.err and "rewards.py:" in outcome.err


def test_an_unknown_reward(command: tuple[Any, ...], tmp_path: Path, mlxlora: Run) -> None:
    outcome = mlxlora(*command[:-1], "spred", *TINY, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert "no reward function 'spred'" in outcome.err and "Did you mean spread?" in outcome.err
    assert not (tmp_path / "run").exists()


# --- objectives and extremes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", loss_types(grpo))
def test_loss_types(command: tuple[Any, ...], loss_type: str, tmp_path: Path, mlxlora: Run) -> None:
    more = ("--loss-type", loss_type, "--beta", 0.1, "--val-batches", 0, "--adapter-path", tmp_path)
    outcome = mlxlora(*command, *TINY, *more)
    assert outcome.code == 0, outcome.err
    assert all(np.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in train_records(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        ("--max-completion-length", 1),
        ("--max-completion-length", 1, "--mask-truncated"),
        ("--rewards", "accuracy"),
        ("--reward-file", "FILE", "--rewards", "equal", "--dynamic-sampling"),
        ("--temperature", 0.01),
        ("--temperature", 1000),
        ("--top-k", 1, "--mask-truncated", "--num-iterations", 2),
        ("--importance-level", "sequence", "--num-iterations", 2, "--delta", 1.5, "--epsilon-high", 0.28),
        ("--top-entropy-quantile", 0.2, "--scale-rewards", "batch", "--rollout-batch", 1),
        ("--use-prompt", "--scale-rewards", "none", "--correct-kl"),
    ],
    ids=lambda options: " ".join(map(str, options)),
)
def test_extremes(command: tuple[Any, ...], options: tuple[Any, ...], folder: Path, tmp_path: Path, mlxlora: Run) -> None:
    """A model that says nothing useful, one token or never stops; groups without signal; sampling at its limits."""
    plain = command if "--rewards" not in options else command[:-4]
    options = tuple(folder / "rewards.py" if option == "FILE" else option for option in options)
    outcome = mlxlora(*plain, *TINY, *options, "--beta", 0.1, "--adapter-path", tmp_path)
    assert outcome.code == 0, outcome.err
    assert all(np.isfinite([r[k] for k in ("loss", "grad_norm", "reward")]).all() for r in train_records(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss-type", "grop"), "loss-type"),
        (("--group-size", 1), "--group-size must be >= 2, got 1"),
        (("--batch-size", 8), "--batch-size 8 is larger than the training set of 7 rows"),
        (("--use-prompt", "--num-iterations", 2), "--use-prompt needs --num-iterations 1"),
        (("--max-seq-length", 2), "--max-seq-length"),
        (("--temperature", 0), "--temperature must be >= 1e-06, got 0"),
        (("--reference-model-path", "./nowhere", "--beta", 0.1), "nowhere"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistakes(command: tuple[Any, ...], options: tuple[Any, ...], message: str, tmp_path: Path, mlxlora: Run) -> None:
    outcome = mlxlora(*command, *TINY, *options, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err


# --- it learns ---------------------------------------------------------------------------------------------------


def test_a_real_model_learns(shared: Callable[[str], Path], tmp_path: Path, mlxlora: Run) -> None:
    """GSM8K's questions, a model that tells stories: it learns to end a sentence soon (measured: 0.25 to 1 in four steps)."""
    with shared("data/gsm8k_train.jsonl").open(encoding="utf-8") as file:
        rows = [line for line in file if len(json.loads(line)["question"]) < 120]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(islice(rows, 64)))
    model = ("--model", shared("models/stories260K"), "--data", data, "--num-layers", -1, "--scale", 4)
    sizes = ("--iters", 10, "--batch-size", 4, "--group-size", 8, "--max-completion-length", 16, "--steps-per-report", 1)
    optimization = ("--learning-rate", 3e-3, "--optimizer", "adamw", "--beta", 0, "--rewards", r"regex(pattern='\.')")
    outcome = mlxlora("grpo", *model, *sizes, *optimization, "--adapter-path", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    rewards = [record["reward"] for record in train_records(tmp_path / "run")]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.3
