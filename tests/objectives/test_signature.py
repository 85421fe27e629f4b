"""Published methods show all of their options, and take no others."""

import inspect

import pytest

from mlxlora import objectives
from mlxlora.objectives.objective import Objective


@pytest.mark.parametrize("name", objectives.__all__)
def test_every_option_has_a_default_that_it_takes(name: str) -> None:
    method = getattr(objectives, name)
    options = inspect.signature(method).parameters
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in options.values())
    assert isinstance(method(**{key: p.default for key, p in options.items()}), Objective)


@pytest.mark.parametrize("name", objectives.__all__)
def test_unknown_options_are_errors(name: str) -> None:
    with pytest.raises(TypeError, match="betta"):
        getattr(objectives, name)(betta=0.1)


def test_options_of_inner_functions_are_shown() -> None:
    assert {"label_smoothing", "delta", "discopop_tau", "ld_alpha"} <= inspect.signature(objectives.xpo).parameters.keys()
    assert {"epsilon", "epsilon_high", "max_completion_length"} <= inspect.signature(objectives.grpo).parameters.keys()
    assert "loss_type" not in inspect.signature(objectives.dapo).parameters
    assert inspect.signature(objectives.dapo).parameters["epsilon_high"].default == 0.28
