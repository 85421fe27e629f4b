"""`mlxlora doctor`."""

from typing import Annotated

import typer

from mlxlora.utils.blas import load_fast_blas
from mlxlora.utils.output import echo


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as a JSON list.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time the ways of attending here, and keep the answers for runs.")
    ] = False,
) -> None:
    """Report your setup (device, BLAS, compiler, memory) and suggest fixes."""
    blas = load_fast_blas()
    import attrs
    import orjson

    from mlxlora.utils.doctor import examine

    if measure:
        _measure()
        return
    findings = examine(blas)
    if as_json:
        echo(orjson.dumps([attrs.asdict(finding) for finding in findings], option=orjson.OPT_INDENT_2).decode())
        return
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        echo(f"{finding.name:{width}}  {finding.value}")
        if not finding.ok:
            typer.secho(f"{'':{width}}  -> {finding.remedy}", fg="yellow")


def _measure() -> None:
    """A line for each length, as soon as it is known."""
    from mlxlora.models.attention_choice import machine_table
    from mlxlora.utils.measured import measurements

    for line in machine_table(measurements()):
        echo(line)
