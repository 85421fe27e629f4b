"""Which architectures of mlx-lm train: a small model of each takes LoRA and DoRA steps, and every claim is checked.

    python -m benchmarks.architectures [NAME ...] [--write benchmarks/ARCHITECTURES.md] [--json FILE]

lora, dora: the losses of some compiled steps are finite and fall; the saved adapter, loaded by mlx-lm into the same
base model, gives the same logits, bit for bit (mlx-lm has no DoRA for experts: there, the other layers get it). split:
the boundary at which the model was cut into backbone and head, loss and gradient being those of the whole model.
disabled: without its adapters the trained model is the base again, bit for bit. checkpoint: the gradient with
recomputed blocks is that without. faster: what applies to it, each tried out on it: the loss keeps one row of its gradient
for each scored token, not its logits (rows); a prompt is computed once for its completions (prompts); several examples share
a row (packing); attention goes in chunks of queries where that pays, with the same gradient (chunks); recurrent layers that
mlx-lm computes token by token go in chunks, with the same gradient (recurrence).
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from mlxlora.utils.blas import load_fast_blas

load_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import numpy as np  # noqa: E402
from attrs import asdict, define  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models.switch_layers import SwitchLinear  # noqa: E402
from mlx_lm.tuner.utils import load_adapters  # noqa: E402

from benchmarks.common import markdown, setting, write_json  # noqa: E402
from benchmarks.small import UNADAPTED, VOCABULARY, architectures, build  # noqa: E402
from mlxlora import AdapterOptions, Batch, disabled, make_step, objectives, prepare, save  # noqa: E402
from mlxlora.adapters.inject import linear_keys  # noqa: E402
from mlxlora.data.batching import collate  # noqa: E402
from mlxlora.data.tokenize import Example  # noqa: E402
from mlxlora.models import attention  # noqa: E402
from mlxlora.models.grad_checkpoint import checkpointed  # noqa: E402
from mlxlora.models.logprobs import Scorer, scorer  # noqa: E402
from mlxlora.models.recurrences import recurrence_by, recurrence_told  # noqa: E402
from mlxlora.models.row_layouts import layout_obstacle, packed_layout  # noqa: E402

STEPS = 4
COLUMNS = {
    "name": "architecture",
    "lora": "LoRA",
    "dora": "DoRA",
    "split": "split",
    "disabled": "disabled",
    "checkpoint": "checkpoint",
    "faster": "faster",
}


@define
class Result:
    """What was found for one architecture; "yes" where a claim holds, "no" where not, empty where it was not reached."""

    name: str
    lora: str = ""
    dora: str = ""
    split: str = ""
    disabled: str = ""
    checkpoint: str = ""
    faster: str = ""
    remark: str = ""

    @property
    def works(self) -> bool:
        """LoRA trains, is saved, and mlx-lm loads it."""
        return self.lora == "yes"


def examine(name: str) -> Result:
    """Every check of one architecture; one that fails is told in the remark and does not stop the others."""
    result = Result(name)
    if name in UNADAPTED:
        modules, why = UNADAPTED[name]
        result.remark = f"with --lora-keys, without {', '.join(modules)}: {why}"
    state: dict[str, Any] = {}
    _attempt(result, "lora", lambda: _trains(name, "lora", state))
    if result.works:
        _attempt(result, "split", lambda: _split(state["model"]))
        _attempt(result, "disabled", lambda: _disabled(name, state["model"]))
        _attempt(result, "faster", lambda: _faster(state["model"]))
        _attempt(result, "checkpoint", lambda: _checkpoint(state["model"]))
        _attempt(result, "dora", lambda: _trains(name, "dora", {}))
    return result


def _attempt(result: Result, column: str, check: Callable[[], str]) -> None:
    try:
        cell = check()
    except (Exception, SystemExit) as error:  # whatever an architecture raises is a finding
        cell = "no"
        result.remark = "; ".join(filter(None, [result.remark, f"{column}: {explain(error)}"]))
    setattr(result, column, cell)


def explain(error: BaseException) -> str:
    """One line: the kind of failure, and what was raised."""
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit | ImportError):
        return "cannot be built here: mlx-lm's module asks for a package that is not installed"
    if "No Metal back-end" in text:
        return "cannot run here: mlx-lm's forward is a Metal kernel without another form"
    if "Attempting to eval" in text:
        return "mlx-lm's forward evaluates arrays, which neither a compiled step nor a gradient can"
    if "not implemented" in text.lower() or "Cannot calculate VJP" in text:
        return f"mlx-lm's forward has no gradient ({text})"
    return text if isinstance(error, AssertionError) else f"{type(error).__name__}: {text}"


# --- checks -----------------------------------------------------------------------------------


def _trains(name: str, train_type: str, state: dict[str, Any]) -> str:
    """Some steps; saves the adapter and loads it with mlx-lm."""
    state["model"] = model = build(name)
    _logits(model, sample())
    options = AdapterOptions(train_type=train_type, num_layers=-1, rank=4, scale=2.0, lora_keys=_keys(model, name, train_type))
    prepare(model, options).train()
    batch = sample()
    step = make_step(model, optim.Adam(learning_rate=3e-3), objectives.sft())
    losses = [step(batch)["loss"].item() for _ in range(STEPS)]
    assert np.isfinite(losses).all(), f"the losses are not finite: {losses}"
    assert losses[-1] < losses[0], f"the loss does not fall: {losses}"
    with tempfile.TemporaryDirectory() as directory:
        save(model, directory, options, name)
        loaded = load_adapters(build(name), directory)
    assert _same(_logits(model, batch), _logits(loaded, batch)), "mlx-lm loads an adapter that gives other logits"
    return "yes"


def _keys(model: nn.Module, name: str, train_type: str) -> tuple[str, ...] | None:
    """None, mlx-lm's own choice, but where it fails; mlx-lm has no DoRA for experts, and some modules cannot be adapted."""
    blocks = {n: m for block in model.layers for n, m in block.named_modules()}  # type: ignore[union-attr]
    experts = train_type == "dora" and any("SwitchLinear" in type(m).__name__ for m in blocks.values())
    if not experts and name not in UNADAPTED:
        return None
    kinds = (nn.Linear, nn.Embedding) if experts else (nn.Linear, nn.Embedding, SwitchLinear)
    (without, _), ours = UNADAPTED.get(name, ((), "")), linear_keys(model)
    return tuple(sorted(n for n, m in blocks.items() if n in ours and isinstance(m, kinds) and n.rpartition(".")[2] not in without))


