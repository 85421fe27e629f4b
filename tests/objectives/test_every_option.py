"""Every option of every published method trains, through the command line."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from mlxlora import objectives
from mlxlora.config.method_options import fields_of
from mlxlora.methods import METHODS
from tests.support.loss_types import loss_types
from tests.support.paths import Outcome

COMMANDS = {name: name for name in ("sft", "distill", "dpo", "cpo", "orpo", "kto", "grpo")}
COMMANDS |= {"simpo": "cpo", "xpo": "online-dpo", **dict.fromkeys(("gspo", "dr_grpo", "dapo", "cispo", "rloo"), "grpo")}

VALUES: dict[str, Any] = {
    "alpha": 0.5,
    "beta": 0.3,
    "cap": 1.1,
    "correct_kl": True,
    "delta": 2.0,
    "desirable_weight": 1.5,
    "discopop_tau": 0.5,
    "entropy_coef": 0.01,
    "epsilon": 0.1,
    "epsilon_high": 0.3,
    "f_alpha": 0.3,
    "f_divergence": "js",
    "gamma": 1.0,
    "importance_level": "sequence",
    "label_smoothing": 0.1,
    "ld_alpha": 0.5,
    "max_completion_length": 3,
    "nll_on_prompt": True,
    "nll_weight": 0.5,
    "off_policy_threshold": 0.1,
    "reward_alpha": 0.25,
    "sapo_temperatures": (0.5, 2.0),
    "top_entropy": 0.5,
    "undesirable_weight": 1.5,
    "vespo_exponents": ((1.0, 2.0), (2.0, 1.0)),
    "wpo": True,
}
LOSS_TYPES = {"sft": "dft", "dpo": "0.8*sigmoid+0.2*bco_pair+1.0*nll", "cpo": "simpo", "kto": "apo_zero_unpaired", "grpo": "dapo"}
LOSS_TYPES |= {"xpo": "sigmoid+0.2*nll", "gspo": "luspo"}

ACTS_IN: dict[str, dict[str, Any]] = {
    "cap": {"loss_type": "cispo"},
    "correct_kl": {"beta": 0.3},
    "delta": {"loss_type": "hinge"},
    "discopop_tau": {"loss_type": "discopop"},
    "f_alpha": {"f_divergence": "alpha"},
    "gamma": {"loss_type": "simpo"},
    "max_completion_length": {"loss_type": "dr_grpo"},
    "sapo_temperatures": {"loss_type": "sapo"},
    "vespo_exponents": {"loss_type": "vespo"},
}
"""Options that change nothing by themselves, and those that they need."""

DERIVED = ("simpo", "gspo", "dr_grpo", "dapo", "cispo", "rloo")
"""Methods that only pass options on: one run has all of them."""

Run = Callable[..., Outcome]


def options_of(name: str) -> list[str]:
    return list(inspect.signature(getattr(objectives, name)).parameters)


def value_of(name: str, option: str) -> Any:
    return LOSS_TYPES[name] if option == "loss_type" else VALUES[option]


def with_needs(name: str, option: str) -> dict[str, Any]:
    needs = ACTS_IN.get(option, {})
    if option == "delta" and COMMANDS[name] == "grpo":
        needs = {}
    return {**needs, option: value_of(name, option)}


def cases() -> list[Any]:
    single = [(name, with_needs(name, option)) for name in objectives.__all__ if name not in DERIVED for option in options_of(name)]
    combined = [(name, {option: value_of(name, option) for option in options_of(name)}) for name in DERIVED]
    return [pytest.param(name, options, id=f"{name}-{'+'.join(options)}") for name, options in single] + [
        pytest.param(name, options, id=f"{name}-all") for name, options in combined
    ]


def flags_of(name: str, options: dict[str, Any], folder: Path) -> tuple[Any, ...]:
    """Flags where the command has all of the options, else the objective in a file."""
    names = {"top_entropy": "top_entropy_quantile", **({"alpha": "xpo_alpha"} if name == "xpo" else {})}
    method = METHODS[COMMANDS[name]]
    known = fields_of(*method.kinds.kinds()).keys()
    flags = {names.get(option, option): value for option, value in options.items()}
    if name in DERIVED or not flags.keys() <= known:
        explore = ("--xpo-alpha", 0.1) if name == "xpo" else ()  # adds the column that the objective needs
        text = ", ".join(f"{option}={value!r}" for option, value in options.items())
        (folder / "mine.py").write_text(f"import mlxlora as ml\n\nobjective = ml.objectives.{name}({text})\n")
        return "--objective", f"{folder / 'mine.py'}:objective", *explore
    if name == "xpo":
        flags.setdefault("xpo_alpha", 0.1)
    spelled = {"--" + flag.replace("_", "-"): value for flag, value in flags.items()}
    return tuple(word for flag, value in spelled.items() for word in ((flag,) if value is True else (flag, value)))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows that every command reads, and a reward."""
    folder = tmp_path_factory.mktemp("rows")
    texts = [("abc" * n, "defg" * n, "hi" * n) for n in (1, 2)]
    kinds = {
        "pairs": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts],
        "plain": [{"prompt": p, "completion": c} for p, c, _ in texts],
        "labeled": [{"prompt": p, "completion": c, "label": n % 2 == 0} for n, (p, c, _) in enumerate(texts)],
        "prompts": [{"prompt": p} for p, *_ in texts],
    }
    for kind, found in kinds.items():
        (folder / f"{kind}.jsonl").write_bytes(b"\n".join(map(orjson.dumps, found)))
    (folder / "rewards.py").write_text("def spread(completion_ids):\n    return [sum(ids) % 97 / 97 for ids in completion_ids]\n")
    return folder


