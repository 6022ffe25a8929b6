"""`python -m parity_tests.accuracy`: tier T2, half precision against float64, for every backend.

The yardstick is the plain bfloat16 iteration as published PyTorch code computes it, on the same
matrices: no backend and no form may have more than 1.1 times its error.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_normuon
import torch_ref
from normuon_core import Polar
from parity_tests.half_precision import (
    ABSOLUTE_FLOOR,
    FORMS,
    HARD_SPECTRA,
    WORST_RATIO,
    published_polar_factor,
)
from parity_tests.report import machine

POLAR = Polar()

SMALL = ["48x128", "128x48", "96x96", "192x768"]
LARGE = ["512x1024", "2048x2048", "2048x8192"]
LARGE_SIDE = 1024
"""From here on two draws: the matrices are drawn in float64 on the CPU."""


class Form(NamedTuple):
    """One way of computing polar factors. `backend`: of JAX or PyTorch, as `framework` says."""

    framework: str
    backend: str
    dtype: str | None
    algorithm: str

    def __str__(self) -> str:
        dtype = {"bfloat16": "bf16", "float16": "fp16", None: ""}[self.dtype]
        return f"{self.framework} {self.backend} {dtype} {self.algorithm}".replace("  ", " ")


KINDS: list[tuple[str | None, str]] = [*FORMS.values(), (None, "auto")]
BACKENDS = [("JAX", "xla"), ("JAX", "triton"), ("PyTorch", "eager"), ("PyTorch", "triton")]


def forms(*, on_gpu: bool) -> list[Form]:
    """All of them, the kernels' on a GPU only."""
    return [
        Form(framework, backend, *kind)
        for framework, backend in BACKENDS
        for kind in KINDS
        if on_gpu or backend != "triton"
    ]


def polar_factors(form: Form, stack: np.ndarray) -> torch.Tensor:
    """(draws, rows, columns) float32 in, float64 out."""
    keywords: dict = {"algorithm": form.algorithm, "backend": form.backend}
    if form.framework == "JAX":
        dtype = None if form.dtype is None else jnp.dtype(form.dtype)
        result = optax_normuon.polar_factor(jnp.asarray(stack), compute_dtype=dtype, **keywords)
        return torch.tensor(np.asarray(result)).double()
    dtype = None if form.dtype is None else getattr(torch, form.dtype)
    x = torch.tensor(stack, device=_device())
    return torch_ref.polar_factor(x, compute_dtype=dtype, **keywords).double().cpu()


def published(stack: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The iteration in this dtype throughout: float64 is exact, bfloat16 the yardstick. float64 out."""
    x = torch.tensor(stack, device=_device())
    return published_polar_factor(x, POLAR, dtype).double().cpu()


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def median_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius errors; absolute ones where the wanted matrix is zero."""
    size = wanted.flatten(1).norm(dim=1)
    errors = (found - wanted).flatten(1).norm(dim=1) / torch.where(size > 0, size, 1.0)
    return float(errors.median())


class Row(NamedTuple):
    """One spectrum and shape: the plain form's error, and those of `forms` by name."""

    spectrum: str
    shape: str
    draws: int
    plain: float
    errors: dict[str, float]

    @property
    def broken(self) -> list[str]:
        allowed = WORST_RATIO * self.plain + ABSOLUTE_FLOOR
        return [name for name, error in self.errors.items() if not error <= allowed]


def rows(shapes: list[str], spectra: list[str], draws: int, *, on_gpu: bool) -> Iterator[Row]:
    for shape in shapes:
        sides = tuple(map(int, shape.split("x")))
        count = min(draws, 2) if min(sides) >= LARGE_SIDE else draws
        for name in spectra:
            yield _row(name, HARD_SPECTRA[name], sides, count, on_gpu=on_gpu)


def _row(name: str, spectrum: Callable, sides, draws: int, *, on_gpu: bool) -> Row:
    rngs = [np.random.default_rng(seed) for seed in range(draws)]
    stack = np.stack([spectrum(rng, *sides) for rng in rngs]).astype(np.float32)
    wanted = published(stack, torch.float64)
    errors = {
        str(form): median_error(polar_factors(form, stack), wanted) for form in forms(on_gpu=on_gpu)
    }
    plain = median_error(published(stack, torch.bfloat16), wanted)
    return Row(name, "x".join(map(str, sides)), draws, plain, errors)


def main(
    shape: Annotated[list[str] | None, typer.Option(help="ROWSxCOLUMNS, repeatable.")] = None,
    spectrum: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(HARD_SPECTRA)}; repeatable.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Matrices of each spectrum.")] = 16,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write every row and the machine here.")
    ] = None,
) -> None:
    """Print each form's median error over the plain bfloat16 form's, and the largest of them.

    Exits with 1 when a ratio is above 1.1. Where the plain error is zero, so are all others.
    """
    on_gpu = torch.cuda.is_available()
    console = Console(width=None if Console().is_terminal else 150)
    shapes = shape or (SMALL + LARGE if on_gpu else SMALL)
    spectra = spectrum or list(HARD_SPECTRA)
    for name in spectra:
        if name not in HARD_SPECTRA:
            raise typer.BadParameter(f"{name!r} is no spectrum; use {', '.join(HARD_SPECTRA)}.")
    for size in shapes:
        if not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*", size):
            raise typer.BadParameter(f"{size!r} is no shape; write ROWSxCOLUMNS, as 48x128.")
    found = list(
        track(
            rows(shapes, spectra, draws, on_gpu=on_gpu),
            "comparing",
            total=len(shapes) * len(spectra),
            console=Console(stderr=True),
        )
    )
    names = [str(form) for form in forms(on_gpu=on_gpu)]
    table = Table(
        "shape", "spectrum", "plain", *names, title="Error over the plain bfloat16 form's"
    )
    for row in found:
        ratios = [row.errors[name] / row.plain if row.plain else 0.0 for name in names]
        style = "bold red" if row.broken else None
        cells = (f"{ratio:.2f}" for ratio in ratios)
        table.add_row(row.shape, row.spectrum, f"{row.plain:.4f}", *cells, style=style)
    console.print(table)
    for name in names:
        worst = max(found, key=lambda row: row.errors[name] / row.plain if row.plain else 0.0)
        ratio = worst.errors[name] / worst.plain if worst.plain else 0.0
        console.print(f"{name}: at most {ratio:.2f}, {worst.spectrum}, {worst.shape}")
    if not on_gpu:
        console.print(
            "the kernels need a CUDA GPU, and PyTorch sees none: their columns are absent"
        )
    about = machine()
    console.print(", ".join(f"{name} {value}" for name, value in about.items()))
    if json_file is not None:
        cells = [row._asdict() for row in found]
        json_file.write_text(json.dumps({"machine": about, "rows": cells}, indent=1) + "\n")
    broken = [(row.shape, row.spectrum, row.broken) for row in found if row.broken]
    for each in broken:
        console.print(*each)
    if broken:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
