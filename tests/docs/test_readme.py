"""The examples of the README and of docs/, executed in order, in a folder a page with the starter's `model` and some of
its rows.

A block is executed unless the line above it says `<!-- not run: why -->`; with `<!-- file: NAME -->` it is first saved under
that name, which is all that happens to JSON and YAML.
"""

import ast
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from mlxlora_cli import app
from typer.main import get_command

from mlxlora import starter
from mlxlora.methods import METHODS
from tests.support.warm import search_path

ROOT = Path(__file__).resolve().parents[2]
README = "README.md"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / README, *ROOT.glob("docs/*.md"))}
OTHERS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CHANGES.md", "SECURITY.md", "examples/README.md", "benchmarks/README.md")
}
FENCE = re.compile(
    r"^(?:<!-- (?P<key>[a-z ]+): (?P<value>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str
    notes: dict[str, str]

    @property
    def location(self):
        return f"{self.page}:{self.line}"


def blocks(page):
    text = PAGES[page]
    for match in FENCE.finditer(text):
        notes = {match["key"]: match["value"]} if match["key"] else {}
        yield Block(page, text.count("\n", 0, match.start("text")), match["language"], match["text"], notes)


BLOCKS = {page: list(blocks(page)) for page in PAGES}
FEW = 24
RUN = {"bash": ["bash", "-euo", "pipefail"], "python": ["python"]}


def execute(block, folder):
    name = block.notes.get("file", "block")
    (folder / name).write_text(block.text, encoding="utf-8")
    if block.language not in RUN:
        return
    environment = os.environ | {"PATH": search_path(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["env", *RUN[block.language], name], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{block.location}: exit code {done.returncode}\n{done.stdout}{done.stderr}"


def few(source, folder):
    """A folder of rows with the first of each file: a page shows what runs, not what is learned."""
    folder.mkdir()
    for file in source.iterdir():
        rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / file.name).write_text("".join(rows[:FEW]), encoding="utf-8")


def shows_what_runs(page):
    return any("not run" not in block.notes for block in BLOCKS[page])


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_marked(page):
    assert len(BLOCKS[page]) == len(re.findall(r"^```", PAGES[page], re.MULTILINE)) / 2
    for block in BLOCKS[page]:
        assert block.notes.keys() <= {"not run", "file"}, f"{block.location}: unknown mark {block.notes}"
        assert block.language in RUN or block.notes, f"{block.location}: a {block.language} block that nothing checks"


@pytest.mark.parametrize("page", list(filter(shows_what_runs, PAGES)))
def test_blocks_run(page, tmp_path):
    for name in ("model", "teacher"):
        shutil.copytree(starter.model_path(), tmp_path / name)
    for name, mode in (("data", "sft"), ("pairs", "dpo"), ("prompts", "grpo")):
        few(starter.data_path(mode), tmp_path / name)
    for block in BLOCKS[page]:
        if "not run" not in block.notes:
            execute(block, tmp_path)


def test_every_format_trains(tmp_path):
    rows = next(block for page in BLOCKS.values() for block in page if block.notes.get("file") == "rows.jsonl")
    execute(rows, tmp_path)
    count = len(rows.text.splitlines())
    options = f"--model {starter.model_path()} --data rows.jsonl --mask-prompt --num-layers 1 --batch-size {count} --iters 1"
    execute(Block(README, rows.line, "bash", f"mlxlora sft {options} --val-batches 0\n", {}), tmp_path)


def test_custom_recipe_is_short():
    recipes = [block for block in BLOCKS[README] if block.language == "python"]
    assert len(recipes) == 2 and all(len(recipe.text.splitlines()) <= 10 for recipe in recipes)


def test_the_readme_is_one_page():
    lines = PAGES[README].splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 99


@pytest.mark.parametrize("page", sorted(PAGES | OTHERS))
def test_prose_wraps_at_99_columns(page):
    """Tables, code and messages in quotes stay whole."""
    prose = FENCE.sub("", (PAGES | OTHERS)[page])
    long = [line for line in prose.splitlines() if len(line) > 99 and not line.lstrip().startswith(("|", "<!--", "- `", "!["))]
    assert not long


def flags(text):
    return set(re.findall(r"(?<![\w-])--[a-z-]+", text))


FLAGS = {
    name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    for name, command in get_command(app).commands.items()
}


FLAGS["sweep"] = set().union(*(FLAGS[name] for name in METHODS))  # those of the method that it runs
COMMANDS = "\n".join(block.text for page in PAGES for block in BLOCKS[page])


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^mlxlora ([\w-]+)", COMMANDS, re.MULTILINE))))
def test_flags_exist(command):
    """Of the command, wherever a page calls it."""
    used = {flag for line in re.findall(rf"^mlxlora {command} .*", COMMANDS, re.MULTILINE) for flag in flags(line)}
    assert used <= FLAGS[command]


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {f"docs/from-{peer}.md" for peer in ("mlx-lm", "mlx-lm-lora", "trl")}))
def test_named_flags_exist(page):
    """Those of the tables and the text belong to some command."""
    prose = FENCE.sub("", PAGES[page])
    named = {flag for span in re.findall(r"`([^`\n]+)`", prose) if "mlx_lm" not in span for flag in flags(span)}
    assert named and named <= set().union(*FLAGS.values(), {"--help", "--help-all", "--install-completion"})


LINKS = [(page, link) for page, text in (PAGES | OTHERS).items() for link in re.findall(r"\]\((?!https?:)([^)]+)", text)]


@pytest.mark.parametrize(("page", "link"), sorted(set(LINKS)))
def test_links_lead_somewhere(page, link):
    target, _, anchor = link.partition("#")
    file = (ROOT / page).parent / target if target else ROOT / page
    assert file.exists(), f"{page}: {link}"
    if anchor:
        titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, f"{page}: {link}"


ITEMS = re.findall(r"^- (`.+`) \\$", PAGES["docs/troubleshooting.md"], re.MULTILINE)
QUOTED = sorted({message for line in ITEMS for message in re.findall(r"`([^`]+)`", line)})


@cache
def constants():
    """Every text that the program may print, without what is filled in."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (*ROOT.glob("mlxlora/**/*.py"), *ROOT.glob("cli/*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_messages_are_found():
    assert len(ITEMS) > 25


@pytest.mark.parametrize("message", QUOTED)
def test_quoted_messages_exist(message):
    parts = [part for part in re.split("…|[:;] ", message) if len(part.strip()) > 3]
    missing = [part for part in parts if not any(part in text for text in constants())]
    assert parts and not missing, missing
