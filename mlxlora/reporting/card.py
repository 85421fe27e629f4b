"""The model card of a run: README.md of an adapter folder, with the front matter that the hub reads."""

import re
import shlex
from collections.abc import Mapping, Sequence
from math import inf, isfinite
from pathlib import Path, PureWindowsPath
from typing import Any

import attrs
from attrs import field, frozen

from ..config.fields import PATHS
from ..config.options import AdapterOptions, DataOptions, ModelOptions, Output, PairData, PromptData, Training
from ..errors import printable
from ..utils.device import package_version
from ..utils.files import atomic_file
from ..utils.paths import checked_exists
from .columns import GENERAL
from .history import Record, method_of, read_record
from .reporter import Reporter, Values, numbers
from .text import duration, shorten

CARD = "README.md"
_MARK = "<!-- Written by mlxlora after every run; remove this line to keep a text of your own. -->"
_EVALUATED = ("loss", "perplexity", "accuracy", "reward", "rewards/accuracies")  # the others describe the run, not the model
_HUB = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r".*/models--(.+?)--([^/]+)/snapshots/[^/]+/?")


@frozen
class MethodInfo:
    """What reports say of the method of a run.

    Attributes:
        title: follows "trained by".
        groups: its groups of options, which have the defaults.
        columns: of the table while it trains, names of `columns.TABLE_COLUMNS`.
        evaluated: whether `mlxlora eval` has its loss.
    """

    title: str = "a custom objective"
    groups: Sequence[type] = (ModelOptions, Training, AdapterOptions, DataOptions, PairData, PromptData)
    columns: Sequence[str] = GENERAL
    evaluated: bool = False


CUSTOM = MethodInfo()
"""An objective given in Python."""


class Card(Reporter):
    """Writes the card into the folder of a run when it ends or is interrupted.

    Args:
        directory: of the run.
        rows: how many each split has.
        method: of the run.
    """

    def __init__(self, directory: Path, rows: Mapping[str, int], method: MethodInfo = CUSTOM) -> None:
        self._directory, self._rows, self._method = directory, rows, method
        self._facts: Values = {}
        self._answers: Sequence[Values] = ()

    def overview(self, facts: Values) -> None:
        self._facts = facts

    def answers(self, rows: Sequence[Values]) -> None:
        self._answers = rows

    def finish(self, summary: Values) -> None:
        """Reads the files of the run, so that the card of a resumed run covers all of it."""
        seconds = summary.get("seconds")
        told = {"trained": self._facts.get("trained"), "time": None if seconds is None else duration(seconds)}
        more = CardMore(summary.get("stopped", ""), {name: text for name, text in told.items() if text}, self._answers)
        write_card(self._directory, card(read_record(self._directory), self._method, self._rows, more))


@frozen
class CardMore:
    """What a card says besides the files of the run.

    Attributes:
        stopped: where the run stopped early, "after step 3".
        facts: what was trained, and the time it took.
        answers: prompts with the model's answers before and after training.
    """

    stopped: str = ""
    facts: Values = field(factory=dict)
    answers: Sequence[Values] = ()


_FILES = CardMore()


