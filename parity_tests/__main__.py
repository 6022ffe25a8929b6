"""`python -m parity_tests`: the largest differences between JAX and PyTorch on this machine."""

import json
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from parity_tests import report

COLUMNS = ("recipe", "stage", "compute dtype", "relative", "ulps", "bound")


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every row and the machine here.")
    ] = None,
) -> None:
    """Compare every recipe, stage by stage and over ten steps, in four dtypes.

    Relative: the largest difference over the largest entry. Ulps: the same difference in units in the
    last place of that entry. Exits with 1 when a bound is broken.
    """
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


if __name__ == "__main__":
    typer.run(main)
