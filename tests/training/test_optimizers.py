"""LoRA+: B learns faster than A, exactly as two optimisers would do it, in every layout of the parameters."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlora.adapters.prepare import prepare
from mlxlora.config.options import AdapterOptions, Training
from mlxlora.data.batching import collate
from mlxlora.errors import InputError
from mlxlora.methods import SFT
from mlxlora.objectives.supervised import sft
from mlxlora.training.checkpoint import load_checkpoint, save_checkpoint
from mlxlora.training.optimizers import make_optimizer
from mlxlora.training.progress import Progress
from mlxlora.training.step import make_step
from mlxlora.training.trainable import Separate, Vector, layout
from tests.support.tiny import dense, distance, example, snapshot

RATIO, RATE = 16.0, 1e-3
BATCHES = [collate([example(4 * k + i) for i in range(4)]) for k in range(3)]
PLAIN: dict[str, Any] = {
    "adam": lambda rate: optim.Adam(rate, bias_correction=True),
    "adamw": lambda rate: optim.AdamW(rate, bias_correction=True, weight_decay=0.1),
    "sgd": lambda rate: optim.SGD(rate, weight_decay=0.1, momentum=0.5),
    "lion": lambda rate: optim.Lion(rate, weight_decay=0.1),
    "muon": lambda rate: optim.Muon(rate, weight_decay=0.1),
    "adafactor": lambda rate: optim.Adafactor(rate, relative_step=False, scale_parameter=False, weight_decay=0.1),
}


def adapters(kind: str = "lora") -> Any:
    mx.random.seed(3)
    return prepare(dense(), AdapterOptions(train_type=kind, num_layers=-1, rank=4, scale=2.0)).train()  # type: ignore[arg-type]


def options(name: str, **changes: Any) -> Training:
    decay = {} if name == "adam" else {"weight_decay": 0.1}
    momentum = {"momentum": 0.5} if name == "sgd" else {}
    return Training(optimizer=name, learning_rate=RATE, loraplus_lr_ratio=RATIO, **decay, **momentum, **changes)  # type: ignore[arg-type]


def by_hand(model: Any, name: str) -> None:
    """Two optimisers on the two halves of the gradient; no clipping."""
    step = make_step(model, optim.SGD(0.0), sft())  # for its gradient
    first, second = PLAIN[name](RATE), PLAIN[name](RATIO * RATE)
    for batch in BATCHES:
        grads, _ = step.backward(batch, sft().counts(batch))
        flat = dict(tree_flatten(step.trained.unpack(grads)))
        weights = dict(tree_flatten(model.trainable_parameters()))
        in_loraplus_group = {n for n in flat if not n.endswith("lora_a")}
        new = {}
        for optimizer, names in ((first, flat.keys() - in_loraplus_group), (second, in_loraplus_group)):
            new |= optimizer.apply_gradients({n: flat[n] for n in names}, {n: weights[n] for n in names})
        model.load_weights(list(new.items()), strict=False)
        step.trained.pull()


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", PLAIN)
def test_two_groups(name: str, kind: str, eager: None) -> None:
    model, wanted = adapters(kind), adapters(kind)
    step = make_step(model, make_optimizer(options(name), 3), sft())
    metrics = [step.measured(batch) for batch in BATCHES]
    by_hand(wanted, name)
    mine, theirs = snapshot(model.trainable_parameters()), snapshot(wanted.trainable_parameters())
    start = snapshot(adapters(kind).trainable_parameters())
    moved = {n: theirs[n] - start[n] for n in theirs}
    assert distance({n: mine[n] - start[n] for n in mine}, moved) < 1e-4  # type: ignore[arg-type]
    assert metrics[0]["learning_rate"] == pytest.approx(RATE)


def test_b_moves_further() -> None:
    """In the first step of Adam every number moves by its rate."""
    model = adapters()
    before = snapshot(model.trainable_parameters())
    make_step(model, make_optimizer(options("adam"), 3), sft())(BATCHES[0])
    after = snapshot(model.trainable_parameters())
    moved = {n: np.abs(after[n] - before[n]) for n in after}
    b = np.concatenate([moved[n].ravel() for n in moved if n.endswith("lora_b")])
    assert np.median(b) == pytest.approx(RATIO * RATE, rel=1e-2)
    assert all(moved[n].max() <= 1.01 * RATE for n in moved if n.endswith("lora_a"))


@pytest.mark.parametrize(("name", "kind"), [("adam", Vector), ("muon", Separate)])
def test_layouts(name: str, kind: type) -> None:
    model = adapters()
    parameters = model.trainable_parameters()
    found = layout(make_optimizer(options(name), 3), model)
    assert type(found) is kind
    packed = found.pack(parameters)
    assert kind is Separate or packed.keys() == {"trained", "lora_b"}
    back = found.unpack(packed)
    assert all(mx.array_equal(a, b) for (_, a), (_, b) in zip(tree_flatten(back), tree_flatten(parameters), strict=True))


@pytest.mark.parametrize("name", ["adam", "adafactor"])
def test_resume(name: str, tmp_path: Path, eager: None) -> None:
    training = options(name, warmup=2, lr_schedule="linear")
    chosen = AdapterOptions(num_layers=-1, rank=4, scale=2.0)
    model, optimizer = adapters(), make_optimizer(training, 5)
    step = make_step(model, optimizer, sft())
    step(BATCHES[0])
    path = save_checkpoint(tmp_path, model, optimizer, Progress(step=1), chosen)
    other, again = prepare(dense(), chosen).train(), make_optimizer(training, 5)
    load_checkpoint(path, other, again)
    step(BATCHES[1])
    make_step(other, again, sft())(BATCHES[1])
    mine, theirs = snapshot(other.trainable_parameters()), snapshot(model.trainable_parameters())
    assert all(np.array_equal(mine[n], theirs[n]) for n in theirs)


def test_full_weights_have_no_b(model_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"text": "abc"}\n' * 4)
    with pytest.raises(InputError, match=r"--loraplus-lr-ratio 4\.0 is for adapters; use --train-type lora or dora"):
        SFT(model=str(model_folder), data=str(rows), train_type="full", loraplus_lr_ratio=4.0, adapter_path=str(tmp_path / "a"))


@pytest.mark.parametrize("separate", [False, True], ids=["vector", "separate"])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_weight_decay_in_full_training(name: Any, decay_norms: bool, separate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: without a gradient, rate 0.1 and decay 0.5 leave 1 - 0.1·0.5 = 0.95 of a weight, and all of a norm's or a bias."""
    if separate:
        monkeypatch.setattr("mlxlora.training.trainable._LARGEST", 0)
    model = dense()
    block = model.layers[0].self_attn  # type: ignore[union-attr]
    block.q_proj.bias = mx.ones((block.q_proj.weight.shape[0],))
    prepare(model, AdapterOptions(train_type="full", num_layers=-1))
    before = snapshot(model.trainable_parameters())
    training = Training(optimizer=name, learning_rate=0.1, weight_decay=0.5, decay_norms=decay_norms)
    step = make_step(model, make_optimizer(training, 1, before), 0.0 * sft())
    assert step.measured(BATCHES[0])["grad_norm"] == 0.0
    norms = {path for path in before if "norm" in path or path.endswith("bias")}
    assert "model.layers.0.self_attn.q_proj.bias" in norms and "model.norm.weight" in norms
    for path, value in snapshot(model.trainable_parameters()).items():
        left = 1.0 if path in norms and not decay_norms else 0.95
        np.testing.assert_allclose(value, left * before[path], rtol=1e-6, err_msg=path)


def test_without_weight_decay_there_is_one_optimizer() -> None:
    model = prepare(dense(), AdapterOptions(train_type="full", num_layers=-1))
    paths = snapshot(model.trainable_parameters())
    for training in (Training(optimizer="adamw"), Training(optimizer="adamw", weight_decay=0.1, decay_norms=True)):
        assert isinstance(make_optimizer(training, 1, paths), optim.AdamW)
    adapters_alone = ("model.layers.0.self_attn.q_proj.lora_a", "model.layers.0.self_attn.q_proj.lora_b")
    assert isinstance(make_optimizer(Training(optimizer="adamw", weight_decay=0.1), 1, adapters_alone), optim.AdamW)
