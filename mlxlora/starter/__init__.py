"""The bundled starter, made by examples/starter: a tiny Llama that can almost add, and rows for each method."""

from pathlib import Path

from ..methods import METHODS

_HERE = Path(__file__).parent


def model_path() -> Path:
    """The model folder."""
    return _HERE / "model"


def data_path(method: str) -> Path:
    """The folder with train.jsonl and valid.jsonl for a method.

    >>> data_path("orpo").name
    'pairs'
    """
    return _HERE / "data" / METHODS[method].starter.data


def defaults(method: str) -> Path:
    """The YAML file with the options of a run."""
    return _HERE / f"{METHODS[method].starter.options}.yaml"
