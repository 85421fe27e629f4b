"""The README's examples, executed in order in one folder that holds the starter's `model` and `data`.

A block is executed unless the line above it says `<!-- not run: why -->`; with `<!-- file: NAME -->` it is first saved under
that name, which is all that happens to JSON and YAML.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from mlxlora_cli import app
from typer.main import get_command

from mlxlora import starter

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCE = re.compile(
    r"^(?:<!-- (?P<key>[a-z ]+): (?P<value>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    line: int
    language: str
    text: str
    notes: dict[str, str]


def blocks():
    for match in FENCE.finditer(README):
        notes = {match["key"]: match["value"]} if match["key"] else {}
        yield Block(README.count("\n", 0, match.start("text")), match["language"], match["text"], notes)


BLOCKS = list(blocks())
RUN = {"bash": ["bash", "-euo", "pipefail"], "python": [sys.executable]}


def execute(block, folder):
    name = block.notes.get("file", "block")
    (folder / name).write_text(block.text, encoding="utf-8")
    if block.language not in RUN:
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*RUN[block.language], name], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"README.md:{block.line}: exit code {done.returncode}\n{done.stdout}{done.stderr}"


def test_blocks_are_marked():
    assert len(BLOCKS) == len(re.findall(r"^```", README, re.MULTILINE)) / 2 >= 10
    for block in BLOCKS:
        assert block.notes.keys() <= {"not run", "file"}, f"README.md:{block.line}: unknown mark {block.notes}"
        assert block.language in RUN or block.notes, f"README.md:{block.line}: a {block.language} block that nothing checks"


def test_blocks_run(tmp_path):
    shutil.copytree(starter.model_path(), tmp_path / "model")
    for name, mode in (("data", "sft"), ("pairs", "dpo"), ("prompts", "grpo")):
        shutil.copytree(starter.data_path(mode), tmp_path / name)
    for block in BLOCKS:
        if "not run" not in block.notes:
            execute(block, tmp_path)


def test_every_format_trains(tmp_path):
    rows = next(block for block in BLOCKS if block.notes.get("file") == "rows.jsonl")
    execute(rows, tmp_path)
    count = len(rows.text.splitlines())
    options = f"--model {starter.model_path()} --data rows.jsonl --mask-prompt --num-layers 1 --batch-size {count} --iters 1"
    execute(Block(rows.line, "bash", f"mlxlora sft {options} --val-batches 0\n", {}), tmp_path)


def test_custom_recipe_is_short():
    recipe = next(block for block in BLOCKS if block.language == "python")
    assert len(recipe.text.splitlines()) <= 15


def flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z-]+", text))


FLAGS = {
    name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    for name, command in get_command(app).commands.items()
}


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^mlxlora ([\w-]+)", README, re.MULTILINE))))
def test_flags_exist(command):
    """Of the command, wherever the page calls it."""
    used = {flag for line in re.findall(rf"^mlxlora {command} .*", README, re.MULTILINE) for flag in flags(line)}
    assert used and used <= FLAGS[command]


def test_named_flags_exist():
    """Those of the tables and the text belong to some command."""
    prose = FENCE.sub("", README)
    named = {flag for span in re.findall(r"`([^`\n]+)`", prose) if "mlx_lm" not in span for flag in flags(span)}
    assert len(named) > 20 and named <= set().union(*FLAGS.values(), {"--help"})


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists(), target