def _split(model: nn.Module) -> str:
    """The boundary, after loss and gradient were compared with those of the whole model."""
    score = scorer(model)
    if score.split is None:
        return "full logits"
    difference = _difference(_gradient(model, score), _gradient(model, Scorer(model, None)))
    assert difference < 1e-4, f"loss or gradient differs from that of the whole model by {difference:.1e}"
    return score.split.path


def _disabled(name: str, model: nn.Module) -> str:
    with disabled(model):
        inside = _logits(model, sample())
    assert _same(inside, _logits(build(name), sample())), "the logits are not those of the base"
    return "yes"


def _faster(model: nn.Module) -> str:
    """Which of the faster ways are open to it."""
    score = scorer(model)
    found = {
        "rows": score.split is not None and not score.trainable,
        "prompts": layout_obstacle(score.forward, model) is None,
        "packing": layout_obstacle(score.forward, model, packed_layout) is None,
        "chunks": attention.hook(model) > 0 and _chunks(model, score),
        "recurrence": recurrence_told(model) is not None and _recurrence(model, score),
    }
    return ", ".join(name for name, holds in found.items() if holds) or "none"


def _chunks(model: nn.Module, score: Scorer) -> bool:
    """Whether attention in chunks was in use, and changed no gradient."""
    with patch.object(attention, "blockwise", wraps=attention.blockwise) as used, attention.using("chunked"):
        chunked = _gradient(model, score)
    with attention.using("fused"):
        return used.called and _difference(chunked, _gradient(model, score)) < 1e-4


