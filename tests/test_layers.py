"""The architecture, read from the source: who may import whom, and how long things may be."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = (
    "errors",
    "batch utils",
    "objectives config distributed",
    "data",
    "models reporting",
    "adapters",
    "training",
    "rollouts",
    "methods",
)
"""The rooms from the ground up: a room imports rooms of lower floors, never of its own floor or above."""

FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
HEAVY = {"mlx", "mlx_lm", "transformers", "tokenizers", "numpy", "torch", "datasets"}
PACKAGE = ROOT / "mlxlora"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "cli").glob("*.py"))]


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path, whole=True):
    """Modules that a file imports: ours as `mlxlora.room.module` or `cli.x`, others by their first name.

    Args:
        whole: also those that a function imports when it runs.
    """
    statements = ast.walk(parsed(path)) if whole else top_level(parsed(path))
    return {name for node in statements for name in names_of(node, path)}


def top_level(tree):
    """The statements that run at import time, those under `if` and `try` among them, not those of functions."""
    for node in tree.body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With) and not is_type_checking(node):
            yield from (inner for inner in ast.walk(node) if isinstance(inner, ast.Import | ast.ImportFrom))


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def names_of(node, path):
    if isinstance(node, ast.Import):
        return [alias.name if alias.name.startswith("mlxlora.") else alias.name.split(".")[0] for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        folder = path.relative_to(ROOT).parent.parts
        base = ".".join([*folder[: len(folder) - node.level + 1], *([base] if base else [])])
    if base.split(".")[0] not in ("mlxlora", "cli"):
        return [base.split(".")[0]]
    return [inner if is_module(inner := f"{base}.{alias.name}") else base for alias in node.names]


def is_module(name):
    place = ROOT / name.replace(".", "/")
    return place.is_dir() or place.with_suffix(".py").is_file()


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(name):
    """The folder, or the file at the top, that a module is in."""
    return name.removeprefix("mlxlora.").split(".")[0]


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


def parameters(function):
    """How many a caller sees; the options of a published method or a command are flags, which **options stands for."""
    a = function.args
    return len([x for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]) + bool(a.vararg)


def test_every_room_has_its_floor_and_its_purpose():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} - {"starter"}
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | files == FLOOR.keys()
    assert len(folders) == 10
    for name in folders:
        purpose = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")))
        assert purpose and len(purpose.splitlines()) == 1, f"mlxlora/{name}/__init__.py: say in one line what the room is for"


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down(path):
    own = room_of(module_of(path))
    used = {name for name in imported(path) if name.startswith("mlxlora.")}
    upwards = {name for name in used if room_of(name) != own and FLOOR.get(room_of(name), -1) >= FLOOR[own]}
    assert not upwards, f"{module_of(path)} imports {', '.join(sorted(upwards))} from its own floor or from above"


def test_objectives_know_batches_and_errors_alone():
    for path in sorted((PACKAGE / "objectives").glob("*.py")):
        used = {room_of(name) for name in imported(path) if name.startswith("mlxlora.")} - {"objectives"}
        assert used <= {"batch", "errors"}, f"{path.name} imports {used}"
        assert not imported(path) & {"mlx_lm", "transformers", "pathlib", "os", "typer"}


def test_no_module_imports_itself_through_others():
    graph = {module_of(path): imported(path) for path in MODULES}
    done, circles = set(), []

    def visit(name, trail):
        if name in trail:
            circles.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in graph.get(name, ()):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    assert not circles, circles


@pytest.mark.parametrize("path", MODULES, ids=module_of)
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
        places = {ROOT / name.replace(".", "/") for name in names if name.startswith(("mlxlora.", "cli."))}
        found = {file for place in places for file in (place.with_suffix(".py"), place / "__init__.py")}
        pending += [file for file in found if file.is_file() and file not in seen]
    assert {"fields", "config_file", "errors"} <= {path.stem for path in seen}, "the test follows no imports"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_nothing_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    long = {function.name: lines(function) for function in functions(path) if lines(function) > 50}
    assert not long, f"longer than 50 lines: {long}"
    wide = {function.name: parameters(function) for function in functions(path) if parameters(function) > 7}
    assert not wide, f"more than 7 parameters, bundle them: {wide}"


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
