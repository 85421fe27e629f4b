"""The adapter card: README.md of an adapter folder, in the form that the hub reads."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any

import attrs
import yaml

from .. import __version__
from ..config.options import (
    AdapterOptions,
    CPOOptions,
    DataOptions,
    DistillOptions,
    DPOOptions,
    GRPOOptions,
    KTOOptions,
    ModelOptions,
    OnlineDPOOptions,
    ORPOOptions,
    PairData,
    PromptData,
    RewardOptions,
    SamplingOptions,
    SFTOptions,
    Training,
)
from ..utils.files import atomic_file
from .history import METHOD, read_record
from .reporter import Reporter

CARD = "README.md"
METHODS = {
    "sft": SFTOptions,
    "distill": DistillOptions,
    "gkd": DistillOptions,
    "dpo": DPOOptions,
    "orpo": ORPOOptions,
    "cpo": CPOOptions,
    "kto": KTOOptions,
    "grpo": GRPOOptions,
    "online-dpo": OnlineDPOOptions,
}
_TITLES = {
    "sft": "supervised fine-tuning",
    "distill": "knowledge distillation",
    "gkd": "knowledge distillation on its own samples (GKD)",
    "dpo": "direct preference optimisation (DPO)",
    "orpo": "odds-ratio preference optimisation (ORPO)",
    "cpo": "contrastive preference optimisation (CPO)",
    "kto": "Kahneman-Tversky optimisation (KTO)",
    "online-dpo": "direct preference optimisation on its own samples (online DPO)",
    "grpo": "group-relative policy optimisation (GRPO)",
}
_OPTIONS = (ModelOptions, Training, AdapterOptions, DataOptions, PairData, PromptData, SamplingOptions, RewardOptions)
_MARK = "<!-- Written by mlxlora after every run; remove this line to keep a text of your own. -->"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r".*/models--(.+?)--([^/]+)/snapshots/[^/]+/?")

Row = Mapping[str, Any]


class Card(Reporter):
    """Writes the card into the folder of a run when it ends, early or not.

    Args:
        directory: of the run.
        rows: how many each split has.
    """

    def __init__(self, directory: Path, rows: Mapping[str, int]) -> None:
        self._directory, self._rows = directory, rows

    def finish(self, summary: Row) -> None:
        found = read_record(self._directory)
        write_card(self._directory, found.config, found.metrics, self._rows, stopped=summary.get("stopped", ""))


def write_card(
    directory: Path, config: Mapping[str, Any], metrics: Iterable[Row], rows: Mapping[str, int] | None = None, stopped: str = ""
) -> None:
    """Writes the card of a run, unless a person has made it their own."""
    file = directory / CARD
    if file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return
    with atomic_file(file) as temporary:
        temporary.write_text(card(config, list(metrics), rows or {}, stopped), encoding="utf-8")


def card(config: Mapping[str, Any], metrics: Sequence[Row], rows: Mapping[str, int] | None = None, stopped: str = "") -> str:
    """The text of an adapter card.

    Args:
        config: all options of the run by name; absolute paths are shortened to their last part.
        metrics: rows of metrics.jsonl.
        rows: how many of them each split had.
        stopped: where the run ended early, "after step 3".
    """
    config = portable(config)
    name, method, kind = config.get("model"), method_of(config), config.get("train_type", "lora")
    what = "weights" if kind == "full" else f"{'DoRA' if kind == 'dora' else 'LoRA'} adapters"
    trained = f"trained with mlxlora {__version__} by {_TITLES.get(method, 'an objective of its own')}"
    parts = [
        front_matter(name, ["mlxlora", kind, *([method] if method in METHODS else [])], adapter=kind != "full"),
        f"# {what[0].upper()}{what[1:]} for {name or 'a model'}",
        f"{what[0].upper()}{what[1:]}, {trained} on {_data(config, rows or {})}.{_base(config)}"
        + (f" The run was stopped {stopped}." if stopped else ""),
        _usage(name),
        _table("Options that differ from the defaults", ("option", "value"), _code(changed_options(config))),
        _table("Metrics", *_results(metrics)),
        _MARK,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def fused_card(base: str, config: Mapping[str, Any]) -> str:
    """The card of a model that has taken in its adapters."""
    name, quantized = portable(base), config.get("quantization")
    how = f"quantised to {quantized.get('bits')} bits" if quantized else "not quantised"
    lines = (
        front_matter(name, ["mlxlora"], adapter=False),
        f"# {name}, fine-tuned",
        f"{name} with adapters fused into its weights by mlxlora {__version__}; {how}.",
        '```bash\nmlx_lm.generate --model . --prompt "Hello"\n```',
    )
    return "\n\n".join(lines) + "\n"


def front_matter(base: str | None, tags: Sequence[str], *, adapter: bool, library: str = "mlx") -> str:
    """The YAML that the hub reads; the base is named only if it is on the hub.

    >>> print(front_matter("org/base", ["lora"], adapter=True))
    ---
    base_model: org/base
    base_model_relation: adapter
    library_name: mlx
    pipeline_tag: text-generation
    tags:
    - mlx
    - lora
    ---
    """
    of = {"base_model": base, "base_model_relation": "adapter" if adapter else "finetune"} if base and is_hub_name(base) else {}
    fields = {**of, "library_name": library, "pipeline_tag": "text-generation", "tags": [library, *tags]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def is_hub_name(name: str) -> bool:
    """Whether a model is named as on the hub.

    >>> is_hub_name("mlx-community/Qwen3-0.6B-4bit"), is_hub_name("models/mine/best"), is_hub_name("./mine")
    (True, False, False)
    """
    return bool(_HUB.fullmatch(name)) and not name.startswith(".") and not Path(name).exists()


def portable(value: Any) -> Any:
    """A value, or a tree of them, without the paths of this machine: an absolute path is its last part, a hub cache its name.

    >>> portable({"model": "/home/me/models/tiny", "data": "rows.jsonl", "keys": ["~/x/rewards.py"], "iters": 3})
    {'model': 'tiny', 'data': 'rows.jsonl', 'keys': ['rewards.py'], 'iters': 3}
    >>> portable("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc")
    'org/name'
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if not isinstance(value, str) or not value.startswith(("/", "~/")) or value == "/":
        return value
    cached = _CACHED.fullmatch(value)
    return f"{cached[1]}/{cached[2]}" if cached else Path(value).name


