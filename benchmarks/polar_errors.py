"""How far a set of polynomials stays from the polar factor, on matrices whose singular values are known.

`python -m benchmarks.polar_errors` prints the table of this machine, computed by JAX on XLA.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
import typer

import optax_normuon
from normuon_core import POLYNOMIALS
from normuon_core.polynomials import AOL, POLAR_EXPRESS, Coefficients, relaxed_cubic, with_steps
from normuon_core.recipes import Preconditioning
from parity_tests import spectra


class Contestant(NamedTuple):
    """A set of polynomials, and what is done to the matrix before its first step."""

    coefficients: Coefficients
    preconditioning: Preconditioning = "frobenius"

    def polar_factor(self, function: Callable, x, **keywords):
        """x orthogonalized by `optax_normuon.polar_factor` or its twin."""
        return function(
            x,
            coefficients=self.coefficients,
            preconditioning=self.preconditioning,
            **keywords,
        )


BASE = "newton_schulz"
"""Whose time and error the others' are divided by."""


CONTESTANTS: dict[str, Contestant] = {
    BASE: Contestant(POLYNOMIALS[BASE]),
    **{
        name: Contestant(each, "aol" if each == AOL else "frobenius")
        for name, each in POLYNOMIALS.items()
        if name != BASE
    },
    "polar_express, 4 steps": Contestant(with_steps(POLAR_EXPRESS, 4)),
    "polar_express, 4 steps, AOL": Contestant(with_steps(POLAR_EXPRESS, 4), "aol"),
    "relaxed cubics, 7 steps": Contestant(relaxed_cubic(1.65e-3, steps=7, peak=1.2)),
}
"""Every published set, and three that could be as accurate as `newton_schulz` for fewer products: the
last is as accurate with fourteen in the place of fifteen. The set `aol` is made for matrices that are
preconditioned so."""


class Problem(NamedTuple):
    """A matrix with its singular vectors.

    Attributes:
      x: (rows, columns) float32, of norm 1. left: (rows, k), right: (columns, k), float64, of the
        singular values that are not zero.
    """

    x: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @property
    def factor(self) -> torch.Tensor:
        """The exact polar factor."""
        return self.left @ self.right.mT

    def error(self, found: torch.Tensor) -> float:
        """|U^T found V - I|_F / sqrt(k): the root mean square of what the k directions of x lack."""
        count = self.left.shape[-1]
        inside = self.left.mT @ found.to(self.left) @ self.right
        inside.diagonal().sub_(1.0)
        return float(torch.linalg.matrix_norm(inside)) / count**0.5


def _gaussian(short: int, long: int, device: str) -> torch.Tensor:
    x = torch.from_numpy(spectra.gaussian(np.random.default_rng(1), short, long)).to(device)
    return torch.linalg.eigvalsh(x @ x.mT).clamp_min(0).sqrt()


SPECTRA: dict[str, Callable[[int, int, str], torch.Tensor]] = {
    "gaussian": _gaussian,
    "power law": lambda short, long, device: 1 / torch.arange(1.0, short + 1),
    "log-spaced": lambda short, long, device: torch.logspace(0, -3, short),
    "one large": lambda short, long, device: torch.tensor([1.0] + [1e-2] * (short - 1)),
    "rank one": lambda short, long, device: torch.ones(1),
}
"""Singular values of a matrix from its (shorter side, longer side, device): those of a Gaussian matrix,
1/k, from 1 to a thousandth, one that is a hundred times all others, one alone."""


def problems(rows: int, columns: int) -> dict[str, Problem]:
    """One matrix a spectrum, all with the same singular vectors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    short, long = sorted((rows, columns))
    random = torch.Generator(device).manual_seed(0)

    def vectors(side: int) -> torch.Tensor:
        x = torch.randn(side, short, generator=random, device=device, dtype=torch.float64)
        return torch.linalg.qr(x).Q

    left, right = vectors(rows), vectors(columns)
    found = {}
    for name, values in SPECTRA.items():
        s = values(short, long, device).to(left)
        s = s / torch.linalg.vector_norm(s)
        some = left[:, : len(s)], right[:, : len(s)]
        found[name] = Problem((some[0] * s @ some[1].mT).float(), *some)
    return found


def errors(
    orthogonalize: Callable[[torch.Tensor], torch.Tensor], found: Mapping[str, Problem]
) -> dict[str, float]:
    """The error of every problem by its name. `orthogonalize`: of a stack (1, rows, columns)."""
    return {
        name: problem.error(orthogonalize(problem.x[None])[0]) for name, problem in found.items()
    }


def in_jax(contestant: Contestant, **keywords) -> Callable[[torch.Tensor], torch.Tensor]:
    """From and to tensors: XLA's standard form, in bfloat16 unless `keywords` say otherwise."""
    keywords = {"compute_dtype": jnp.bfloat16, "algorithm": "standard", **keywords}

    def orthogonalize(x: torch.Tensor) -> torch.Tensor:
        stack = jnp.asarray(x.cpu().numpy())
        v = contestant.polar_factor(optax_normuon.polar_factor, stack, backend="xla", **keywords)
        return torch.tensor(np.asarray(v), device=x.device)

    return orthogonalize


def main(
    shape: Annotated[str, typer.Option(help="ROWSxCOLUMNS.")] = "256x1024",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Print every set's error on five spectra, and the largest of its ratios to newton_schulz's."""
    rows, columns = map(int, shape.split("x"))
    found = problems(rows, columns)
    print("| set |", " | ".join(SPECTRA), "| largest, over that of `newton_schulz` |")
    print("| --- " * (len(SPECTRA) + 2) + "|")
    base: dict[str, float] = {}
    for name, contestant in CONTESTANTS.items():
        each = errors(in_jax(contestant, compute_dtype=jnp.dtype(dtype)), found)
        base = base or each
        cells = [f"{error:.3f}" for error in each.values()] + [f"{over(each, base):.2f}"]
        shown = f"`{name}`" if name in POLYNOMIALS else name
        print(f"| {shown} |", " | ".join(cells), "|")


def over(errors: Mapping[str, float], base: Mapping[str, float]) -> float:
    """The largest ratio of two sets' errors: at most 1 is as accurate on every spectrum."""
    return max(errors[name] / base[name] for name in base)


if __name__ == "__main__":
    typer.run(main)
