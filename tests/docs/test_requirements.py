"""The six dependencies bring every package that the code imports; the extras bring the optional ones."""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OWN = {"mlxlora", "mlxlora_cli"}


def imported() -> set[str]:
    """Top-level packages that mlxlora/ and cli/ import, anywhere in a file."""
    found: set[str] = set()
    for path in (file for folder in ("mlxlora", "cli") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - OWN


def named(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


@cache
def requirements(distribution: str) -> frozenset[str]:
    """What a distribution needs without extras, from the installed metadata."""
    return frozenset(named(text) for text in requires(distribution) or () if "extra ==" not in text)


def brought(distributions: list[str]) -> set[str]:
    """Distributions and all that they need in turn."""
    found: set[str] = set()
    pending = [*distributions]
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            try:
                pending += requirements(name)
            except ModuleNotFoundError:  # of another platform
                continue
    return found


def test_six_dependencies_bring_every_import():
    six = [named(text) for text in PROJECT["dependencies"]]
    assert len(six) == 6
    optional = {named(text) for extra in PROJECT["optional-dependencies"].values() for text in extra}
    distributions = packages_distributions()
    available = brought(six)
    for package in imported():
        names = {named(name) for name in distributions.get(package, [package])}
        assert names & (available | optional), f"{package} is imported, and none of {', '.join(six)} brings it"


def test_the_comment_names_what_is_imported_without_being_a_dependency():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    comment = next(line for line in text.splitlines() if line.startswith("# Brought by"))
    six = {named(text) for text in PROJECT["dependencies"]}
    optional = {named(text) for name, extra in PROJECT["optional-dependencies"].items() if name != "dev" for text in extra}
    distributions = packages_distributions()
    others = {p for p in imported() if not {named(name) for name in distributions.get(p, [p])} & (six | optional)}
    assert set(re.findall(r"[a-z_0-9]+", comment.partition(":")[2].replace("mlx-lm", ""))) >= others, others
