"""`python -m parity_tests`: the largest differences between JAX and PyTorch on this machine.

`identify TRACE` says which published recipe made a trace, `compare A B` where two traces part.
"""

import json
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parity_tests import report
from parity_tests.divergence import first_divergence
from parity_tests.identification.identify import identify

COLUMNS = ("recipe", "stage", "compute dtype", "relative", "ulps", "bound")


app = typer.Typer(add_completion=False)


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every row and the machine here.")
    ] = None,
) -> None:
    """Compare every recipe, stage by stage and over ten steps, in four dtypes.

    Relative: the largest difference over the largest entry. Ulps: the same difference in units in the
    last place of that entry. Exits with 1 when a bound is broken.
    """
    if context.invoked_subcommand is not None:
        return
    jax.config.update("jax_enable_x64", True)
    console = Console(width=None if Console().is_terminal else 110)
    progress = track(
        report.rows(), "comparing", total=report.count_rows(), console=Console(stderr=True)
    )
    rows = list(progress)
    table = Table(*COLUMNS, title="JAX against PyTorch, largest difference")
    for row in rows:
        style = None if row.holds else "bold red"
        figures = (f"{row.relative:.2g}", f"{row.ulps:.3g}", f"{row.bound:.2g}")
        table.add_row(row.recipe, row.stage, row.dtype, *figures, style=style)
    console.print(table)
    machine = report.machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()))
    if json_file is not None:
        cells = [{**row._asdict(), "holds": row.holds} for row in rows]
        json_file.write_text(json.dumps({"machine": machine, "rows": cells}, indent=1) + "\n")
    broken = [row for row in rows if not row.holds]
    console.print(f"{len(rows) - len(broken)} of {len(rows)} bounds hold")
    if broken:
        raise typer.Exit(1)


Trace = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="As golden/README.md.")]


@app.command("identify")
def identify_command(trace: Trace) -> None:
    """Say which published recipe made a trace, with the keywords and changes that reproduce it.

    The first line is the recipe's name. The trace needs arrays and shapes alone.
    """
    try:
        typer.echo(identify(trace))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("compare")
def compare_command(first: Trace, second: Trace) -> None:
    """Say at which step, weight and stage two traces part; exits with 1 if they do."""
    try:
        found = first_divergence(first, second)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    typer.echo(found or "the same to rounding")
    if found is not None:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
