"""References, teachers and judges with fewer embeddings than the policy: their tokens are checked as the policy's are.

MLX would read past the end of the matrix. Reward models and judges have their test in tests/rollouts/test_judges.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import orjson
import pytest

from tests.support.paths import Outcome
from tests.support.tokens import CHATML, copy_with_token

Folders = tuple[Path, Path]


@pytest.fixture(scope="module")
def models(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A model of 288 tokens whose tokenizer has 289, and one of 576 with the same tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    small, large = copy_with_token(model_folder, folder / "small", "<|tool|>", CHATML), folder / "large"
    shutil.copytree(small, large)
    weights: Any = mx.load(str(large / "model.safetensors"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = mx.concatenate([weights[name], weights[name]])
    mx.save_safetensors(str(large / "model.safetensors"), weights, {"format": "mlx"})
    config = orjson.loads((large / "config.json").read_bytes()) | {"vocab_size": 576}
    (large / "config.json").write_bytes(orjson.dumps(config))
    return small, large


@pytest.fixture
def run(models: Folders, tmp_path: Path, mlxlora: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """`run("dpo", "--reference-model-path", rows)`: the large policy, and the small model as the other one."""

    def begin(method: str, flag: str, *rows: dict[str, Any]) -> Outcome:
        (tmp_path / "rows.jsonl").write_bytes(b"\n".join(map(orjson.dumps, rows)))
        sizes = ("--iters", 1, "--batch-size", 2, "--num-layers", 1, "--val-batches", 0, "--answers", 0)
        sampling = ("--max-completion-length", 16) if method in ("grpo", "online-dpo", "gkd") else ()
        rewards = ("--rewards", "length(max_length=9)", "--group-size", 2) if method in ("grpo", "online-dpo") else ()
        data = ("--data", tmp_path / "rows.jsonl", "--adapter-path", tmp_path / "run")
        return mlxlora(method, "--model", models[1], flag, models[0], *data, *sizes, *sampling, *rewards)

    return begin


REFERENCE, TEACHER = "--reference-model-path", "--teacher-model"
COMPLETION = {"prompt": "a", "completion": "b <|tool|>"}
ROWS = {
    "dpo": (REFERENCE, [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "<|tool|>"}]),
    "kto": (
        REFERENCE,
        [{"prompt": "c", "completion": "d", "label": True}, {"prompt": "<|tool|>", "completion": "b", "label": True}],
    ),
    "distill": (TEACHER, [{"prompt": "c", "completion": "d"}, COMPLETION]),
    "grpo": (REFERENCE, [{"prompt": "c"}, {"prompt": "<|tool|>"}]),
    "online-dpo": (REFERENCE, [{"prompt": "c"}, {"prompt": "<|tool|>"}]),
    "gkd": (TEACHER, [{"prompt": "c"}, {"prompt": "<|tool|>"}]),
}


def whose(flag: str) -> str:
    return "the teacher" if flag == TEACHER else "the reference"


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", ROWS)
def test_rows_with_a_token_that_the_other_model_has_not(method: str, run: Callable[..., Outcome], tmp_path: Path) -> None:
    """Told before the run begins, with the row."""
    flag, rows = ROWS[method]
    done = run(method, flag, *rows)
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"rows.jsonl:2: token 288 ('<|tool|>') is not among {whose(flag)}'s 288" in done.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", [method for method, (_, rows) in ROWS.items() if rows[0].keys() == {"prompt"}])
def test_samples_with_a_token_that_the_other_model_has_not(method: str, run: Callable[..., Outcome]) -> None:
    """Half of the policy's tokens are outside the other's embedding."""
    flag, _ = ROWS[method]
    done = run(method, flag, {"prompt": "c"}, {"prompt": "d"})
    assert done.code == 2 and done.err.count("\n") == 1
    assert f"is not among {whose(flag)}'s 288" in done.err
