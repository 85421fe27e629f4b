"""`mlxlora push`."""

from typing import Annotated

import typer


def push(
    folder: Annotated[str, typer.Argument(help="Adapters, adapters exported for peft, or a fused model.")],
    repository: Annotated[str, typer.Argument(help="ORG/NAME; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public; default: private.")] = False,
) -> None:
    """Upload a finished folder to the Hugging Face hub, with its card, without checkpoints and samples."""
    from mlxlora.adapters.hub import push as run

    typer.echo(run(folder, repository, public=public))
