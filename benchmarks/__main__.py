"""`python -m benchmarks`: our steps and orthogonalizations against others', in one run on one GPU."""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

# JAX and PyTorch share the GPU: neither takes its memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import typer
from rich.console import Console
from rich.progress import track

from benchmarks import (
    cards,
    clocks,
    compilation,
    forms,
    kernel_times,
    machine,
    orthogonalization,
    polar_errors,
    polynomials,
    products,
    ratios,
    report,
    steps,
    workloads,
)
from benchmarks.race import Pace


class Part(Enum):
    """What `--only` selects."""

    STEPS = "steps"
    SHAPES = "shapes"
    FORMS = "forms"
    POLYNOMIALS = "polynomials"
    PRODUCTS = "products"
    KERNELS = "kernels"
    COMPILATION = "compilation"


def main(
    out: Annotated[
        Path,
        typer.Option(help="Folder of cards/, which has a file for every GPU, and of the report."),
    ] = Path("benchmarks/out"),
    only: Annotated[list[Part] | None, typer.Option(help="Some parts alone.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny workloads, to see that all runs.")] = False,
    seed: Annotated[int, typer.Option(help="Of the order in which contestants take turns.")] = 0,
    patience: Annotated[
        float, typer.Option(help="Seconds in which the peers of one race are to be ready.")
    ] = 12.0,
) -> None:
    """Time everything, print the tables, and write this GPU's results and the report of all in `out`.

    Contestants run by turns, in an order that is shuffled for every round; times are medians over the
    rounds. The reference of a step: the fewest operations known for it at the rate of this machine's
    bfloat16 product, and 30 bytes a parameter at the rate of its copies.
    """
    console = Console(width=None if Console().is_terminal else 150)
    found = {**machine.versions(), **clocks.state()}
    rates = machine.measure_rates()
    console.print(", ".join(f"{name} {version}" for name, version in found.items()))
    if rates is not None:
        product, copy = rates.products / 1e12, rates.copies / 1e12
        console.print(f"bfloat16 product {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    else:
        console.print("no CUDA device: rows that need one say so, and no time here means a thing")

    pace = Pace(patience=patience, seed=seed)
    if quick:
        pace = pace._replace(rounds=2, turn=0.0)
    shapes = workloads.QUICK_SHAPES if quick else workloads.SHAPES
    near_square = workloads.QUICK_SHAPES if quick else workloads.NEAR_SQUARE
    models = workloads.QUICK_MODELS if quick else workloads.MODELS
    for_sets = workloads.QUICK_SHAPES if quick else workloads.FOR_POLYNOMIALS
    problems = products.QUICK_PROBLEMS if quick else products.PROBLEMS
    layers = 1 if quick else workloads.LAYERS
    parts = {
        Part.STEPS: ("Whole steps", "ours", steps.races(models, rates, pace)),
        Part.SHAPES: (
            "Orthogonalization",
            orthogonalization.OURS,
            orthogonalization.races(shapes, rates, pace),
        ),
        Part.FORMS: ("Forms of the iteration", "standard", forms.races(near_square, pace)),
        Part.POLYNOMIALS: ("Polynomials", polar_errors.BASE, polynomials.races(for_sets, pace)),
        Part.PRODUCTS: ("Products", "cuBLAS", products.races(problems, pace)),
        Part.KERNELS: ("Kernels of a step", kernel_times.WHOLE, kernel_times.races(models, rates)),
        Part.COMPILATION: (
            "Compilation",
            "optax.adamw",
            compilation.races(layers, workloads.LAYER),
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    for part, (title, base, races) in parts.items():
        if only and part not in only:
            continue
        run = list(track(races, title, console=Console(stderr=True)))
        about: dict[str, str | float] = {**found, "seed": str(seed)}
        if rates is not None:
            about["bfloat16 product, FLOP/s"], about["copy, bytes/s"] = rates
        rows = [row for race in run for row in race.rows]
        measured = cards.Part.of(title, base, about, run, list(ratios.measured(steps.RATIOS, rows)))
        for table in report.tables(measured):
            console.print(table)
        # Written part by part: what is measured is not lost with what comes after it.
        card = cards.load(out).get(found["device"], {})
        cards.save(out, found["device"], {**card, title: measured})
        drawn = report.write(out)
        picture = ", and results.png" if drawn else "; no picture without a reference"
        written = cards.file_of(out, found["device"]).relative_to(out)
        console.print(f"wrote {written} and results.md into {out}{picture}")


if __name__ == "__main__":
    typer.run(main)