def write_card(directory: Path, text: str) -> None:
    """Writes a card; keeps one without the line that mlxlora writes at its end, because a person has changed it."""
    file = directory / CARD
    if file.exists() and _MARK not in file.read_text(encoding="utf-8", errors="replace"):
        return
    with atomic_file(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


def card(record: Record, info: MethodInfo = CUSTOM, rows: Mapping[str, int] | None = None, more: CardMore = _FILES) -> str:
    """The text of the card of a run; absolute paths in its options are shortened to their last part.

    Args:
        record: the files of the run.
        info: of its method.
        rows: how many rows each split has.
        more: what the card says besides.
    """
    config, metrics = portable(record.config), record.metrics
    name, method, kind = config.get("model"), method_of(config), config.get("train_type", "lora")
    what = "weights" if kind == "full" else f"{'DoRA' if kind == 'dora' else 'LoRA'} adapters"
    title = f"{what[0].upper()}{what[1:]} for {name or 'a model'}"
    trained = f"trained with mlxlora {package_version('mlxlora')} by {info.title}"
    head = CardHead(["mlxlora", kind, *([method] if method else [])], kind != "full", title)
    parts = [
        front_matter(name, head, evaluated(config, metrics)),
        f"# {markdown(title)}",
        f"{what[0].upper()}{what[1:]}, {trained} on {_data(config, rows or {})}.{_base(config)}"
        + "".join(f" {what.capitalize()}: {markdown(told)}." for what, told in more.facts.items())
        + (f" The run was stopped {more.stopped}." if more.stopped else ""),
        _usage(name),
        _table("Options that differ from the defaults", ("option", "value"), _code(changed_options(config, info))),
        _table("Metrics", *_results(metrics)),
        _table("Answers", *_samples(more.answers)),
        _MARK,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def fused_card(base: str, config: Values) -> str:
    """The card of a model with adapters fused into its weights; `config` is that of the fused model."""
    name, quantized = portable(base), config.get("quantization")
    how = f"quantized to {quantized.get('bits')} bits" if quantized else "not quantized"
    lines = (
        front_matter(name, CardHead(["mlxlora"], adapter=False, title=f"{name}, fine-tuned")),
        f"# {markdown(name)}, fine-tuned",
        f"{markdown(name)} with adapters fused into its weights by mlxlora {package_version('mlxlora')}; {how}.",
        '```bash\nmlx_lm.generate --model . --prompt "Hello"\n```',
    )
    return "\n\n".join(lines) + "\n"


@frozen
class CardHead:
    """What the hub shows above a card.

    Attributes:
        tags: besides the library.
        adapter: whether the folder has adapters of a base; else it has a whole model.
        title: of the model, beside its results.
        library: that loads the folder.
    """

    tags: Sequence[str]
    adapter: bool
    title: str
    library: str = "mlx"


@frozen
class Evaluated:
    """Metrics of a split, for the hub: the name of the data, the split, and numbers by name."""

    data: str
    split: str
    metrics: Mapping[str, float]


def front_matter(base: str | None, head: CardHead, results: Evaluated | None = None) -> str:
    """The YAML that the hub reads (https://huggingface.co/docs/hub/model-cards); names the base only if it is on the hub.

    >>> print(front_matter("org/base", CardHead(["lora"], adapter=True, title="LoRA adapters")))
    ---
    base_model: org/base
    library_name: mlx
    pipeline_tag: text-generation
    tags:
    - mlx
    - lora
    base_model_relation: adapter
    ---
    """
    from huggingface_hub import EvalResult, ModelCardData

    task = "text-generation"
    fields: dict[str, Any] = {}
    if base and is_hub_name(base):
        fields = {"base_model": base, "base_model_relation": "adapter" if head.adapter else "finetune"}
    if results:
        data, split = results.data, results.split
        metrics = [
            EvalResult(task, dataset_type=data, dataset_name=data, dataset_split=split, metric_type=name, metric_value=value)
            for name, value in results.metrics.items()
        ]
        fields |= {"model_name": head.title, "eval_results": metrics}
    card_data = ModelCardData(library_name=head.library, pipeline_tag=task, tags=[head.library, *head.tags], **fields)
    return f"---\n{card_data.to_yaml()}\n---"


def evaluated(config: Values, metrics: Sequence[Values]) -> Evaluated | None:
    """The results for the hub: of the test split, or of the best validation; None if there are neither.

    >>> evaluated({"data": "rows.jsonl"}, [{"step": 9, "split": "test", "loss": 1.5, "tokens": 8}])
    Evaluated(data='rows.jsonl', split='test', metrics={'loss': 1.5})
    """
    columns = _columns(metrics)
    for split, column in (("test", "test"), ("valid", "best")):
        values = {name: value for name, value in numbers(columns.get(column, {})).items() if name in _EVALUATED and isfinite(value)}
        if values:
            return Evaluated(str(portable(config.get("data")) or "custom data"), split, values)
    return None


def is_hub_name(name: str) -> bool:
    """Whether a name is that of a model on the hub.

    >>> is_hub_name("mlx-community/Qwen3-0.6B-4bit"), is_hub_name("models/mine/best"), is_hub_name("./mine")
    (True, False, False)
    """
    return bool(_HUB.fullmatch(name)) and len(name) <= 200 and not name.startswith(".") and not checked_exists(name)


def portable(value: Any, name: str = "") -> Any:
    """Removes the paths of this machine from options by name, or from one path: keeps a path's last part, the name of a hub cache.

    Options that name files or folders lose relative folders too, which may hold a user's name; hub names stay. Other text stays
    unless it is a path of this machine.

    >>> portable({"model": "/home/me/models/tiny", "data": "me/work/rows.jsonl", "reward_file": "~/x/rewards.py", "iters": 3})
    {'model': 'tiny', 'data': 'rows.jsonl', 'reward_file': 'rewards.py', 'iters': 3}
    >>> portable({"model": "org/name", "data": "org/name", "system": "/a b/c"})
    {'model': 'org/name', 'data': 'org/name', 'system': '/a b/c'}
    >>> portable("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc")
    'org/name'
    """
    if isinstance(value, Mapping):
        return {key: portable(item, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, name) for item in value]
    if not isinstance(value, str) or not _is_path(value, name):
        return value
    cached = _CACHED.fullmatch(value)
    return f"{cached[1]}/{cached[2]}" if cached else PureWindowsPath(value).name or value


def _is_path(text: str, name: str) -> bool:
    """Whether a value of an option (without a name: any path) has folders that must not be told."""
    if name and name not in PATHS and not name.endswith(_PATH_ENDS):
        return text.startswith(("/", "~/")) and (bool(_FILE.search(text)) or checked_exists(text))
    if text.startswith(("/", "~", ".", "\\")) or "\\" in text:
        return text != "/"
    if not name and " " in text:
        return False
    return "/" in text and (text.count("/") > 1 or bool(_FILE.search(text)) or not is_hub_name(text)) and "://" not in text


_PATH_ENDS = ("_path", "_file", "_dir", "_folder")
_FILE = re.compile(r"\.(jsonl?|gz|csv|parquet|arrow|py(:\w+)?|safetensors|ya?ml|txt|gguf)$")


def markdown(text: Any) -> str:
    """Text from outside as plain text of Markdown: without HTML, links, code and line ends.

    >>> markdown("<img src=x>\\n# a|b `c`")
    '&lt;img src=x&gt; # a\\\\|b \\\\`c\\\\`'
    """
    escaped = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([|`\[\]*\\])", r"\\\1", printable(escaped))


def _data(config: Values, rows: Mapping[str, int]) -> str:
    counted = ", ".join(f"{count} {'rows' if name == 'train' else name}" for name, count in rows.items() if count)
    return f"{markdown(config.get('data') or 'custom data')}{f' ({counted})' if counted else ''}"


def _base(config: Values) -> str:
    """How the base was quantized as it was loaded."""
    form = config.get("quantize")
    if not form:
        return ""
    form = markdown(form)
    kind = form if form.startswith("mx") else f"{form} bits"
    return (
        f" The model was quantized to {kind} as it was loaded (`--quantize {form}`), so the adapters fit the output of "
        "`mlx_lm.convert -q` best; they also work on the original model."
    )


def _usage(name: str | None) -> str:
    if name and not is_hub_name(name):  # a folder here, which the adapters know
        return '```bash\nmlxlora generate --adapter-path . --prompt "Hello"\n```'
    told = shlex.quote(name) if name else "MODEL"  # people paste it
    return f'```bash\nmlx_lm.generate --model {told} --adapter-path . --prompt "Hello"\n```'


def _samples(answers: Sequence[Values]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    names = ("prompt", "before", "after")
    return names, [tuple(markdown(shorten(str(row.get(name, "")), 200)) for name in names) for row in answers]


def _code(values: Values) -> list[tuple[str, str]]:
    return [(_as_code(name), _as_code(value)) for name, value in values.items()]


def _as_code(value: Any) -> str:
    """A value in a code span, which must neither end early nor break the line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def changed_options(config: Values, info: MethodInfo = CUSTOM) -> dict[str, Any]:
    """Options that differ from the defaults, in the order of their groups; without the model, the data and output files.

    >>> changed_options({"iters": 5, "batch_size": 4, "adapter_path": "mine"})
    {'iters': 5}
    """
    defaults = {field.name: field.default for group in info.groups if group is not Output for field in attrs.fields(group)}
    defaults |= {name: config.get(name) for name in ("model", "data")}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()}
    return {name: config[name] for name, value in listed.items() if name in config and config[name] != value}


def _results(metrics: Sequence[Values]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and lines of a table: a line per metric, a column for the first, best and last validation and for the test."""
    columns = _columns(metrics)
    names = list(dict.fromkeys(name for row in columns.values() for name in numbers(row)))
    head = ("metric", *(f"{title} (step {row.get('step')})" for title, row in columns.items()))
    return head, [(markdown(name), *(_number(row.get(name)) for row in columns.values())) for name in names]


def _columns(metrics: Sequence[Values]) -> dict[str, Values]:
    of = {split: [row for row in metrics if row.get("split") == split] for split in ("train", "valid", "test")}
    if not (of["valid"] or of["test"]):
        kept = ("step", "loss", "tokens", "reward")
        return {"training": {name: of["train"][-1][name] for name in kept if name in of["train"][-1]}} if of["train"] else {}
    columns = {}
    if valid := of["valid"]:
        later = [row for row in valid if row.get("step")] or valid
        best = min(later, key=lambda row: inf if row.get("loss") is None else row["loss"])  # null: it was not finite
        columns = {"before": valid[0], "best": best, "last": valid[-1]}
    return columns | ({"test": of["test"][-1]} if of["test"] else {})


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A section with a Markdown table; empty if there are no lines."""
    if not lines:
        return ""
    escaped = ([_cell(text) for text in line] for line in (head, ["---"] * len(head), *lines))
    return "\n".join((f"## {title}\n", *(f"| {' | '.join(line)} |" for line in escaped)))


def _cell(text: str) -> str:
    """A cell of a table; a bar that is not escaped would end it."""
    return re.sub(r"(?<!\\)\|", r"\\|", text)
