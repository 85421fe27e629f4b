"""The architecture, read from the source: who may import whom, and how long things may be."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]

LAYERS = (
    "machine errors",
    "types files chance launched peers split shim prefetch modes attention lora memory limits",
    "trust",
    "blas arrays config settings folders tables losses advantages "
    "distributed templates userfile sharing decode report records reward_functions initialise quantising principal",
    "ranks sharding",
    "conversion",
    "charts trackers plotting doctor compose card logprobs scores "
    "kv adapters optimisers formats rewards sampling recompute neftune",
    "merging terms surrogates vector coupling data rollouts judges distilling page preflight",
    "step checkpoint tokencache questions",
    "policy batching",
    "signatures",
    "micro objectives evaluate reference sources watchers",
    "loop joining",
    "online packing labels",
    "runs contests preview",
    "dryrun introduction answering",
    "recipes",
    "fusing peft comparison",
    "hub",
)
"""From the bottom to the top: a module imports modules of lower layers, never of its own."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
MATHEMATICS = {
    "types",
    "losses",
    "advantages",
    "scores",
    "compose",
    "terms",
    "surrogates",
    "policy",
    "objectives",
    "tables",
    "errors",
}
"""What an objective is made of: log-probabilities and columns, no model, no rows, no files."""

HEAVY = {"mlx", "mlx_lm", "transformers", "tokenizers", "numpy", "torch", "datasets"}
MODULES = sorted((ROOT / "mlxlora").glob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "cli").glob("*.py"))]


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path, whole=True):
    """Modules that a file imports: ours as `mlxlora.x` or `cli.x`, others by their first name.

    Args:
        whole: also those that a function imports when it runs.
    """
    statements = ast.walk(parsed(path)) if whole else top_level(parsed(path))
    return {name for node in statements for name in names_of(node, path.parent.name)}


def top_level(tree):
    """The statements that run at import time, those under `if` and `try` among them, not those of functions."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom))


def names_of(node, package):
    if isinstance(node, ast.Import):
        return [ours(alias.name) for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:
        return [f"{package}.{name}" for name in ([node.module.split(".")[0]] if node.module else [a.name for a in node.names])]
    if node.module == "mlxlora":
        return [f"mlxlora.{alias.name}" for alias in node.names]
    return [ours(node.module or "")]


def ours(name):
    return ".".join(name.split(".")[:2]) if name.startswith("mlxlora.") else name.split(".")[0]


def functions(path):
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def without_docstring(function):
    body = function.body
    return body[1:] if ast.get_docstring(function) is not None else body


def lines(function):
    """Lines of a function without its docstring."""
    body = without_docstring(function)
    documented = body[0].lineno - function.body[0].lineno if body and body[0] is not function.body[0] else 0
    return function.end_lineno - function.lineno + 1 - documented


def test_every_module_has_its_layer():
    here = {path.stem for path in MODULES} - {"__init__"}
    assert here <= RANK.keys(), f"say in tests/test_layers.py where {', '.join(here - RANK.keys())} belongs"


@pytest.mark.parametrize("path", [path for path in MODULES if path.stem != "__init__"], ids=lambda path: path.stem)
def test_imports_point_down(path):
    used = {name.removeprefix("mlxlora.") for name in imported(path) if name.startswith("mlxlora.")}
    upwards = {name for name in used & RANK.keys() if RANK[name] >= RANK.get(path.stem, 0)}
    assert not upwards, f"{path.stem} imports {', '.join(sorted(upwards))} from its own layer or from above"
    if path.stem in MATHEMATICS:
        assert used <= MATHEMATICS, f"{path.stem} is mathematics; it imports {', '.join(sorted(used - MATHEMATICS))}"
        assert not imported(path) & {"mlx_lm", "transformers", "pathlib", "os", "typer"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_library_does_not_know_the_command_line(path):
    assert not {name for name in imported(path) if name.startswith(("cli", "mlxlora_cli", "typer"))}


def test_help_needs_nothing_heavy():
    """Everything that importing the command line imports, and in turn imports."""
    pending, seen = sorted((ROOT / "cli").glob("*.py")), set()
    while pending:
        path = pending.pop()
        seen.add(path)
        names = imported(path, whole=False)
        assert not names & HEAVY, f"{path.relative_to(ROOT)} imports {', '.join(sorted(names & HEAVY))} at module level"
        found = {ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("mlxlora.")}
        pending += [file for file in found if file.is_file() and file not in seen]
    assert {"config", "settings", "errors"} <= {path.stem for path in seen}, "the test follows no imports"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_nothing_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
    long = {function.name: lines(function) for function in functions(path) if lines(function) > 60}
    assert not long, f"longer than 60 lines: {long}"


def test_functions_are_short_in_the_middle(record_property):
    middle = median(lines(function) for path in SOURCES for function in functions(path))
    record_property("median_function_lines", middle)
    assert middle <= 12, f"the median function has {middle} lines"


def test_no_body_is_copied():
    """Functions of at least four statements have bodies of their own."""
    places = defaultdict(list)
    for path in SOURCES:
        for function in functions(path):
            body = without_docstring(function)
            if sum(isinstance(node, ast.stmt) for statement in body for node in ast.walk(statement)) >= 4:
                places["".join(map(ast.dump, body))].append(f"{path.relative_to(ROOT)}:{function.lineno} {function.name}")
    copies = [places for places in places.values() if len(places) > 1]
    assert not copies, f"identical: {copies}"
