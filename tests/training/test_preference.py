"""`mlxlora dpo`, `cpo` and `orpo` from the command line: every loss is its formula, every form of row, every kind of adapter."""

import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import generate, load

from mlxlora import objectives
from mlxlora.config.options import PairData
from mlxlora.data import sources
from mlxlora.data.batching import MicroBatch, pair_batch
from mlxlora.data.tokenize import Pair
from mlxlora.models import loading
from mlxlora.training.step import make_step
from tests.support.loss_types import loss_types
from tests.support.tiny import byte_tokenizer, dense, distance, example, numbers, snapshot
from tests.training.test_resume import same_run, stop

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUICK = ("--num-layers", -1, "--iters", 3, "--batch-size", 1, "--steps-per-report", 1, "--learning-rate", 2e-2, "--no-shuffle")
CHOSEN, REJECTED = 8, 5  # scored tokens of the pairs below, the end of sequence among them
PAIRS = [{"prompt": f"{q}?", "chosen": " abcdef", "rejected": " xyz"} for q in ("who", "where", "what")]
REWARDS = {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} | {"logps/chosen", "logps/rejected"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def train(model_folder: Path, pairs: Path, tmp_path: Path, mlxlora: Any) -> Callable[..., list[dict[str, Any]]]:
    """`train("dpo", "--beta", 0.5)`: the lines of metrics.jsonl of a run on the pairs above."""
    count = iter(range(99))

    def run(method: str, *flags: Any, data: Path = pairs) -> list[dict[str, Any]]:
        folder = tmp_path / f"run{next(count)}"
        outcome = mlxlora(method, "--model", model_folder, "--data", data, *QUICK, "--adapter-path", folder, *flags)
        assert outcome.code == 0, outcome.err
        return records(folder)

    return run


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\n".join(map(orjson.dumps, rows)))
    return path


def records(folder: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]


def log_sigmoid(z: float) -> float:
    return -float(np.logaddexp(0, -z))


def sigmoid(z: float) -> float:
    return float(1 / (1 + np.exp(-z)))


def log_odds(mean: float) -> float:
    return float(mean - np.log(-np.expm1(mean)))


# --- losses: of one pair, the loss is a function of the two rewards that are reported ---------------

B = 0.5
DPO: dict[str, Callable[[float, float], float]] = {  # of the log-ratios of chosen and rejected
    "sigmoid": lambda c, r: -log_sigmoid(B * (c - r)),
    "hinge": lambda c, r: max(0, 1 - B * (c - r)),
    "ipo": lambda c, r: (c / CHOSEN - r / REJECTED - 1 / (2 * B)) ** 2,
    "dpop": lambda c, r: -log_sigmoid(B * (c - r - 50 * max(0, -c))),
    "robust": lambda c, r: -log_sigmoid(B * (c - r)),
    "exo_pair": lambda c, r: (
        sigmoid(B * (c - r)) * (log_sigmoid(B * (c - r)) - np.log(0.9))
        + sigmoid(B * (r - c)) * (log_sigmoid(B * (r - c)) - np.log(0.1))
    ),
    "nca_pair": lambda c, r: -log_sigmoid(B * c) - log_sigmoid(-B * c) / 2 - log_sigmoid(-B * r) / 2,
    "bco_pair": lambda c, r: -log_sigmoid(B * c) - log_sigmoid(-B * r),
    "sppo_hard": lambda c, r: (c - 1 / (2 * B)) ** 2 + (r + 1 / (2 * B)) ** 2,
    "apo_zero": lambda c, r: 1 - sigmoid(B * c) + sigmoid(B * r),
    "apo_down": lambda c, r: sigmoid(B * c) + 1 - sigmoid(B * (c - r)),
    "aot": lambda c, r: -log_sigmoid(B * (c - r)),
    "aot_unpaired": lambda c, r: -log_sigmoid(B * (c - r)),
    "discopop": lambda c, r: (
        -log_sigmoid(B * (c - r)) * (1 - sigmoid(B * (c - r) / 0.05)) + np.exp(-B * (c - r)) * sigmoid(B * (c - r) / 0.05)
    ),
    "sigmoid_norm": lambda c, r: -log_sigmoid(B * (c / CHOSEN - r / REJECTED)),
}
OPTIONS = {"exo_pair": ("--label-smoothing", 0.1)}


def test_the_table_is_complete() -> None:
    assert [*DPO, "nll"] == loss_types(objectives.dpo) and [*CPO] == loss_types(objectives.cpo)


@pytest.mark.parametrize("loss", DPO)
def test_dpo(loss: str, train: Any) -> None:
    steps = train("dpo", "--loss-type", loss, "--beta", B, *OPTIONS.get(loss, ()))
    assert abs(steps[0]["rewards/chosen"]) < 1e-5 < abs(steps[-1]["rewards/margins"])
    for step in steps:
        c, r = step["rewards/chosen"] / B, step["rewards/rejected"] / B
        np.testing.assert_allclose(step[loss], DPO[loss](c, r), rtol=1e-4, atol=1e-6)
        assert step["loss"] == step[loss]
        np.testing.assert_allclose(step["rewards/margins"], B * (c - r), rtol=1e-4, atol=1e-6)
        assert step["rewards/accuracies"] == (c > r if abs(c - r) > 1e-5 else 0.5)  # the first step is a tie


def margin_of(step: dict[str, Any]) -> float:
    return step["rewards/chosen"] - step["rewards/rejected"]


@pytest.mark.parametrize(
    ("flags", "loss"),
    [
        (("--loss-type", "sigmoid", "--label-smoothing", 0.2), lambda z: -0.8 * log_sigmoid(z) - 0.2 * log_sigmoid(-z)),
        (("--loss-type", "robust", "--label-smoothing", 0.2), lambda z: (0.2 * log_sigmoid(-z) - 0.8 * log_sigmoid(z)) / 0.6),
        (("--loss-type", "hinge", "--delta", 0.25), lambda z: max(0, 0.25 - z)),
        (("--dpo-loss-type", "hinge"), lambda z: max(0, 1 - z)),
    ],
    ids=["label smoothing", "robust", "margin", "alias"],
)
def test_options_of_dpo(flags: tuple[Any, ...], loss: Callable[[float], float], train: Any) -> None:
    for step in train("dpo", "--beta", B, *flags):
        np.testing.assert_allclose(step["loss"], loss(margin_of(step)), rtol=1e-4, atol=1e-6)


def test_penalty_of_dpop(train: Any) -> None:
    """Rejected completions are pushed down with the chosen ones: a learning rate that makes the penalty bite."""
    for step in train("dpo", "--loss-type", "dpop", "--delta", 3, "--beta", B, "--learning-rate", 0.2):
        c = step["rewards/chosen"] / B
        np.testing.assert_allclose(step["loss"], -log_sigmoid(margin_of(step) - B * 3 * max(0, -c)), rtol=1e-4, atol=1e-6)


def test_mixture(train: Any) -> None:
    steps = train("dpo", "--loss-type", "0.8*sigmoid+0.2*bco_pair+nll", "--beta", B)
    for step in steps:
        np.testing.assert_allclose(step["loss"], 0.8 * step["sigmoid"] + 0.2 * step["bco_pair"] + step["nll_loss"], rtol=1e-5)
        np.testing.assert_allclose(step["nll_loss"], -step["logps/chosen"] / CHOSEN, rtol=1e-5)
    np.testing.assert_allclose(steps[0]["sigmoid"], np.log(2), rtol=1e-6)


def test_length_desensitized(train: Any, model_folder: Path) -> None:
    """Tokens past the shorter completion weigh alpha, in the reference too."""
    policy = load(str(model_folder))[0]
    ids = [*b"who? abcdef"]
    chosen = direct(policy, tokens("who? abcdef"))[len(ids) - 7 - 1 :]
    steps = train("dpo", "--ld-alpha", 0.25)
    np.testing.assert_allclose(steps[0]["logps/chosen"], chosen[:REJECTED].sum() + 0.25 * chosen[REJECTED:].sum(), rtol=1e-5)
    assert abs(steps[0]["rewards/chosen"]) < 1e-5
    plain, same = train("dpo"), train("dpo", "--ld-alpha", 1)
    assert [a["loss"] for a in plain] == [b["loss"] for b in same] != [c["loss"] for c in steps]


CPO: dict[str, Callable[[float, float], float]] = {  # of summed log-probabilities
    "sigmoid": lambda c, r: -log_sigmoid(0.1 * (c - r)),
    "hinge": lambda c, r: max(0, 1 - 0.1 * (c - r)),
    "ipo": lambda c, r: (c - r - 5) ** 2,
    "dpop": lambda c, r: -log_sigmoid(0.1 * (c - r - 50 * max(0, -c))),
    "simpo": lambda c, r: -log_sigmoid(0.1 * (c - r) - 0.5),
}


@pytest.mark.parametrize("loss", CPO)
def test_cpo(loss: str, train: Any) -> None:
    averages = loss in ("ipo", "simpo")
    for step in train("cpo", "--loss-type", loss):
        c, r = step["logps/chosen"], step["logps/rejected"]
        np.testing.assert_allclose(step[loss], CPO[loss](c, r), rtol=1e-4)
        np.testing.assert_allclose(step["nll_loss"], -c if averages else -c / CHOSEN, rtol=1e-5)
        np.testing.assert_allclose(step["loss"], step[loss] + step["nll_loss"], rtol=1e-5)


def test_options_of_cpo(train: Any) -> None:
    flags = ("--loss-type", "simpo", "--alpha", 0, "--gamma", 1, "--beta", 2, "--label-smoothing", 0.1)
    for step in train("cpo", *flags):
        z = 2 * (step["logps/chosen"] - step["logps/rejected"]) - 1
        np.testing.assert_allclose(step["loss"], -0.9 * log_sigmoid(z) - 0.1 * log_sigmoid(-z), rtol=1e-4)
    for step in train("cpo", "--loss-type", "hinge", "--delta", 2.5, "--alpha", 0.5):
        margin = 0.1 * (step["logps/chosen"] - step["logps/rejected"])
        np.testing.assert_allclose(step["loss"], max(0, 2.5 - margin) + 0.5 * step["nll_loss"], rtol=1e-4)


@pytest.mark.parametrize("on_prompt", [False, True], ids=["completions", "prompts too"])
@pytest.mark.parametrize("weight", [None, 0, 2.5])
def test_orpo(on_prompt: bool, weight: float | None, train: Any, tmp_path: Path, model_folder: Path) -> None:
    data = write(tmp_path / "weighted.jsonl", [p | ({} if weight is None else {"preference_score": weight}) for p in PAIRS])
    steps = train("orpo", *(("--nll-on-prompt",) if on_prompt else ()), data=data)
    for step in steps:
        odds = log_odds(step["logps/chosen"]) - log_odds(step["logps/rejected"])
        np.testing.assert_allclose(step["log_odds_chosen"], odds, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(step["log_odds_ratio"], log_sigmoid(odds), rtol=1e-4)
        expected = step["nll_loss"] - 0.1 * (1 if weight is None else weight) * log_sigmoid(odds)
        np.testing.assert_allclose(step["loss"], expected, rtol=1e-4)
    logps = direct(load(str(model_folder))[0], tokens("who? abcdef"))
    np.testing.assert_allclose(steps[0]["nll_loss"], -(logps if on_prompt else logps[-CHOSEN:]).mean(), rtol=1e-5)
    np.testing.assert_allclose(steps[0]["logps/chosen"], logps[-CHOSEN:].mean(), rtol=1e-5)


def tokens(text: str) -> np.ndarray:
    inner = byte_tokenizer()
    return np.array([*inner.encode(text), inner.eos_token_id])


def direct(model: Any, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities of ids[1:], without any of our code."""
    logits = np.array(model(mx.array(ids[None, :-1]))[0].astype(mx.float32)).astype(np.float64)
    return logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))


@pytest.mark.parametrize(
    ("method", "flags", "message"),
    [
        ("dpo", ("--loss-type", "sigmoidal"), "--loss-type"),
        ("dpo", ("--dpo-loss-type", "kto"), "--loss-type"),
        ("dpo", ("--loss-type", "0.5*sigmoid+x*hinge"), "'x'"),
        ("dpo", ("--loss-type", "exo_pair"), "label_smoothing > 0"),
        ("cpo", ("--loss-type", "bco_pair"), "loss-type"),
        ("cpo", ("--loss-type", "simpo", "--beta", 0), "--beta must be > 0"),
        ("dpo", ("--label-smoothing", 0.5), "--label-smoothing must be < 0.5"),
        ("dpo", ("--ld-alpha", 2), "--ld-alpha must be <= 1"),
        ("dpo", ("--reference-model-path", "/absent"), "--reference-model-path /absent: no such folder"),
    ],
)
def test_what_is_refused(
    method: str, flags: tuple[Any, ...], message: str, model_folder: Path, pairs: Path, tmp_path: Path, mlxlora: Any
) -> None:
    outcome = mlxlora(
        method, "--model", model_folder, "--data", pairs, "--batch-size", 1, "--adapter-path", tmp_path / "run", *flags
    )
    assert outcome.code == 2 and message in outcome.err
    assert "Traceback" not in outcome.err and not (tmp_path / "run").exists()


def test_names_in_a_file(model_folder: Path, pairs: Path, tmp_path: Path, mlxlora: Any) -> None:
    for method, name, value in (("dpo", "dpo_loss_type", "hinge"), ("cpo", "dpo_cpo_loss_type", "simpo")):
        (tmp_path / "run.yaml").write_text(f"{name}: {value}\n")
        flags = ("--model", model_folder, "--data", pairs, *QUICK, "--adapter-path", tmp_path / method)
        assert mlxlora(method, "-c", tmp_path / "run.yaml", *flags).code == 0
        assert all(value in record for record in records(tmp_path / method))


# --- rows ------------------------------------------------------------------------------------------


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED, GOOD, BAD = turn("user", "hi"), turn("assistant", "yes"), turn("assistant", "no")
SHARE_GPT = [{"from": "human", "value": "hi"}], {"from": "gpt", "value": "yes"}, {"from": "gpt", "value": "no"}
CHAT, END = "<user>hi<|im_end|><assistant>", "<|im_end|>"
HH = "\n\nHuman: hi\n\nAssistant:"
ROWS: dict[str, tuple[dict[str, Any], str, str, str]] = {  # a row, the text of its prompt, and of its answers before their end
    "strings": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a", "b", "c"),
    "system": ({"prompt": "a", "chosen": "b", "rejected": "c", "system": "S"}, "S\n\na", "b", "c"),
    "messages": ({"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]}, CHAT, "yes", "no"),
    "one message": ({"prompt": "hi", "chosen": GOOD, "rejected": BAD}, CHAT, "yes", "no"),
    "system and messages": (
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD], "system": "S"},
        f"<system>S<|im_end|>{CHAT}",
        "yes",
        "no",
    ),
    "conversations": ({"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CHAT, "yes", "no"),
    "objects": ({"chosen": {"messages": [ASKED, GOOD]}, "rejected": {"messages": [ASKED, BAD]}}, CHAT, "yes", "no"),
    "repeated prompt": ({"prompt": [ASKED], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, CHAT, "yes", "no"),
    "HH-RLHF": ({"chosen": f"{HH} yes", "rejected": f"{HH} no"}, HH, " yes", " no"),
    "ShareGPT": (dict(zip(("conversations", "chosen", "rejected"), SHARE_GPT, strict=True)), CHAT, "yes", "no"),
}


@pytest.fixture(scope="module")
def chat_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), ROWS.values(), ids=ROWS)
def test_rows(row: dict, prompt: str, chosen: str, rejected: str, chat_folder: Path, tmp_path: Path) -> None:
    pair = items(write(tmp_path / "rows.jsonl", [row]), chat_folder)[0]
    tokenizer = load(str(chat_folder))[1]
    for side, text in ((pair.chosen, chosen), (pair.rejected, rejected)):
        assert tokenizer.decode(side.tokens.tolist()) == prompt + text + END
        assert tokenizer.decode(side.tokens[side.loss_mask].tolist()) == text + END


@pytest.mark.parametrize("name", ["lf_dpo_en_demo.json", "rasbt_preference.json"])
def test_published_rows(name: str, shared: Any, chat_folder: Path) -> None:
    rows = orjson.loads(shared(f"data/{name}").read_bytes())
    found = items(shared(f"data/{name}"), chat_folder, max_seq_length=10**6)
    tokenizer = load(str(chat_folder))[1]
    assert len(found) == len(rows)
    for pair, row in zip(found[:40], rows, strict=False):
        for side, answer in ((pair.chosen, row["chosen"]), (pair.rejected, row["rejected"])):
            text = answer["value"] if isinstance(answer, dict) else answer
            loss_mask = tokenizer.decode(side.tokens[side.loss_mask].tolist())
            assert text.endswith(loss_mask.removesuffix("<|im_end|>")) and loss_mask.endswith("<|im_end|>")


def items(path: Path, folder: Path, **options: Any) -> Any:
    source = sources.pairs(PairData(data=str(path), **options))
    return sources.tokenize(source, sources.load_rows(source.data, 0), load(str(folder))[1])["train"].items


@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo"])
def test_every_kind_of_row_trains(method: str, chat_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    data = write(tmp_path / "rows.jsonl", [row for row, *_ in ROWS.values()])
    flags = (*QUICK, "--batch-size", 4, "--adapter-path", tmp_path / "run")
    assert mlxlora(method, "--model", chat_folder, "--data", data, *flags).code == 0


LONG = [*PAIRS, {"prompt": "y" * 20, "chosen": "a" * 40, "rejected": "b"}, {"prompt": "z" * 60, "chosen": "a", "rejected": "b"}]


def test_over_long_pairs(model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    data, limit = write(tmp_path / "long.jsonl", LONG), ("--max-seq-length", 32)
    for method in ("dpo", "cpo", "orpo"):
        command = (method, "--model", model_folder, "--data", data, *QUICK, *limit)
        right = mlxlora(*command, "--adapter-path", tmp_path / f"{method}-right")
        left = mlxlora(*command, "--adapter-path", tmp_path / f"{method}-left", "--prompt-truncation", "left")
        assert right.code == left.code == 0
        assert "train: 5 rows\n" in right.out and "1 rows were cut to --max-seq-length 32" in right.out
        assert "1 rows dropped: too long for --max-seq-length 32" in right.out
        assert "2 rows were cut" in left.out and "dropped" not in left.out
    (*_, cut), (*_, moved, kept) = (
        items(data, model_folder, max_seq_length=32, prompt_truncation=side) for side in ("right", "left")
    )
    assert (cut.chosen.loss_mask.sum(), cut.rejected.loss_mask.sum()) == (12, 2)
    assert (moved.chosen.loss_mask.sum(), moved.rejected.loss_mask.sum()) == (31, 2)  # a token of the prompt predicts the first
    assert (kept.chosen.loss_mask.sum(), kept.rejected.loss_mask.sum(), len(kept.chosen.tokens)) == (2, 2, 32)


def test_nothing_fits(model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    data = write(tmp_path / "long.jsonl", LONG[-1:])
    outcome = mlxlora("dpo", "--model", model_folder, "--data", data, "--max-seq-length", 16, "--adapter-path", tmp_path / "run")
    assert outcome.code == 2 and "raise --max-seq-length" in outcome.err


# --- the step --------------------------------------------------------------------------------------


def test_names_of_metrics(model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    write(tmp_path / "data" / "train.jsonl", PAIRS)
    write(tmp_path / "data" / "valid.jsonl", PAIRS[:2])
    own = {"dpo": {"sigmoid"}, "cpo": {"sigmoid", "nll_loss"}, "orpo": {"nll_loss", "log_odds_ratio", "log_odds_chosen"}}
    for method, names in own.items():
        flags = (*QUICK, "--batch-size", 2, "--adapter-path", tmp_path / method)
        assert mlxlora(method, "--model", model_folder, "--data", tmp_path / "data", *flags).code == 0
        found = records(tmp_path / method)
        assert [r["split"] for r in found] == ["valid", "train", "train", "train", "valid"]
        assert all(REWARDS | names | {"loss"} <= record.keys() for record in found)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded."""
    seen: list[str] = []
    real = loading.load_with_config

    def watched(options: Any, *how: Any, **more: Any) -> Any:
        seen.append(options.model)
        return real(options, *how, **more)

    for module in ("models.loading", "adapters.prepare"):  # the policy; other models
        monkeypatch.setattr(f"mlxlora.{module}.load_with_config", watched)
    return seen


@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo"])
def test_one_model_and_one_forward_for_both_sides(
    method: str, loads: list[str], train: Any, model_folder: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.models.llama import LlamaModel

    shapes, called = [], LlamaModel.__call__
    monkeypatch.setattr(LlamaModel, "__call__", lambda self, x, *a, **k: (shapes.append(x.shape), called(self, x, *a, **k))[1])
    train(method, "--batch-size", 3)
    assert loads == [str(model_folder)]
    traced = [shape for shape in shapes if shape[0] > 1]  # the scorer asks a single row what the model is made of
    assert traced == [(6, 32)] * (2 if method == "dpo" else 1)  # the reference, and a step that runs three times


@pytest.mark.parametrize("method", ["cpo", "orpo"])
def test_no_reference_is_ever_scored(method: str, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxlora.training.prepared.with_reference", None)
    monkeypatch.setattr("mlxlora.training.prepared.referenced", None)
    train(method)
    assert not (tmp_path / "cache").exists()


def test_another_reference(train: Any, loads: list[str], model_folder: Path, tmp_path: Path) -> None:
    """Its log-probabilities are subtracted: rewards of the first step are differences of the two models."""
    other = load(str(model_folder))[0]
    other.update({"lm_head": {"weight": other.lm_head.weight * 9}})
    save_model(tmp_path / "other", model_folder, other)
    policy = load(str(model_folder))[0]
    first = train("dpo", "--reference-model-path", tmp_path / "other", "--beta", B)[0]
    assert loads == [str(model_folder), str(tmp_path / "other")]
    c, r = (
        (direct(policy, tokens(text))[-n:] - direct(other, tokens(text))[-n:]).sum()
        for text, n in (("who? abcdef", CHOSEN), ("who? xyz", REJECTED))
    )
    np.testing.assert_allclose([first["rewards/chosen"], first["rewards/rejected"]], [B * c, B * r], rtol=1e-4)
    np.testing.assert_allclose(first["loss"], -log_sigmoid(B * (c - r)), rtol=1e-4)
    assert abs(first["loss"] - np.log(2)) > 1e-3


def save_model(folder: Path, like: Path, model: Any) -> None:
    folder.mkdir()
    for file in like.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    mx.save_safetensors(str(folder / "model.safetensors"), snapshot_arrays(model), {"format": "mlx"})


def snapshot_arrays(model: Any) -> dict[str, mx.array]:
    return {name: mx.array(value) for name, value in snapshot(model.parameters()).items()}


@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo"])
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_is_trained(method: str, kind: str, model_folder: Path, pairs: Path, tmp_path: Path, mlxlora: Any) -> None:
    """Margins grow, and mlx-lm loads the adapters and generates with them."""
    folder, rate = tmp_path / "run", 1e-3 if kind == "full" else 1e-2
    flags = (*QUICK, "--train-type", kind, "--learning-rate", rate, "--iters", 8, "--adapter-path", folder)
    assert mlxlora(method, "--model", model_folder, "--data", pairs, *flags).code == 0
    steps = records(folder)
    if method == "dpo":
        np.testing.assert_allclose(steps[0]["loss"], np.log(2), rtol=1e-6)
    assert steps[-1]["rewards/margins"] > steps[0]["rewards/margins"]
    model, tokenizer = load(str(model_folder), adapter_path=str(folder))[:2]
    trained = direct(model, tokens(f"{PAIRS[0]['prompt']} abcdef"))[-CHOSEN:].sum()
    before = direct(load(str(model_folder))[0], tokens(f"{PAIRS[0]['prompt']} abcdef"))[-CHOSEN:].sum()
    assert trained != before
    assert isinstance(generate(model, tokenizer, "who?", max_tokens=3), str)


@pytest.mark.parametrize("method", ["dpo", "cpo", "orpo"])
def test_resumed(method: str, model_folder: Path, tmp_path: Path, mlxlora: Any) -> None:
    rows = [{"prompt": "q" * n, "chosen": "a" * (n % 4 + 1), "rejected": "b" * (n % 3 + 1)} for n in range(1, 8)]
    write(tmp_path / "data" / "train.jsonl", rows)
    write(tmp_path / "data" / "valid.jsonl", rows[:2])
    command = (method, "--model", model_folder, "--data", tmp_path / "data", "--num-layers", -1, "--batch-size", 2)
    command += ("--steps-per-report", 2, "--steps-per-eval", 3, "--save-every", 3, "--dropout", 0.2, "--learning-rate", 1e-3)
    assert mlxlora(*command, "--iters", 18, "--adapter-path", tmp_path / "whole").code == 0
    stopped = (*command, "--iters", 18, "--adapter-path", tmp_path / "stopped")
    if method == "dpo":
        assert stop(signal.SIGKILL, stopped, tmp_path / "stopped", 6, 0.01) == -signal.SIGKILL
    else:
        assert mlxlora(*command, "--iters", 6, "--adapter-path", tmp_path / "stopped").code == 0
    assert mlxlora(*stopped, "--resume").code == 0
    same_run(tmp_path / "stopped", tmp_path / "whole")


LAWFUL = {
    "dpo": objectives.dpo(loss_type="sigmoid+0.2*ipo+nll", ld_alpha=0.5),
    "cpo": objectives.cpo(),
    "simpo": objectives.simpo(),
    "orpo": objectives.orpo(),
    "orpo with prompts": objectives.orpo(nll_on_prompt=True),
}


@pytest.mark.parametrize("name", LAWFUL)
@given(seed=st.integers(0, 99), cuts=st.sets(st.integers(1, 4), min_size=1))
@settings(deadline=None, max_examples=4)
def test_pieces_of_a_batch(name: str, seed: int, cuts: set[int]) -> None:
    """k pieces make the same step as the batch that they are pieces of: loss, metrics, gradient norm and weights."""
    prompts = name.endswith("prompts")
    sides = [with_ref(example(20 * seed + i, train_prompt=prompts), i) for i in range(10)]
    rows = [Pair(sides[i], sides[i + 5], 0.5 + i) for i in range(5)]
    split = [rows[a:b] for a, b in pairwise([0, *sorted(cuts), 5])]
    (whole, at_once), (parts, in_pieces) = (stepped(LAWFUL[name], [pair_batch(p) for p in groups]) for groups in ([rows], split))
    assert whole.keys() == parts.keys()
    for metric, value in whole.items():
        np.testing.assert_allclose(parts[metric], value, rtol=2e-5, atol=2e-6, err_msg=metric)
    assert distance(in_pieces, at_once) < 1e-6


def with_ref(side: Any, seed: int) -> Any:
    from attrs import evolve

    count = int(side.loss_mask.sum())
    return evolve(side, ref_logps=-np.random.default_rng(seed).uniform(1, 5, count).astype(np.float32))


def stepped(objective: Any, micros: list[MicroBatch]) -> tuple[dict[str, float], dict[str, mx.array]]:
    """Metrics of one step of plain descent, and the weights after it."""
    model = dense()
    step = make_step(model, optim.SGD(1e-2), objective)
    metrics = step(*(micro.batch for micro in micros))
    return numbers(metrics), snapshot_arrays(model)
