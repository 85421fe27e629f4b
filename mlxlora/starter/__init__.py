"""The bundled starter: a tiny Llama that half knows its sums, and data for each mode. Made by examples/starter."""

from pathlib import Path

_HERE = Path(__file__).parent
_DATA = {"sft": "sft", "dpo": "pairs", "orpo": "pairs", "cpo": "pairs", "kto": "pairs", "grpo": "grpo", "online-dpo": "grpo"}
_ROWS = {"distill": "sft", "gkd": "grpo"}  # modes that need a teacher, and whose rows they read


def model_path() -> Path:
    """The model folder."""
    return _HERE / "model"


def data_path(mode: str) -> Path:
    """The folder with train.jsonl and valid.jsonl for a mode.

    >>> data_path("orpo").name
    'pairs'
    """
    return _HERE / "data" / _DATA[_ROWS.get(mode, mode)]


def defaults(mode: str) -> Path:
    """The YAML file with the options of a run in that mode."""
    return _HERE / f"{_ROWS.get(mode, mode)}.yaml"
