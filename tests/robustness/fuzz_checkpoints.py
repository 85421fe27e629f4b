"""Checkpoints for fuzz.py: a state that no run wrote is refused, and what is accepted restores everything that it says."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import orjson
from hypothesis import strategies as st

from tests.robustness.fuzz_mutations import JSON, Target, mutated_bytes, mutated_json, mutated_value

NOW = {"options": {"method": "sft", "rank": 1}, "digests": {"train rows": "a", "base weights": "b", "tokenizer": "c"}}
FIELDS = ("step", "tokens", "window", "best", "waited", "skipped", "stop", "rounding", "owed", "origin")


@cache
def parts() -> tuple[Any, Any]:
    """The model and the options of the runs."""
    from mlxlora.adapters.prepare import prepare
    from mlxlora.config.options import AdapterOptions
    from tests.support.tiny import dense

    options = AdapterOptions(num_layers=1, rank=1, lora_keys=("self_attn.k_proj",))
    return prepare(dense(), options), options


@cache
def state() -> dict[str, Any]:
    """What a run writes in the middle of its third step's hooks, without the digest of the state itself."""
    from mlxlora.data.pooled import Pooled
    from mlxlora.training.progress import Progress, Window, state_of

    window = Window({"loss": Pooled.mean(0.1), "kl": Pooled.mean(float("nan")), "std": Pooled.of([1, 4], "std")}, steps=1)
    rounding = _rounding()
    rounding.batches.restore({"(2, 0)": [(32, 8, 0), (64, 16, 0)]})
    rounding.divider.held, rounding.divider.cost, rounding.divider.largest = 4096, 1.5, 128
    progress = Progress(3, 100, window, 2.5, 1, 0, "", rounding.after([]), ["validation", "checkpoint"])
    return orjson.loads(orjson.dumps({**state_of(progress), "origin": NOW}))  # without NaN


def _rounding() -> Any:
    from mlxlora.data.shape_buckets import Signatures
    from mlxlora.training.micro_batch import BatchDivider
    from mlxlora.training.rounding import RunRounding

    return RunRounding(Signatures(), Signatures(), BatchDivider(1 << 30, 2.0))


def checkpoint(folder: Path) -> Path:
    """A checkpoint beside the folder, whose weights are written once."""
    import mlx.optimizers as optim

    from mlxlora.training.checkpoint import initial, save_checkpoint
    from mlxlora.training.progress import Progress

    model, options = parts()
    path = folder.parent / "run" / "checkpoints" / "0000003"
    if not path.exists():
        optimizer = optim.SGD(1e-3)
        initial(model, optimizer)
        save_checkpoint(folder.parent / "run", model, optimizer, Progress(step=3), options)
    return path


def make_checkpoints(rng: random.Random) -> tuple[bytes, bool]:
    """(the state without digests, whether it may have changed)."""
    if rng.random() < 0.3:
        return mutated_json(rng, state()), rng.random() < 0.5
    changed = {**state(), (name := rng.choice(FIELDS)): mutated_value(rng, state()[name], 0.3)}
    text = json.dumps(changed).encode()
    return (mutated_bytes(rng, text) if rng.random() < 0.1 else text), rng.random() < 0.5


def call_checkpoints(folder: Path, case: tuple[bytes, bool]) -> None:
    """Resumes: the state is read, compared with the run, and decides the next division."""
    import mlx.optimizers as optim

    from mlxlora.errors import InputError
    from mlxlora.training.checkpoint import load_checkpoint, newest, read_origin
    from mlxlora.training.origin import check_origin, origin_of_state
    from mlxlora.training.progress import state_of

    text, allowed = case
    path = checkpoint(folder)
    whole = json.loads(_saved(path))
    del whole["sha256"]["state.json"]  # as an early version wrote it: else no change would be read
    digests = b', "sha256": ' + json.dumps(whole["sha256"]).encode()
    (path / "state.json").write_bytes(text.rstrip()[:-1] + digests + b"}")
    found, problems = newest(path.parents[1])
    if found is None:
        raise InputError("; ".join(problems))
    check_origin(path, read_origin(path), origin_of_state(NOW), allowed=allowed)
    progress = load_checkpoint(path, parts()[0], optim.SGD(1e-3))
    rounding = _rounding()
    rounding.restore(progress.rounding)
    progress.rounding = rounding.after([])
    json.dumps(state_of(progress))
    for name in progress.owed:
        if name in ("validation", "checkpoint"):
            progress.owed = [other for other in progress.owed if other != name]
    if progress.window:
        progress.window.add(progress.window.metrics)
        if {"loss", "grad_norm"} <= progress.window.metrics.keys():
            progress.window.report()


@cache
def _saved(path: Path) -> bytes:
    return (path / "state.json").read_bytes()


def checkpoints_target() -> Target:
    changed = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=2)
    texts = changed.map(lambda more: json.dumps({**state(), **more}).encode(errors="surrogatepass"))
    return Target(make_checkpoints, st.tuples(texts, st.booleans()), call_checkpoints)
