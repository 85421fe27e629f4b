"""What users import: every name is there and says what it is."""

import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys

import pytest

import mlxlora

MODULES = sorted(m.name.removeprefix("mlxlora.") for m in pkgutil.walk_packages(mlxlora.__path__, "mlxlora."))
PURE = (
    *(
        "objectives.losses",
        "objectives.advantages",
        "objectives.objective",
        "objectives.mixture",
        "objectives.links",
        "objectives.quantity",
        "objectives.signature",
        "objectives.cross_row",
        "config.method_options",
        "config.values",
    ),
    *(
        "data.messages",
        "data.conversation",
        "data.dialogue",
        "data.traced_text",
        "data.formats",
        "data.rows",
        "data.batching",
        "reporting.text",
        "errors",
    ),
)
"""Modules whose functions are shown at work in doctests."""


@pytest.mark.parametrize("name", mlxlora.__all__)
def test_public_names_are_documented(name):
    value = getattr(mlxlora, name)
    if callable(value) or inspect.ismodule(value):
        assert inspect.getdoc(value), f"mlxlora.{name} has no docstring"


def test_star_import():
    names = {}
    exec("from mlxlora import *", names)
    assert set(mlxlora.__all__) <= names.keys()
    assert len(set(mlxlora.__all__)) == len(mlxlora.__all__) and set(dir(mlxlora)) >= set(mlxlora.__all__)


def test_no_name_is_also_a_module():
    """Importing a module binds its name in the package, over a function of that name."""
    names = set(mlxlora._HOME) & set(MODULES)
    assert not names, f"public names that importing a module takes away: {', '.join(sorted(names))}"


def test_using_the_package_loads_the_fast_blas_and_importing_it_does_not():
    code = (
        "import mlxlora, sys\nassert 'mlxlora.utils.blas' not in sys.modules\nmlxlora.Training\n"
        "from mlxlora.utils.blas import load_fast_blas\nprint(load_fast_blas.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_unknown_name():
    with pytest.raises(AttributeError, match="'mlxlora' has no attribute 'nonesuch'"):
        _ = mlxlora.nonesuch


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_their_public_parts_are_documented(name):
    module = importlib.import_module(f"mlxlora.{name}")
    assert inspect.getdoc(module), f"mlxlora.{name} has no docstring"
    own = [part for key, part in vars(module).items() if not key.startswith("_") and inspect.getmodule(part) is module]
    silent = [part.__name__ for part in own if (inspect.isfunction(part) or inspect.isclass(part)) and not inspect.getdoc(part)]
    assert not silent, f"mlxlora.{name}: no docstring: {', '.join(silent)}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_have_examples(name):
    tests = doctest.DocTestFinder().find(importlib.import_module(f"mlxlora.{name}"))
    assert any(test.examples for test in tests), f"mlxlora.{name} has no doctest"


def test_options_are_explained():
    """Every field of an options group is a flag, and says what it does."""
    import attrs

    from mlxlora.config import options as config

    groups = [group for group in vars(config).values() if inspect.isclass(group) and attrs.has(group)]
    fields = [(group.__name__, field) for group in groups for field in attrs.fields(group)]
    assert len(fields) > 40
    unexplained = [f"{group}.{field.name}" for group, field in fields if not str(field.metadata.get("help", "")).endswith(".")]
    assert not unexplained, unexplained
