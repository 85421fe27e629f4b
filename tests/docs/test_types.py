"""Type checkers and editors know the public names, the options of methods and their defaults."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

import mlxlora as ml
from mlxlora.config.method_options import fields_of

INIT = Path(ml.__file__)

RIGHT = """
from pathlib import Path

import mlx.optimizers as optim

import mlxlora as ml
from mlxlora import InputError, Training, nll

results: ml.RunResult = ml.sft(model="m", data=[{"text": "a"}], iters=3, learning_rate=1e-4, lora_keys=("q_proj",))
steps: int = results["steps"]
answer: str = results.generate("Hi", max_tokens=9)
longer: ml.RunResult = results.resume(iters=9)
losses: dict[str, float] = results.evaluate([{"text": "b"}])
ml.sft(model=Path("m"), data={"train": [{"text": "a"}], "valid": []}, lora_keys=["q_proj"], adapter_path=Path("a"))
ml.sft(model=ml.load("m"), objective=lambda logps, batch: -logps, learning_rate=optim.cosine_decay(1e-3, 9))
ml.sft(model=ml.load("m")[0], tokenizer=ml.load("m")[1], objective=0.5 * nll(), optimizer=optim.AdamW(1e-3))
ml.grpo(model="m", rewards=[lambda completions, **_: [float(len(c)) for c in completions], "accuracy"])
ml.dpo(Training(iters=3), model="m", loss_type="ipo", beta=0.2)
ml.grpo(Training(iters=3), ml.Output(quiet=True), ml.RewardOptions(rewards=("accuracy",)))
objective: ml.Objective = ml.preference(ml.log_ratio, ml.hinge(beta=0.1)) + 0.2 * nll(of=ml.chosen) + 0.01 * ml.kl()
model, tokenizer = ml.load("m")
ml.run(model, tokenizer, objective, ml.pairs("pairs.jsonl"), Training(iters=3), adapter_path="adapters")
ml.run(model, tokenizer, ml.objectives.sft(), ml.rows("rows.jsonl", mask_prompt=True))
class Mine(ml.Reporter): ...
ml.sft(model=(model, tokenizer), adapter="fresh", callbacks=[lambda step, metrics: step < 9, Mine()])
ml.sft(model="m", callbacks=lambda step, metrics: step < 9)
ml.sft(model="m", chat_template=Path("t.jinja"), chat_template_args={"enable_thinking": False}, project_name="p")
history: list[dict] = results.history
reached: float = (results.best or {})["loss"]
folders: list[str] = [results.save(), results.fuse("fused"), results.adapter_path]
base = ml.detach(results.model)
frame = results.to_frame()
best: dict = ml.sweep(ml.sft, {"rank": [4, 8]}, model="m", data="d").best
assert ml.METHODS["kto"].title and issubclass(InputError, ValueError)
"""
WRONG = {
    'ml.Training(iters="many")': "reportArgumentType",
    "ml.Training(3)": "reportCallIssue",
    "ml.Training(iter=3)": "reportCallIssue",
    "ml.sft(itres=3)": "reportCallIssue",
    'ml.sft(iters="many")': "reportArgumentType",
    "ml.orpo(nll_on_promt=True)": "reportCallIssue",
    'ml.dpo("folder")': "reportArgumentType",
    "ml.sft(data=3)": "reportArgumentType",
    "ml.sft(model=3)": "reportArgumentType",
    "ml.sft(objective=3)": "reportArgumentType",
    "ml.sft(optimizer=3)": "reportArgumentType",
    'ml.sft(learning_rate="high")': "reportArgumentType",
    "ml.grpo(rewards=[3])": "reportArgumentType",
    'ml.sft(optimizer="adamm")': "reportArgumentType",
    "ml.not_there": "reportAttributeAccessIssue",
    "ml.nll() + 1": "reportOperatorIssue",
    "ml.sft().generate(3)": "reportArgumentType",
    'ml.sft(adapter="old")': "reportArgumentType",
}


ASSIGNED = {"_methods": "methods", "_sweep": "training.sweep"}
"""Modules whose values are public under other names."""


def checked(folder: Path, text: str) -> list[tuple[int, str, str]]:
    """pyright's errors: (line, rule, message)."""
    (folder / "user.py").write_text(text, encoding="utf-8")
    settings = {"include": ["user.py"], "extraPaths": [str(INIT.parents[1])], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert found["summary"]["filesAnalyzed"] == 1
    return [
        (error["range"]["start"]["line"] + 1, error.get("rule", ""), error["message"])
        for error in found["generalDiagnostics"]
        if error["severity"] == "error"
    ]


def test_right_calls_pass(tmp_path: Path):
    assert checked(tmp_path, RIGHT) == []


def test_wrong_calls_are_errors(tmp_path: Path):
    found = checked(tmp_path, "import mlxlora as ml\n" + "\n".join(WRONG))
    rules = {line: set() for line in range(2, len(WRONG) + 2)}
    for line, rule, _ in found:
        rules[line].add(rule)
    assert all(rule in rules[line] for line, rule in enumerate(WRONG.values(), start=2)), found


def test_both_lists_of_public_names_are_the_same():
    """The imports for type checkers, and the table for programs."""
    block = next(node for node in ast.parse(INIT.read_text(encoding="utf-8")).body if isinstance(node, ast.If))
    modules, names = set(), {}
    for node in block.body:
        if isinstance(node, ast.Assign):
            assert isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Attribute)
            assert isinstance(node.value.value, ast.Name)
            names[node.targets[0].id] = (ASSIGNED[node.value.value.id], node.value.attr)
            continue
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            if node.module is None or node.module == "objectives" or alias.asname in ASSIGNED:
                home = f"{node.module}.{alias.name}" if node.module and alias.asname not in ASSIGNED else alias.name
                modules.add((alias.asname, home))
            else:
                assert alias.asname == alias.name, "a name is exported if it is imported as itself"
                names[alias.name] = (node.module, alias.name)
    assert names == ml._HOME
    assert modules - {(name, home.rpartition(".")[2]) for name, home in ASSIGNED.items()} == set(ml._MODULES.items())


@pytest.mark.parametrize("name", ml._METHODS)
def test_signatures_show_every_option_with_its_default(name: str):
    method = getattr(ml, name)
    shown = inspect.signature(method).parameters
    fields = {field.name: field for kind in method.kinds.kinds() for field in attrs.fields(kind)}
    assert fields_of(*method.kinds.kinds()).keys() <= fields.keys()
    assert {key: (p.default, p.annotation) for key, p in shown.items()} == {f.name: (f.default, f.type) for f in fields.values()}
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in shown.values())


@pytest.mark.parametrize("name", [name for name in ml.__all__ if name.endswith("Options") or name in ("Training", "Output")])
def test_docstrings_say_what_each_option_is(name: str):
    """The text of `--help`."""
    group = getattr(ml, name)
    text = inspect.getdoc(group)
    assert text and all(f"    {field.name}: {field.metadata['help']}" in text for field in fields_of(group).values())


def test_every_method_is_exported():
    assert {getattr(ml, name) for name in ml._METHODS} == set(ml.METHODS.values())
    assert [name.replace("_", "-") for name in ml._METHODS] == list(ml.METHODS)
