"""What the tests of flags and files share."""

from collections.abc import Callable
from typing import Any

import pytest
from mlxlora_cli import app
from typer.main import get_command

from mlxlora.config import config_file as settings
from mlxlora.methods import Method


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """What a command line comes to: the options that its method gets (None: nothing ran), and what it prints."""
    seen: list[tuple[Any, ...]] = []
    commands = get_command(app).commands  # type: ignore[attr-defined]
    monkeypatch.setattr(Method, "__call__", lambda _, *groups: seen.append(groups))

    def run(command: str, *arguments: Any) -> tuple[Any, str]:
        seen.clear()
        commands[command].main([*map(str, arguments)], prog_name=command, standalone_mode=False)
        return settings.dump(*seen[0]) if seen else None, capsys.readouterr().out

    return run
