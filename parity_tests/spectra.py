"""Matrices whose singular values are hard on an orthogonalization."""

from collections.abc import Callable

import numpy as np

Spectrum = Callable[[np.random.Generator, int, int], np.ndarray]


def gaussian(rng, rows, columns):
    return rng.standard_normal((rows, columns))


def log_spaced(rng, rows, columns):
    """Singular values from 1 down to 1e-9."""
    return _with_singular_values(rng, rows, columns, np.logspace(0, -9, min(rows, columns)))


def power_law(rng, rows, columns):
    """The k-th singular value is 1/k."""
    return _with_singular_values(rng, rows, columns, 1 / np.arange(1.0, min(rows, columns) + 1))


def low_rank(rank: int) -> Spectrum:
    def draw(rng, rows, columns):
        left = rng.standard_normal((rows, rank))
        return left @ rng.standard_normal((rank, columns)) / np.sqrt(rows * columns)

    return draw


def zero(rng, rows, columns):
    del rng
    return np.zeros((rows, columns))


def one_huge_row(rng, rows, columns):
    x = rng.standard_normal((rows, columns))
    x[rng.integers(rows)] *= 1e4
    return x


def near_duplicate_rows(rng, rows, columns):
    x = rng.standard_normal((rows, columns))
    half = rows // 2
    x[half : 2 * half] = x[:half] + 1e-4 * x[half : 2 * half]
    return x


def scaled(factor: float) -> Spectrum:
    def draw(rng, rows, columns):
        return factor * rng.standard_normal((rows, columns))

    return draw


SPECTRA: dict[str, Spectrum] = {
    "gaussian": gaussian,
    "log-spaced to 1e-9": log_spaced,
    "power law": power_law,
    "rank one": low_rank(1),
    "rank ten": low_rank(10),
    "zero": zero,
    "one huge row": one_huge_row,
    "near-duplicate rows": near_duplicate_rows,
    "times 1e8": scaled(1e8),
    "times 1e-8": scaled(1e-8),
}


def _with_singular_values(rng, rows, columns, values):
    short = len(values)
    left, _ = np.linalg.qr(rng.standard_normal((rows, short)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, short)))
    return (left * values) @ right.T
