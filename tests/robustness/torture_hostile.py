"""Faults of torture.py that somebody planted: files of the user in the way of a run, and links that lead out of its folder."""

import random
from pathlib import Path

from tests.robustness.torture_faults import Lab, Trial, any_mode, check, ended, refused, same, wait_for

_NAMES = (
    "config.yaml",
    "report.html",
    "samples.jsonl",
    "metrics.jsonl",
    "metrics.png",
    "adapters.safetensors",
    "adapter_config.json",
)


def files_in_the_way(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A run neither replaces nor removes a file that no run wrote; without it, it trains as ever."""
    mode, name = any_mode(rng), rng.choice(_NAMES)
    folder.mkdir()
    (folder / name).write_text("mine")
    refused(ended(lab.start(mode, folder, None, *rng.choice(((), ("--overwrite",))))), str(folder), name, codes=(2,))
    check([path.name for path in folder.iterdir()] == [name], f"left {sorted(folder.iterdir())}")
    check((folder / name).read_text() == "mine", f"{name} was changed")
    (folder / name).unlink()
    outcome = ended(lab.start(mode, folder))
    check(outcome == (0, ""), f"without it: {outcome}")
    same(folder, lab.whole(mode)[0])


def links_planted(lab: Lab, folder: Path, rng: random.Random) -> None:
    """A killed run finds links in its folder: names of its own are refused, temporary ones removed; nothing outside changes."""
    mode = any_mode(rng)
    outside = folder.with_name(f"{folder.name}-outside")
    outside.mkdir()
    (outside / "mine").write_text("mine")
    process = lab.start(mode, folder)
    wait_for(folder, rng.randrange(3, 12), process)
    process.kill()
    ended(process)
    temporary = rng.choice(
        (".metrics.jsonl.1.tmp", ".adapters.safetensors.1.tmp", "checkpoints/.0000012.tmp", "checkpoints/.0000012.before.tmp")
    )
    (folder / temporary).parent.mkdir(exist_ok=True)
    (folder / temporary).unlink(missing_ok=True)
    (folder / temporary).symlink_to(rng.choice((outside, outside / "mine")))
    name = rng.choice(("report.html", "metrics.png", "tensorboard"))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside if name == "tensorboard" else outside / "mine")
    refused(ended(lab.start(mode, folder, None, "--resume")), str(folder), f"{name} is a link", codes=(2,))
    (folder / name).unlink()
    outcome = ended(lab.start(mode, folder, None, "--resume"))
    check(outcome == (0, ""), f"without the link: {outcome}")
    same(folder, lab.whole(mode)[0])
    check([path.name for path in outside.iterdir()] == ["mine"] and (outside / "mine").read_text() == "mine", "changed outside")


PLANTED: dict[str, tuple[Trial, int]] = {
    "files of the user in the way": (files_in_the_way, 10),
    "planted links": (links_planted, 10),
}
