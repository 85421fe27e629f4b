"""What MLX has to be told before it computes anything."""

import os
import sys

from .blas import load_fast_blas

GRAPH_MEGABYTES = "200"


def set_up_mlx() -> None:
    """Loads a fast BLAS on Linux, and limits what a CUDA graph holds, unless MLX_MAX_MB_PER_BUFFER is set.

    MLX runs kernels on CUDA in graphs, and frees what a kernel read only after its whole graph has run. Its own limit, 1,000 MB
    and more by GPU, costs 8 GB at the peak of a step of 16,384 tokens (benchmarks/README.md). Call it before MLX is imported.
    """
    load_fast_blas()
    if sys.platform == "linux":
        os.environ.setdefault("MLX_MAX_MB_PER_BUFFER", GRAPH_MEGABYTES)
