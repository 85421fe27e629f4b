"""Small chat templates with the habits of real ones, and the real ones where there are any."""

import os
from importlib.util import find_spec
from pathlib import Path

VARIABLE = "MLXLORA_CHAT_TEMPLATES"
"""The environment variable with the folder of real templates."""

TEXT_ONLY = ("in_the_loop", "trailed", "accumulated", "marked")
"""Small templates without calls."""


def _read(folder: Path) -> dict[str, str]:
    return {file.stem: file.read_text(encoding="utf-8").removesuffix("\n") for file in sorted(folder.glob("*.jinja"))}


def real_templates() -> dict[str, str]:
    """Real chat templates by name: those of `VARIABLE`'s folder, else of an installed trl; empty if there is neither."""
    named = os.environ.get(VARIABLE)
    spec = None if named else find_spec("trl")
    folder = Path(named) if named else Path(spec.origin or "").parent / "chat_templates" if spec else None
    return _read(folder) if folder else {}


TEMPLATES = _read(Path(__file__).parent / "chat_templates")
"""Small templates by name: Jinja source."""
