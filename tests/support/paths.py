"""Where things lie that tests share, and what a command line did."""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


class Outcome(NamedTuple):
    """What `mlxlora ARGUMENTS` did: its exit code, standard output and standard error."""

    code: int
    out: str
    err: str
