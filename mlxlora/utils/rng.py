"""The state of MLX's global random generator, the only source of randomness in a training step (dropout, noise)."""

from typing import Any

import mlx.core as mx
import numpy as np


def random_key() -> mx.array:
    """The state of MLX's global random generator, [2] uint32."""
    state: Any = mx.random.state
    return state[0]


def restore_random_key(key: mx.array) -> None:
    """Restores a state: the key of a seed is its two halves."""
    high, low = (int(half) for half in np.array(key))
    mx.random.seed((high << 32) | low)