def method_of(config: Mapping[str, Any]) -> str:
    """The method that a configuration names, or whose options it has; empty for an objective given in Python.

    >>> method_of({"loss_type": "nll", "neftune_noise_alpha": 0.0, "objective": None}), method_of({"model": "m"})
    ('sft', '')
    """
    if METHOD in config:
        return next((name for name in METHODS if name == config[METHOD]), "")
    fields = {name: {field.name for field in attrs.fields(group)} for name, group in METHODS.items()}
    return max((name for name in METHODS if fields[name] <= config.keys()), key=lambda name: len(fields[name]), default="")


def _data(config: Row, rows: Mapping[str, int]) -> str:
    counted = ", ".join(f"{count} {'rows' if name == 'train' else name}" for name, count in rows.items() if count)
    return f"{config.get('data') or 'its own data'}{f' ({counted})' if counted else ''}"


def _base(config: Row) -> str:
    """What was done to the base, of whom the adapters are."""
    form = config.get("quantize")
    if not form:
        return ""
    kind = form if form.startswith("mx") else f"{form} bits"
    return (
        f" The model was quantised to {kind} as it was loaded (`--quantize {form}`), so the adapters were trained on what "
        "`mlx_lm.convert -q` makes of it; they fit the model as it is, too."
    )


def _usage(name: str | None) -> str:
    return f'```bash\nmlx_lm.generate --model {name or "MODEL"} --adapter-path . --prompt "Hello"\n```'


def _code(values: Row) -> list[tuple[str, str]]:
    return [(f"`{name}`", f"`{value}`") for name, value in values.items()]


def changed_options(config: Row) -> dict[str, Any]:
    """Options other than the default, in the order of their groups; model, data and files are said elsewhere or not at all.

    >>> changed_options({"iters": 5, "batch_size": 4, "adapter_path": "mine"})
    {'iters': 5}
    """
    method = method_of(config)
    groups = (*_OPTIONS, *([METHODS[method]] if method else []))
    defaults = {field.name: field.default for group in groups for field in attrs.fields(group)}
    defaults |= {name: config.get(name) for name in ("model", "data")}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    return {name: config[name] for name, value in listed.items() if name in config and config[name] != value}


def _results(metrics: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of a table: one line a metric, one column each for the first, best and last validation and the test."""
    columns = _columns(metrics)
    names = list(dict.fromkeys(n for row in columns.values() for n, v in row.items() if n != "step" and isinstance(v, int | float)))
    head = ("metric", *(f"{title} (step {row.get('step')})" for title, row in columns.items()))
    return head, [(name, *(_number(row.get(name)) for row in columns.values())) for name in names]


def _columns(metrics: Sequence[Row]) -> dict[str, Row]:
    of = {split: [row for row in metrics if row.get("split") == split] for split in ("train", "valid", "test")}
    if not (of["valid"] or of["test"]):
        kept = ("step", "loss", "tokens", "reward")
        return {"training": {name: of["train"][-1][name] for name in kept if name in of["train"][-1]}} if of["train"] else {}
    columns = {}
    if valid := of["valid"]:
        later = [row for row in valid if row.get("step")] or valid
        best = min(later, key=lambda row: inf if row.get("loss") is None else row["loss"])  # null: not a finite number
        columns = {"before": valid[0], "best": best, "last": valid[-1]}
    return columns | ({"test": of["test"][-1]} if of["test"] else {})


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A section with a Markdown table; nothing where there are no lines."""
    if not lines:
        return ""
    escaped = ([text.replace("|", "\\|") for text in line] for line in (head, ["---"] * len(head), *lines))
    return "\n".join((f"## {title}\n", *(f"| {' | '.join(line)} |" for line in escaped)))
