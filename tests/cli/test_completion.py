"""The shell completes names that the code knows, without loading MLX; every command's help ends with an example that parses."""

import os
import re
import subprocess
import sys

import pytest
from mlxlora_cli import app
from mlxlora_cli.completion import NAMES, completer
from mlxlora_cli.help_text import offered
from typer.main import get_command
from typer.testing import CliRunner

from mlxlora.config import options as config
from mlxlora.methods import METHODS
from mlxlora.objectives.grpo import grpo
from mlxlora.objectives.preference import dpo
from mlxlora.rollouts.reward_functions import BUILT_IN
from tests.support.loss_types import loss_types
from tests.support.warm import python

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("group", "names"),
    [("DPOOptions", loss_types(dpo)), ("OnlineDPOOptions", loss_types(dpo)), ("GRPOOptions", loss_types(grpo))],
)
def test_names_are_those_of_the_code(group, names):
    assert list(NAMES[group, "loss_type"]) == names
    assert completer(group, "loss_type")("") == names
    assert hasattr(getattr(config, group)(), "loss_type")


def test_the_last_name_is_completed():
    complete = completer("DPOOptions", "loss_type")
    assert complete("0.8*sigmoid+0.2*bco") == ["0.8*sigmoid+0.2*bco_pair"]
    assert completer("RewardOptions", "rewards")("accuracy,tag_") == ["accuracy,tag_count", "accuracy,tag_count_reward"]
    assert set(completer("RewardOptions", "rewards")("")) == BUILT_IN.keys()
    assert completer("ModelOptions", "model") is None


def completed(shell, words, **variables):
    code = (
        "import sys\nfrom mlxlora_cli import main\ntry: main()\n"
        "finally: sys.stderr.write(str({'mlx', 'transformers', 'numpy'} & {name.split('.')[0] for name in sys.modules}))"
    )
    environment = os.environ | variables | {"_MLXLORA_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": " ".join(words)}
    environment |= {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == "set()", done.stderr
    return set(re.findall(r"[\w-]+", done.stdout))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_are_answered(shell):
    action = {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    assert {"dr_grpo", "dapo"} <= completed(shell, ["mlxlora", "grpo", "--loss-type", "d"], **action)
    assert {"adam", "adamw", "adafactor"} <= completed(shell, ["mlxlora", "sft", "--optimizer", "a"], **action)
    assert "online-dpo" in completed(shell, ["mlxlora", "on"], **action)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # not the shell of the tests, which may have none
    done = subprocess.run([sys.executable, "-m", "mlxlora_cli", "--show-completion", shell], capture_output=True, text=True)
    assert done.returncode == 0 and "_MLXLORA_COMPLETE" in done.stdout


@pytest.mark.parametrize("width", ["80", "120"])
@pytest.mark.parametrize("name", COMMANDS)
def test_help_cuts_no_word(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", width)
    shown = CliRunner().invoke(app, [name, "--help-all"]).output
    assert "…" not in shown and all(len(line.rstrip()) <= int(width) for line in shown.splitlines() if "Example: " not in line)
    for param in COMMANDS[name].params:
        assert param.hidden or not param.opts[0].startswith("--") or f"{param.opts[0]} " in shown


@pytest.mark.parametrize("name", METHODS)
def test_short_help_is_two_screens_of_the_most_used_options(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, [name, "--help"]).output
    flags = re.findall(r"^ (--[\w-]+)", shown, re.MULTILINE)
    assert len(flags) == 25 and flags[:2] == ["--model", "--data"] and "--help-all shows all" in shown
    lines = sum(-(-len(line.rstrip()) // 80) or 1 for line in shown.splitlines())
    assert lines <= 48, f"{lines} lines"
    for word in {choice for param in COMMANDS[name].params if param.opts[0] in flags for choice in offered(param)}:
        assert re.search(rf"(?<!\w){word}(?!\w)", shown), f"{word} is cut"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example(name):
    command = COMMANDS[name]
    example = command.epilog.removeprefix("Example: mlxlora ")
    assert example.split()[0] == name
    takes = next((COMMANDS[word] for word in example.split()[1:2] if word in COMMANDS), command)  # `sweep sft` has those of sft
    flags = {flag for param in takes.params for flag in param.opts}
    assert {word for word in example.split() if word.startswith("--")} <= flags
    widths = os.environ | {"COLUMNS": "200", "TERM": "dumb"}
    shown = subprocess.run([python(), "-m", "mlxlora_cli", name, "--help"], capture_output=True, text=True, env=widths).stdout
    assert shown.strip().endswith(command.epilog)
