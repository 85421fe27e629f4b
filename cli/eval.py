"""`mlxlora eval`."""

from typing import Literal

from attrs import validators as v

from mlxlora.config.fields import group, option
from mlxlora.config.options import DataOptions, ModelOptions
from mlxlora.utils.output import echo

from .flags import flags


@group("Evaluation")
class EvalOptions:
    """Which rows are evaluated, and with which adapters."""

    adapter_path: str | None = option(None, "Folder of adapters; default: the model as it is.")
    split: Literal["valid", "test", "train"] = option("test", "Split to evaluate.")
    batch_size: int = option(4, "Rows in a batch.", v.ge(1))
    seed: int = option(0, "Seed of --valid-fraction; default: that of the adapters' run, if its rows are used.", v.ge(0))


_TEXTS = {
    "model": "Model folder or hub name; default: that of the adapters, and without --data and adapters the bundled starter.",
    "data": "Folder with train/valid/test.jsonl, a JSONL or JSON file, or a hub data set name; default: that of the adapters' run.",
    **dict.fromkeys(("shuffle", "packing")),
}


@flags(starter="sft", texts=_TEXTS)
def evaluate(model: ModelOptions, data: DataOptions, evaluation: EvalOptions) -> None:
    """Print loss (nats per trained token) and perplexity of a whole split."""
    from mlxlora.distributed.ranks import current_ranks
    from mlxlora.training.session import evaluate_split

    metrics = evaluate_split(
        model_options=model,
        data_options=data,
        adapter_path=evaluation.adapter_path,
        split=evaluation.split,
        batch_size=evaluation.batch_size,
        seed=evaluation.seed,
    )
    shown = {name: value for name, value in metrics.items() if name != "nll" or value != metrics["loss"]}
    for name, value in shown.items() if current_ranks().leads else ():
        echo(f"{name} {value:.6g}")
