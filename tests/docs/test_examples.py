"""The examples run as they are, here for a few steps: they say what they measured, and it is finite."""

import math
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.warm import python, search_path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
FALLS = {  # example: what even a few steps lower
    "sft_lora.py": "validation loss",
    "sft_full.sh": "test loss",
    "dpo.py": "preference loss",
    "orpo.sh": "nll_loss",
    "pretrain.sh": "loss",
    "qwen3_moe.sh": "loss",
    "custom_objective.py": "unlikelihood",
}
LEAVES = {  # example: files that it writes, besides adapters
    "cpo_translation.py": ("translator/model.safetensors", "cpo/adapters.safetensors"),
    "pretrain.sh": ("random/model.safetensors", "model/model.safetensors"),
    "qwen3_moe.sh": ("pretrained/config.json", "tuned/config.json", "orpo/adapters.safetensors"),
    "sft_full.sh": ("model/model.safetensors",),
}
EXAMPLES = sorted(
    path.name
    for path in (ROOT / "examples").iterdir()
    if path.suffix in (".py", ".sh") and path.stem not in ("common", "curve", "picture")
)
MEASURED = re.compile(r"^measured: (.+): (\S+) -> (\S+)$", re.MULTILINE)


def command(example: str, output: Path) -> list[str]:
    script = str(ROOT / "examples" / example)
    if script.endswith(".sh"):
        return ["bash", script, str(STEPS), str(output)]
    return [python(), script, "--iters", str(STEPS), "--output", str(output)]


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_runs(example, tmp_path):
    environment = os.environ | {"PATH": search_path(), "HF_HUB_OFFLINE": "1", "MLXLORA_CACHE": str(tmp_path / "cache")}
    output = tmp_path / "output"
    done = subprocess.run(command(example, output), cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {what: (float(before), float(after)) for what, before, after in MEASURED.findall(done.stdout)}
    assert found and all(math.isfinite(number) for pair in found.values() for number in pair), done.stdout
    assert next(output.rglob("adapters.safetensors"), None) and all((output / name).is_file() for name in LEAVES.get(example, ()))
    for what, (before, after) in found.items():
        if example in FALLS and what.startswith(FALLS[example]):
            assert after < before, f"{what}: {before} -> {after}"
            break
    else:
        assert example not in FALLS, f"{example} measured {', '.join(found)}"


def test_every_example_is_listed():
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"`{name}`" not in page] == []
