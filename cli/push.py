"""`mlxlora push`."""

from typing import Annotated

import typer

from mlxlora.utils.output import echo_written


def push(
    folder: Annotated[str, typer.Argument(help="Adapters, adapters exported for peft, or a fused model.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
) -> None:
    """Upload a finished folder and its card to the Hugging Face hub, without checkpoints and samples."""
    from mlxlora.adapters.hub import push as run
    from mlxlora.methods import method_info
    from mlxlora.reporting.history import SETTINGS, read_settings
    from mlxlora.utils.paths import checked_path

    method = method_info(read_settings(checked_path(folder, "push") / SETTINGS))
    echo_written("hub", run(folder, repository, public=public, method=method))
