"""Completes names in lists (`a,b`) and sums (`0.8*a+b`) for the shell; fixed choices are completed by Typer."""

import re
from collections.abc import Callable

_DPO = (
    *("sigmoid", "hinge", "ipo", "dpop", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    *("aot", "aot_unpaired", "discopop", "sigmoid_norm", "nll"),
)
NAMES = {
    ("DPOOptions", "loss_type"): _DPO,
    ("OnlineDPOOptions", "loss_type"): _DPO,
    ("GRPOOptions", "loss_type"): ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "luspo", "sapo", "vespo", "reinforce"),
    ("Output", "report_to"): ("wandb", "swanlab", "trackio", "tensorboard"),
}
"""By group and option. A copy, because the modules that define the losses import MLX; a test compares them."""

_LAST = re.compile(r"[^,+*]*$")


def completer(group: str, option: str) -> Callable[[str], list[str]] | None:
    """A function that completes the last name; None: the option has no names, and the shell completes files."""
    if (group, option) == ("RewardOptions", "rewards"):
        return _rewards
    return _of(NAMES[group, option]) if (group, option) in NAMES else None


def _of(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    def complete(incomplete: str) -> list[str]:
        start = _LAST.search(incomplete)
        assert start is not None
        return [incomplete[: start.start()] + name for name in names if name.startswith(start.group())]

    return complete


def _rewards(incomplete: str) -> list[str]:
    from mlxlora.rollouts.reward_functions import BUILT_IN

    return _of(tuple(BUILT_IN))(incomplete)
