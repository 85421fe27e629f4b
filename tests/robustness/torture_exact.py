"""Faults of torture.py that end a run with a word, or that ask it to go on with other things than it began with."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora import starter
from tests.robustness.torture_faults import REWARDED, Lab, Trial, any_mode, check, ended, refused, same, wait_for

STEPS = 12
SIGNALS = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]


def signalled(lab: Lab, folder: Path, rng: random.Random) -> None:
    """SIGTERM or SIGHUP at any step saves the step.

    After the last step it is in a checkpoint, and the signal has its usual effect: it ends the process. A command that ends before
    the signal comes has exit code 0.
    """
    mode = any_mode(rng)
    process = lab.start(mode, folder)
    wait_for(folder, rng.randrange(1, 12), process)
    number = rng.choice(SIGNALS)
    process.send_signal(number)
    code, err = ended(process)
    check(code in (0, 130, -number) and not err, f"exit code {code}: {err[-300:]}")
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = max(json.loads(row)["step"] for row in rows)
    newest = max((int(path.name) for path in (folder / "checkpoints").glob("*")), default=0)
    check(newest == last if code == 130 else newest == STEPS, f"checkpoint {newest} after step {last}: exit code {code}")
    lab.resumes(mode, folder)


def reward_fails(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A reward of a file leaves, ends its process, or never returns and holds its interpreter."""
    act = rng.choice(("raises", "ends", "holds"))
    fault = {"reward": (act, rng.randrange(2, 12))}
    told = {"raises": "no network", "ends": "exit code 3", "holds": "took longer than --reward-timeout"}[act]
    refused(ended(lab.start(REWARDED, folder, fault)), told)
    lab.resumes(REWARDED, folder)


def validation_fails(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A validation ends the run, once or twice; it is made when the run goes on."""
    mode, more = "sft --keep-best", ()
    for _ in range(rng.choice((1, 2))):
        refused(ended(lab.start(mode, folder, {"validation": rng.choice((2, 3)) if not more else 1}, *more)), "no memory")
        more = ("--resume",)
    lab.resumes(mode, folder)


def _whole(lab: Lab, mode: str, own: tuple[Any, ...]) -> Path:
    name = f"{mode}, own files"
    if name not in lab.wholes:
        folder = lab.place()
        check(ended(lab.start(mode, folder, None, *own)) == (0, ""), "uninterrupted")
        lab.wholes[name] = (folder, 0.0, 0)
    return lab.wholes[name][0]


def begins_otherwise(lab: Lab, folder: Path, rng: random.Random) -> None:
    """Rows, base weights or tokenizer are others when a killed run goes on; it goes on when they are as before."""
    folder.mkdir()
    data, model = (
        shutil.copytree(starter.data_path("sft"), folder / "data"),
        shutil.copytree(starter.model_path(), folder / "model"),
    )
    own = ("--data", data, "--model", model, "--learning-rate", 1e-3)
    process = lab.start("sft", folder / "run", None, *own)
    wait_for(folder / "run", rng.randrange(4, 12), process)
    process.kill()
    ended(process)
    what = rng.choice(("train rows", "base weights", "tokenizer"))
    file = {"train rows": data / "train.jsonl", "base weights": model / "model.safetensors", "tokenizer": model / "tokenizer.json"}[
        what
    ]
    before = file.read_bytes()
    if what == "base weights":
        weights: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        mx.save_safetensors(str(file), {name: array * 1.01 for name, array in weights.items()}, {"format": "mlx"})
    elif what == "tokenizer":
        rules = json.loads(before)
        rules["model"]["merges"] = rules["model"]["merges"][:-1]
        file.write_text(json.dumps(rules), encoding="utf-8")
    else:
        file.write_bytes(before.replace(b"add", b"ADD"))
    refused(ended(lab.start("sft", folder / "run", None, *own, "--resume")), what, "--allow-changed", codes=(2,))
    file.write_bytes(before)
    outcome = ended(lab.start("sft", folder / "run", None, *own, "--resume"))
    check(outcome == (0, ""), f"as before: {outcome}")
    same(folder / "run", _whole(lab, "sft", own))


def other_checkpoint(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A copy of a checkpoint under another name stays; a checkpoint of another run is refused."""
    mode = any_mode(rng)
    process = lab.start(mode, folder)
    wait_for(folder, rng.randrange(4, 12), process)
    process.kill()
    ended(process)
    newest = max(path for path in (folder / "checkpoints").iterdir() if path.name.isdigit())
    copy = shutil.copytree(newest, folder / "checkpoints" / f"{int(newest.name) + 1:07d}-good")
    files = {path: path.read_bytes() for path in copy.iterdir()}
    foreign = folder / "checkpoints" / "0000099"
    shutil.copytree(lab.whole("orpo" if mode != "orpo" else "sft")[0] / "checkpoints" / "0000012", foreign)
    refused(ended(lab.start(mode, folder, None, "--resume")), "is a checkpoint of another run", codes=(2,))
    shutil.rmtree(foreign)
    outcome = ended(lab.start(mode, folder, None, "--resume"))
    check(outcome == (0, ""), f"without it: {outcome}")
    same(folder, lab.whole(mode)[0])
    check({path: path.read_bytes() for path in copy.iterdir()} == files, "the copy was changed")


EXACT: dict[str, tuple[Trial, int]] = {
    "SIGTERM or SIGHUP": (signalled, 10),
    "a reward that leaves, ends or holds its process": (reward_fails, 10),
    "a validation that fails": (validation_fails, 10),
    "other rows, base weights or tokenizer on --resume": (begins_otherwise, 10),
    "a copied checkpoint, one of another run": (other_checkpoint, 10),
}