def _recurrence(model: nn.Module, score: Scorer) -> bool:
    """Whether recurrent layers in chunks change no gradient."""
    with recurrence_by("loop"):
        loop = _gradient(model, score)
    return _difference(_gradient(model, score), loop) < 1e-4


def _checkpoint(model: nn.Module) -> str:
    plain = _gradient(model, scorer(model))
    difference = _difference(_gradient(checkpointed(model), scorer(model)), plain)
    assert difference < 1e-4, f"the gradient differs by {difference:.1e}"
    return "yes"


def sample(rows: int = 2, length: int = 33) -> Batch:
    """A batch of random tokens, the same at every call; the second half of each row is scored."""
    rng = np.random.default_rng(0)
    loss_mask = np.arange(length) >= length // 2
    return collate([Example(rng.integers(1, VOCABULARY, length).astype(np.int32), loss_mask, None, "random") for _ in range(rows)])


def _gradient(model: nn.Module, score: Scorer) -> dict[str, mx.array]:
    """The loss and the gradient of every trainable parameter, computed eagerly."""
    batch, objective, before = sample(), objectives.sft(), model.trainable_parameters()

    def loss(parameters: Any) -> mx.array:
        model.update(parameters)
        return objective(*score(batch))[0]

    value, gradient = mx.value_and_grad(loss)(before)
    model.update(before)
    return {"loss": value, **dict(tree_flatten(gradient))}


def _difference(a: dict[str, mx.array], b: dict[str, mx.array]) -> float:
    """Largest difference, relative to the largest value of its array (at least 1e-3)."""
    worst = [mx.abs(a[n] - b[n]).max() / mx.maximum(mx.abs(b[n]).max(), 1e-3) for n in b]
    return mx.stack(worst).max().item()  # type: ignore[return-value]


def _logits(model: nn.Module, batch: Batch) -> mx.array:
    model.eval()
    with recurrence_by("loop"):  # mlx-lm's own operations, so that equal models give equal bits
        logits = model(batch.tokens)
    mx.eval(logits)
    model.train()
    return logits


def _same(a: mx.array, b: mx.array) -> bool:
    return mx.array_equal(a, b, equal_nan=True).item()  # type: ignore[return-value]


# --- the table ----------------------------------------------------------------------------------


def report(results: Sequence[Result]) -> str:
    """The table, and how many work."""
    works = sum(result.works for result in results)
    head = f"{works} of {len(results)} architectures of mlx-lm train, are saved and are loaded back by mlx-lm."
    rows = [asdict(result) for result in sorted(results, key=lambda r: (not r.works, r.name.lower()))]
    return f"{head}\n\n{markdown(rows, {**COLUMNS, 'remark': 'remark'})}\n"


def document(results: Sequence[Result]) -> str:
    """ARCHITECTURES.md."""
    device = mx.default_device().type.name
    intro = (__doc__ or "").split("\n\n")
    return "\n\n".join(
        [
            "# Architectures",
            intro[0],
            "Written by `python -m benchmarks.architectures --write benchmarks/ARCHITECTURES.md`: "
            f"small models, random float32 weights, {setting(device)}.",
            intro[2].strip(),
            report(results),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="architectures; all of mlx-lm's by default")
    parser.add_argument("--write", metavar="FILE", help="also write the table to this Markdown file")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    options = parser.parse_args()
    results = []
    for name in options.names or architectures():
        results.append(examine(name))
        print(" ".join(f"{value or '-'}" for value in asdict(results[-1]).values()), flush=True)
        mx.clear_cache()
    print("\n" + report(results))
    if options.write:
        Path(options.write).write_text(document(results), encoding="utf-8")
    if options.json:
        write_json(options.json, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