def command(name: str, model: Path, rows: Path, folder: Path) -> tuple[Any, ...]:
    of = COMMANDS[name]
    kind = {"sft": "plain", "distill": "plain", "kto": "labeled", "grpo": "prompts", "online-dpo": "prompts"}.get(of, "pairs")
    more: tuple[Any, ...] = ("--teacher-model", model) if of == "distill" else ()
    if kind == "prompts":
        more = ("--reward-file", rows / "rewards.py", "--rewards", "spread", "--group-size", 2, "--max-completion-length", 4)
    sizes = ("--iters", 1, "--batch-size", 2, "--val-batches", 0, "--num-layers", 1, "--rank", 2, "--steps-per-report", 1)
    return of, "--model", model, "--data", rows / f"{kind}.jsonl", "--adapter-path", folder / "run", *sizes, *more


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(("name", "options"), cases())
def test_it_trains(name: str, options: dict[str, Any], model_folder: Path, rows: Path, tmp_path: Path, mlxlora: Run) -> None:
    outcome = mlxlora(*command(name, model_folder, rows, tmp_path), *flags_of(name, options, tmp_path))
    assert outcome.code == 0, outcome.err
    (record,) = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert np.isfinite([record["loss"], record["grad_norm"]]).all()


def test_every_option_has_a_value() -> None:
    options = {option for name in objectives.__all__ for option in options_of(name)} - {"loss_type"}
    assert options == VALUES.keys()
    assert all(name in LOSS_TYPES for name in objectives.__all__ if "loss_type" in options_of(name))
    for name, value in LOSS_TYPES.items():
        assert all(part.split("*")[-1] in loss_types(getattr(objectives, name)) for part in value.split("+"))


@pytest.mark.parametrize("name", ["sft", "distill", "dpo", "cpo", "orpo", "kto", "grpo"])
def test_no_flag_of_an_objective_is_lost(name: str) -> None:
    """Options of a method's group reach the objective, but for those of reference, sampling and advantages."""
    elsewhere = {"objective", "reference_model_path", "reference_cache", "neftune_noise_alpha", "teacher_model", "divergence"}
    elsewhere |= {"jsd_beta", "num_iterations", "baseline", "scale_rewards", "top_entropy_quantile"}
    (group,) = (kind for kind in METHODS[name].kinds.kinds() if kind.__name__.lower() == f"{name}options")
    assert fields_of(group).keys() - elsewhere <= set(options_of(name))
