"""Which charts a page shows, with titles in words: those that matter for the method first, constant and equal ones not at all."""

import re
from collections.abc import Callable, Mapping, Sequence

from .columns import TABLE_COLUMNS
from .history import SPLITS, Points, compact
from .svg import Line, chart

Curves = Mapping[str, Mapping[str, Points]]
"""{metric: {split: points}}."""

MAIN = 4
"""Charts at the top of a page."""

_ASIDE = ("learning_rate", "tokens_per_second")
"""Metrics of a table that say how a run goes, not what it learns."""

_NEXT = ("mean_token_accuracy", "perplexity", "entropy", "learning_rate", "grad_norm")
_WORDS = {
    "loss": "Loss",
    "nll": "Negative log-likelihood, nats per token",
    "perplexity": "Perplexity",
    "mean_token_accuracy": "Tokens predicted right, share",
    "entropy": "Entropy, nats per token",
    "grad_norm": "Norm of the gradient",
    "learning_rate": "Learning rate",
    "tokens": "Tokens read",
    "tokens_per_second": "Speed, tokens/s",
    "training_tokens_per_second": "Speed of training, tokens/s",
    "rollout_tokens_per_second": "Speed of sampling, tokens/s",
    "peak_memory_gb": "Peak memory, GB",
    "reward": "Reward, mean",
    "reward_std": "Reward, standard deviation",
    "group_reward_std": "Reward, deviation within a group",
    "frac_reward_zero_std": "Groups without signal, share",
    "kl": "KL to the reference, nats",
    "divergence": "Divergence from the teacher, nats per token",
    "rewards/accuracies": "Pairs ranked right, share",
    "rewards/margins": "Margin, implicit reward",
    "rewards/chosen": "Chosen, implicit reward",
    "rewards/rejected": "Rejected, implicit reward",
    "logps/chosen": "Chosen, log-probability, nats",
    "logps/rejected": "Rejected, log-probability, nats",
    "completions/mean_length": "Length of completions, tokens",
    "completions/min_length": "Shortest completion, tokens",
    "completions/max_length": "Longest completion, tokens",
    "completions/clipped_ratio": "Completions cut at the limit, share",
}
SECTIONS: dict[str, Callable[[str], bool]] = {
    "Loss and rewards": lambda n: n in ("loss", "reward", "perplexity") or (n.startswith("rewards/") and not n.endswith("/std")),
    "Completions": lambda n: n.startswith(("completions/", "frac_")) or n.endswith(("reward_std", "/std")) or n == "entropy",
    "Optimizer": lambda n: n in ("grad_norm", "learning_rate"),
    "Speed and memory": lambda n: "seconds" in n or "tokens" in n or n == "peak_memory_gb" or "per_second" in n,
    "Everything else": lambda _: True,
}
"""Kinds of metrics, in the order of the page."""


def in_words(metric: str) -> str:
    """The title of a metric's chart.

    >>> in_words("kl"), in_words("rewards/accuracy/mean"), in_words("odds_ratio")
    ('KL to the reference, nats', 'Reward accuracy, mean', 'odds ratio')
    """
    if metric in _WORDS:
        return _WORDS[metric]
    if own := re.fullmatch(r"rewards/(.+)/(mean|std)", metric):
        return f"Reward {own[1]}, {'mean' if own[2] == 'mean' else 'standard deviation'}"
    return metric.replace("_", " ").replace("/", ", ")


def told_apart(curves: Curves) -> tuple[dict[str, Mapping[str, Points]], dict[str, str]]:
    """The curves that say something of their own, and what there is to say of the others.

    >>> flat, falling = {"train": [(1, 2.0), (2, 2.0)]}, {"train": [(1, 2.0), (2, 1.0)]}
    >>> told_apart({"loss": falling, "nll": falling, "clipped": flat})[1]
    {'nll': 'equals loss', 'clipped': '2 throughout'}
    """
    kept: dict[str, Mapping[str, Points]] = {}
    others: dict[str, str] = {}
    for name, splits in curves.items():
        values = [value for points in splits.values() for _, value in points]
        twin = next((other for other, found in kept.items() if found == splits), None)
        if twin is not None:
            others[name] = f"equals {twin}"
        elif len(values) > 1 and min(values) == max(values):
            others[name] = f"{compact(values[0])} throughout"
        else:
            kept[name] = splits
    return kept, others


def main_metrics(columns: Sequence[str], curves: Curves) -> list[str]:
    """The metrics of the charts at the top: those of the method's table, then general ones."""
    of_table = [metric for column in columns if (metric := TABLE_COLUMNS[column].metric) not in _ASIDE]
    return [name for name in dict.fromkeys((*of_table, *_NEXT)) if name in curves][:MAIN]


def metric_chart(name: str, splits: Mapping[str, Points]) -> str:
    """The chart of a metric: training as a line, validation and test as points, unless only training has a course.

    Validation samples one completion a prompt, so all of its groups are without signal, always.
    """
    lines = [Line(split, splits[split], i, dotted=split != "train") for i, split in enumerate(SPLITS) if split in splits]
    moving = [line for line in lines if not line.dotted or len(line.points) < 2 or len({value for _, value in line.points}) > 1]
    return chart(in_words(name), moving or lines, name)
