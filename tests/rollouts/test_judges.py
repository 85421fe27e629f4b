"""Models as rewards: what a reward model scores, what a judge is asked, and runs with both."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import orjson
import pytest
from mlx_lm.utils import load

from mlxlora.errors import InputError
from mlxlora.rollouts.judges import QUESTION, judge, reward_model
from mlxlora.rollouts.rewards import call_rewards
from tests.support.tiny import dense

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def classifier(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a score head in place of its own."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    shutil.copytree(model_folder, folder)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    kept = {name: a for name, a in weights.items() if not name.startswith("lm_head")}
    head = mx.random.normal((1, 64), key=mx.random.key(1))
    mx.save_safetensors(str(folder / "model.safetensors"), {**kept, "score.weight": head}, {"format": "mlx"})
    config = orjson.loads((folder / "config.json").read_bytes()) | {"architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_bytes(orjson.dumps(config))
    return folder


@pytest.fixture(scope="module")
def chat(model_folder: Path) -> tuple[Any, Any]:
    model, tokenizer = load(str(model_folder), tokenizer_config={"chat_template": TEMPLATE})[:2]
    return model, tokenizer


def called(reward: Any, prompts: list, completions: list) -> np.ndarray:
    """As a run calls it: in a thread."""
    ids = [[1]] * len(prompts)
    return call_rewards(
        [reward], prompts=prompts, completions=completions, completion_ids=ids, columns={}, locations=["a:1"] * len(prompts)
    )[0]


def test_a_reward_model_scores_the_last_position(classifier: Path, model_folder: Path) -> None:
    model, tokenizer = load(str(model_folder))[:2]
    weights: Any = mx.load(str(classifier / "model.safetensors"))
    found = called(reward_model(str(classifier)), ["ab", "what?"], ["cde", "no"])
    for value, text in zip(found, ("abcde", "what?no"), strict=True):
        hidden = model.model(mx.array([tokenizer.encode(text)]))[0, -1]
        assert value == pytest.approx((hidden @ weights["score.weight"][0]).item(), rel=1e-5)
    assert found[0] != found[1]


def test_a_reward_model_reads_many_texts_as_it_reads_one(classifier: Path) -> None:
    reward, prompts, answers = reward_model(str(classifier)), ["ab"] * 19, ["cde" * (1 + 7 * i % 5) for i in range(19)]
    alone = [called(reward, [prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert np.allclose(called(reward, prompts, answers), alone, rtol=1e-5) and len(set(alone)) > 3


@pytest.mark.parametrize("folder", ["model_folder", "nowhere"])
def test_no_reward_model(folder: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    path = request.getfixturevalue(folder) if folder == "model_folder" else tmp_path / folder
    with pytest.raises(InputError, match=r"--reward-model .*(no score.weight|not a model folder)"):
        reward_model(str(path))


def test_a_judge_is_asked_in_both_orders(chat: tuple[Any, Any]) -> None:
    model, tokenizer = chat
    first, second = called(judge(model, tokenizer), ["who?", "who?"], ["me", "nobody"])
    letters = [tokenizer.encode(letter)[0] for letter in "AB"]

    def chance(a: str, b: str) -> float:
        turn = {"role": "user", "content": QUESTION.format(prompt="who?", first=a, second=b)}
        ids = tokenizer.apply_chat_template([turn], add_generation_prompt=True, return_dict=False)
        return float(np.array(mx.softmax(model(mx.array([ids]))[0, -1][mx.array(letters)]))[0])

    assert first == pytest.approx((chance("me", "nobody") + 1 - chance("nobody", "me")) / 2, rel=1e-4)
    assert first + second == pytest.approx(1)


def test_the_place_of_an_answer_does_not_count(chat: tuple[Any, Any]) -> None:
    reward = judge(*chat)
    turns = [[{"role": "assistant", "content": text}] for text in ("me", "nobody")]
    prompt = [{"role": "user", "content": "who?"}]
    forth, back = (called(reward, [prompt, prompt], answers) for answers in (turns, turns[::-1]))
    np.testing.assert_allclose(forth, back[::-1], rtol=1e-5)
    np.testing.assert_allclose(called(reward, [prompt, prompt], [turns[0], turns[0]]), 0.5, atol=1e-6)


def test_a_judge_needs_a_chat_template(model_folder: Path) -> None:
    with pytest.raises(InputError, match="--judge-model: its tokenizer has no chat template"):
        judge(*load(str(model_folder))[:2])


def test_tokens_without_an_embedding_are_refused(classifier: Path, chat: tuple[Any, Any], tmp_path: Path) -> None:
    """MLX would read past the end of the matrix."""
    folder = tmp_path / "short"
    shutil.copytree(classifier, folder)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:40]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    config = orjson.loads((folder / "config.json").read_bytes()) | {"vocab_size": 40}
    (folder / "config.json").write_bytes(orjson.dumps(config))
    small = dense()  # 96 tokens
    small.update({"model": {"embed_tokens": {"weight": small.model.embed_tokens.weight[:40]}}})
    small.lm_head.weight = small.lm_head.weight[:40]
    for reward, flag in ((reward_model(str(folder)), f"--reward-model {folder}"), (judge(small, chat[1]), "--judge-model")):
        with pytest.raises(InputError, match=f"{flag}: token .* is not among the model's 40"):
            called(reward, ["ab", "ab"], ["cd", "ce"])


@pytest.fixture
def command(model_folder: Path, tmp_path: Path) -> tuple[Any, ...]:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(orjson.dumps({"prompt": "abc" * n}) for n in range(1, 6)))
    sizes = ("--iters", 2, "--batch-size", 2, "--group-size", 2, "--max-completion-length", 6, "--steps-per-report", 1)
    return "--model", model_folder, "--data", tmp_path / "rows.jsonl", "--adapter-path", tmp_path / "run", *sizes


@pytest.mark.parametrize("method", ["grpo", "online-dpo"])
def test_runs_with_a_reward_model(method: str, classifier: Path, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    outcome = mlxlora(method, *command, "--reward-model", classifier)
    assert outcome.code == 0, outcome.err
    found = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert all(np.isfinite(r["loss"]) and r["rewards/reward_model/std"] > 0 for r in found)


def test_runs_with_a_judge(model_folder: Path, command: tuple, tmp_path: Path, mlxlora: Any) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    outcome = mlxlora("online-dpo", *command, "--judge-model", folder)
    assert outcome.code == 0, outcome.err
    found = [orjson.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines()]
    assert all(r["rewards/judge/mean"] == pytest.approx(0.5) and r["rewards/judge/std"] > 0 for r in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge-model", "./nowhere", "--val-batches", 0), "--judge-model ./nowhere: no such folder"),
        (("--judge-model", "./nowhere"), "--judge-model ./nowhere: no such folder"),
        (("--judge-model", "./nowhere", "--val-batches", 0, "--group-size", 3), "--judge-model compares two completions"),
        (("--reward-model", "./nowhere"), "--reward-model nowhere: not a model folder"),
    ],
)
def test_mistakes(options: tuple, message: str, command: tuple, mlxlora: Any) -> None:
    outcome = mlxlora("online-dpo", *command, *options)
    assert outcome.code == 2 and outcome.err.count("\n") == 1 and message in outcome.err, outcome.err
