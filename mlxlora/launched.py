"""Which of several processes this one is, as whoever launched them says; without MLX, so that messages need not wait for it."""

import os

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
"""Set by `mlx.launch`, Open MPI, MPICH and Slurm."""


def is_launched() -> bool:
    """Whether anybody says so."""
    return any(name in os.environ for name in LAUNCHED)


def launched_rank() -> int:
    """From 0; 0 too if this process is alone."""
    return next((int(os.environ[name]) for name in LAUNCHED if os.environ.get(name, "").isdigit()), 0)
