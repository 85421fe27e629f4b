"""The names that a published method accepts as `loss_type`, as its own message lists them."""

from collections.abc import Callable

from mlxlora.errors import InputError
from mlxlora.objectives.objective import Objective


def loss_types(method: Callable[..., Objective]) -> list[str]:
    """The names in the method's table."""
    try:
        method(loss_type="?")
    except InputError as error:
        return str(error).partition("must be one of ")[2].partition(", got")[0].split(", ")
    raise AssertionError(f"{method} accepts any loss_type")
