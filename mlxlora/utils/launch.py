"""Which of several processes this one is, as whoever launched them says; without MLX, so that messages need not wait for it."""

import os
import sys

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""Set by `mlx.launch`, Open MPI, MPICH and Slurm."""


def is_launched() -> bool:
    """Whether anybody says so."""
    return any(name in os.environ for name in LAUNCHED)


def launched_rank() -> int:
    """From 0; 0 too if this process is alone."""
    return next((int(os.environ[name]) for name in LAUNCHED if os.environ.get(name, "").isdigit()), 0)


def warn(text: str) -> None:
    """Says something on standard error where no reporter of a run is, once for all processes."""
    if not launched_rank():
        print(f"warning: {text}", file=sys.stderr, flush=True)
