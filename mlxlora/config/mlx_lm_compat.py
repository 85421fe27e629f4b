"""Reads files and flags written for mlx-lm, mlx-lm-lora and TRL, called peers; `mlx_lm_keys` and `trl_keys` have their tables."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from attrs import frozen

from ..errors import plain
from .mlx_lm_keys import MLX_LM, MLX_LM_LORA, Key, Options, Peer
from .mlx_lm_keys import optimizer_options as optimizer_options
from .trl_keys import TRL, settled_alpha

PEERS = (TRL, MLX_LM_LORA, MLX_LM)
"""The libraries whose files and flags are understood, those with the clearest signs first."""


@frozen
class Commands:
    """The training commands.

    Attributes:
        names: of all of them.
        modes: mlx-lm-lora's names of training modes, and the command of each.
    """

    names: Collection[str] = ()
    modes: Mapping[str, str] = {}

    def named(self, value: Any) -> str | None:
        """The command that a method's name stands for; None: it stands for none.

        >>> commands = Commands(["grpo", "online-dpo"], {"xpo": "online-dpo"})
        >>> commands.named("grpo"), commands.named("xpo"), commands.named("dora")
        ('grpo', 'online-dpo', None)
        """
        name = self.modes.get(value, value) if isinstance(value, str) else None
        return name if name in self.names else None


_FILES_ONLY = ("config", "lora_parameters", "optimizer_config", "hf_dataset")

LISTING = "list_reward_functions"
"""mlx-lm-lora's flag that lists its reward functions."""


def peer_of(keys: Collection[str]) -> Peer | None:
    """The library that a file with these keys was written for; None: mlxlora.

    >>> peer_of(["train", "iters"]).name, peer_of(["train", "train_mode"]).name, peer_of(["iters"])
    ('mlx-lm', 'mlx-lm-lora', None)
    """
    return next((peer for peer in PEERS if not peer.signs.isdisjoint(keys)), None)


def find(name: str, peer: Peer | None = None) -> Key | None:
    """The key of a peer, or of any peer; None: there is no such key."""
    return next((each.keys[name] for each in ((peer,) if peer else PEERS) if name in each.keys), None)


def aliases(command: str | None) -> dict[str, str]:
    """The peers' names of options that have another name in mlxlora, for a command."""
    every = {name: key for peer in PEERS for name, key in peer.keys.items()}
    return {name: k.option for name, k in every.items() if k.option not in (None, name) and not k.convert and applies(k, command)}  # type: ignore[misc]


def applies(key: Key, command: str | None) -> bool:
    """Whether a key has its option in a command."""
    return not key.modes or command in key.modes


def flag(name: str) -> Key | None:
    """The key of a flag, given without dashes (`qat_bits` for `--qat-bits`); None: peers have no such flag."""
    return None if name in _FILES_ONLY else find(name)


def settle(values: Mapping[str, Any], peer: Peer | None, keys: Mapping[str, Any], whole: Mapping[str, Any]) -> Options:
    """The options of a peer's file or command line without those that have no effect in the peer.

    Args:
        values: the options.
        peer: the library; None: mlxlora.
        keys: the keys that set them.
        whole: all options of the run, from every layer.

    >>> dpo = {"loss_type": "hinge", "delta": 50.0}
    >>> settle(dpo, MLX_LM_LORA, {"dpo_cpo_loss_type": "hinge", "delta": 50.0}, dpo)
    {'loss_type': 'hinge'}
    >>> settle(dpo, MLX_LM_LORA, {"train_mode": "dpo", "loss_type": "hinge", "delta": 50.0}, dpo)  # our key, so our delta
    {'loss_type': 'hinge', 'delta': 50.0}
    """
    if peer is TRL:
        return settled_alpha(values, keys, int(whole.get("rank") or 8))
    if peer is not MLX_LM_LORA:
        return dict(values)
    works = {
        "delta": whole.get("loss_type") == "dpop" or ("loss_type" in keys and "dpo_cpo_loss_type" not in keys),
        "xpo_alpha": keys.get("train_mode") == "xpo" or "xpo_alpha" in keys,
        "epochs": "iters" not in whole,
        "qat": keys.get("qat_enable") or "qat" in keys,
    }
    bits = {"qat": plain(keys["qat_bits"])} if keys.get("qat_enable") and keys.get("qat_bits") else {}
    return {name: value for name, value in {**values, **bits}.items() if works.get(name, True)}


def check_mode(mode: Any, command: str, run: str, modes: Mapping[str, str]) -> None:
    """Checks that the training mode of a file is the command's.

    Args:
        mode: mlx-lm-lora's name of the mode.
        command: the command that reads the file.
        run: what follows the command in the message that names the right one.
        modes: as in `Commands`.

    Raises:
        ValueError: it is another command's, or unknown.
    """
    if not isinstance(mode, str) or mode not in modes:
        raise ValueError(f"train_mode {plain(mode)} is not offered; there are {', '.join(modes)}")
    if modes[mode] != command:
        raise ValueError(f"train_mode is {mode}; run `mlxlora {modes[mode]}{run}`")


def notes(peer: Peer, location: str, values: Mapping[str, Any], has: Collection[str]) -> Iterable[str]:
    """What to tell a user of a peer once: differences that matter for this run, and defaults that differ."""
    optimizer = values.get("optimizer", "adam")
    differences = {
        "Adam has bias correction": optimizer in ("adam", "adamw"),
        "gradients are clipped to norm 1 (max_grad_norm 0 = off)": "max_grad_norm" not in values,
        "iters are optimizer steps, not batches": values.get("grad_accumulation_steps", 1) != 1 and "iters" in values,
        "a loss is one mean over all trained tokens of a step": True,
        "plain-text rows are wrapped in the chat template only with use_chat_template": not values.get("use_chat_template"),
        "CPO adds the NLL of the chosen (alpha 0 = off)": "gamma" in has and "alpha" not in values,
        "dpop's penalty is inside the sigmoid, as published": values.get("loss_type") == "dpop",
    }
    told = "; ".join(text for text, holds in differences.items() if holds and not text.startswith(peer.alike or ("-",)))
    different = f" Different in mlxlora: {told}." if told else ""
    yield f"{location} is {peer.name}'s.{different} More in docs/from-{peer.name.lower()}.md"
    decays = optimizer in ("adamw", "muon")
    defaults = {name: value for name, value in peer.defaults.items() if name in has and (name != "weight_decay" or decays)}
    covered = {"iters"} if values.get("epochs") is not None else set()
    if missing := [f"{name} ({value})" for name, value in defaults.items() if name not in values and name not in covered]:
        yield f"not set, so they have mlxlora's defaults instead of {peer.name}'s: {', '.join(missing)}"
