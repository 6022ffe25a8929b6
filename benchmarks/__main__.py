"""`python -m benchmarks`: our steps and orthogonalizations against others', in one run on one GPU."""

import json
import os
from enum import Enum
from pathlib import Path
from typing import Annotated

# JAX and PyTorch share the GPU: neither takes its memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import typer
from rich.console import Console
from rich.progress import track

from benchmarks import compilation, machine, orthogonalization, report, steps, workloads
from benchmarks.rows import Row


class Part(Enum):
    """What `--only` selects."""

    SHAPES = "shapes"
    STEPS = "steps"
    COMPILATION = "compilation"


def main(
    out: Annotated[Path, typer.Option(help="Folder of results.json, .md and .png.")] = Path(
        "benchmarks/out"
    ),
    only: Annotated[list[Part] | None, typer.Option(help="Some parts alone.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny workloads, to see that all runs.")] = False,
) -> None:
    """Time everything, print the tables, and write results and a picture.

    Times are medians. The reference of a step: the fewest operations known for it at the rate of this
    machine's bfloat16 product, and 30 bytes a parameter at the rate of its copies.
    """
    console = Console(width=None if Console().is_terminal else 150)
    rates = machine.measure_rates()
    found = machine.versions()
    console.print(", ".join(f"{name} {version}" for name, version in found.items()))
    on_gpu = rates is not None
    if rates is not None:
        product, copy = rates.products / 1e12, rates.copies / 1e12
        console.print(f"bfloat16 product {product:.0f} TFLOP/s, copy {copy:.2f} TB/s")
    else:
        console.print("no CUDA device: rows that need one say so, and no time here means a thing")

    calls = 1 if quick else 5
    shapes = workloads.QUICK_SHAPES if quick else workloads.SHAPES
    models = workloads.QUICK_MODELS if quick else workloads.MODELS
    layers = 1 if quick else workloads.LAYERS
    parts = {
        Part.STEPS: (
            "Whole steps",
            steps.rows(models, rates, on_gpu=on_gpu, calls=calls),
            steps.OURS,
        ),
        Part.SHAPES: (
            "Orthogonalization",
            orthogonalization.rows(shapes, rates, on_gpu=on_gpu, calls=calls),
            orthogonalization.OURS,
        ),
        Part.COMPILATION: (
            "Compilation",
            compilation.rows(layers, workloads.LAYER),
            "optax.adamw",
        ),
    }
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, str | float] = {**found}
    if rates is not None:
        about["bfloat16 product, FLOP/s"], about["copy, bytes/s"] = rates
    text = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in about.items()), ""]
    rows: dict[str, list[Row]] = {}
    drawn = False
    for part, (title, measured, base) in parts.items():
        if only and part not in only:
            continue
        rows[title] = list(track(measured, title, console=Console(stderr=True)))
        console.print(report.table(title, rows[title], base))
        text.append(report.markdown(title, rows[title], base))
        # Written part by part: what is measured is not lost with what comes after it.
        result = {"machine": about, "rows": {t: [r.as_dict() for r in rows[t]] for t in rows}}
        (out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "results.md").write_text("\n".join(text))
        drawn = report.draw(out / "results.png", rows)
    picture = ", and results.png" if drawn else "; no picture without a reference"
    console.print(f"wrote results.json and results.md into {out}{picture}")


if __name__ == "__main__":
    typer.run(main)
