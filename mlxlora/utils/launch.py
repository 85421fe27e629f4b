"""The rank of this process, from the launcher's environment; without MLX, so that messages need not wait for its import."""

import os

from .output import say

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""Set by `mlx.launch`, Open MPI, MPICH and Slurm."""


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return any(name in os.environ for name in LAUNCHED)


def launched_rank() -> int:
    """The rank, from 0; 0 if this process is alone."""
    return next((int(os.environ[name]) for name in LAUNCHED if os.environ.get(name, "").isdigit()), 0)


def warn(text: str) -> None:
    """Prints a warning on standard error, where there is no reporter of a run; only rank 0 prints."""
    if not launched_rank():
        say(f"warning: {text}")
