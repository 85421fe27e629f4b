"""What a run is, in a few lines before its first step."""

from typing import Any

from mlx_lm.utils import get_total_parameters

from ..config.given import storable
from ..config.options import AdapterOptions, Training
from ..distributed.sharding import count, is_sharded
from ..reporting.card import portable
from ..reporting.text import amount
from ..utils.device import device_name, memory_limit
from .inputs import Run
from .prepared import Prepared
from .schedule import Schedule

_COUNTED = 200_000  # rows whose tokens are counted at most


def overview(run: Run, prepared: Prepared) -> dict[str, str]:
    """A text for each fact: model, what is trained, method, data, steps, learning rate, device, folder."""
    options, schedule = run.options, prepared.schedule
    trainable = count(run.model, trainable=True)
    total = count(run.model) if is_sharded(run.model) else get_total_parameters(run.model)
    return {
        "model": f"{_name(options.config)}, {amount(total)} parameters{_bits(run.model)}",
        "trained": f"{_adapters(options.adapter)}, {amount(trainable)} parameters ({trainable / total:.2%})",
        "method": f"{options.method.title}; loss: {_loss(run)}",
        "data": _data(run, schedule),
        "steps": _steps(schedule),
        "learning rate": rate_text(options.training, schedule.steps),
        "device": f"{device_name() or 'CPU'}, memory limit {memory_limit() / 1e9:.1f} GB",
        "folder": str(options.directory),
    }


def rate_text(training: Training, steps: int) -> str:
    """The learning rate, its course and the optimizer.

    >>> rate_text(Training(learning_rate=1e-4, lr_schedule="cosine", warmup=10), 600)
    '0.0001, cosine to 0 in 600 steps, after 10 of warm-up; adam'
    """
    if not isinstance(training.optimizer, str):
        return str(storable(training.optimizer))
    if callable(training.learning_rate):
        return f"{storable(training.learning_rate)}; {training.optimizer}"
    text = f"{training.learning_rate:g}"
    if training.lr_schedule in ("linear", "cosine"):
        text += f", {training.lr_schedule} to {training.lr_end:g} in {training.lr_decay_steps or steps:,} steps"
    elif training.lr_schedule != "constant":
        text += f", {training.lr_schedule}"
    if training.warmup:
        text += f", after {training.warmup:,} of warm-up"
    return f"{text}; {training.optimizer}"


def _name(config: Any) -> str:
    return str(portable(config.get("model")) or "given in Python")


def _bits(model: Any) -> str:
    found = sorted({module.bits for module in model.modules() if isinstance(getattr(module, "bits", None), int)})
    return f", {' and '.join(map(str, found))} bits" if found else ""


def _adapters(adapter: AdapterOptions) -> str:
    kind = {"full": "weights", "dora": "DoRA", "lora": "LoRA"}[adapter.train_type]
    layers = {None: "", -1: " in all blocks", 1: " in the last block"}.get(
        adapter.num_layers, f" in the last {adapter.num_layers} blocks"
    )
    return f"{kind}{'' if adapter.train_type == 'full' else f' of rank {adapter.rank}'}{layers}"


def _loss(run: Run) -> str:
    """The terms that are optimized, with their weights."""
    weighted = [(weight, term.name) for weight, term in run.objective.terms if weight]
    return " + ".join(name if weight == 1 else f"{weight:g}·{name}" for weight, name in weighted) or "none"


def _data(run: Run, schedule: Schedule) -> str:
    counted = {name: len(schedule.items(name)) for name in ("train", "valid", "test")}
    train = f"{counted.pop('train'):,} rows"
    items = schedule.items("train")
    if (tokens := getattr(items, "tokens", None)) is None and not run.source.online and len(items) <= _COUNTED:
        tokens = sum(len(e.tokens) for item in items for e in schedule.source.examples(item))
    train += f", {amount(tokens)} tokens" if tokens else ""
    return "; ".join([train, *(f"{name} {rows:,} rows" for name, rows in counted.items() if rows)])


def _steps(schedule: Schedule) -> str:
    training = schedule.training
    batch = training.batch_size * training.grad_accumulation_steps
    epochs = schedule.steps / schedule.steps_per_epoch
    return f"{schedule.steps:,} of {batch:,} {'row' if batch == 1 else 'rows'} each ({epochs:.3g} epochs)"
