"""Names, read from the source: one meaning each, American spelling, and what is private stays at home."""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlxlora"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
SOURCES = [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "cli").glob("*.py"))]

BRITISH = re.compile(
    r"""(quanti|optimi|initiali|normali|tokeni|recogni|randomi|generali|regulari|summari|minimi|maximi|seriali|finali|synchroni|organi)s(e|ed|es|er|ers|ing|ation|ations)$
    |colour|centre|behaviour|labell(ed|ing)|judgement|neighbour|favour|honour|catalogue|modell(ed|ing)|artefact|analyse|licence|cancell""",
    re.VERBOSE | re.IGNORECASE,
)


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def defined(path):
    """Names that a module defines at its top level."""
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (name for target in targets for name in ast.walk(target))
            yield from (name.id for name in names if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))


def test_a_public_name_is_defined_once():
    """One name has one meaning in the whole package; `from x import y` defines nothing."""
    places = defaultdict(list)
    for path in MODULES:
        for name in sorted(set(defined(path))):
            if not name.startswith("_"):
                places[name].append(module_of(path))
    twice = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert len(places) > 500, "the test finds no names"
    assert not twice, twice


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_what_is_private_stays_in_its_module(path):
    taken = [
        f"{'.' * node.level}{node.module or ''} {alias.name}"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("mlxlora"))
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not taken


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_identifiers_are_american(path):
    tree = parsed(path)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg | ast.keyword) and node.arg}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    british = {name for name in names for part in name.split("_") if BRITISH.search(part)}
    assert not british


def test_the_spelling_is_read():
    assert BRITISH.search("optimiser") and BRITISH.search("quantised") and BRITISH.search("colours")
    assert not BRITISH.search("optimizer") and not BRITISH.search("promise") and not BRITISH.search("revised")
