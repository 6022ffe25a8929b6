"""How many operations and bytes a step needs at least: the reference that times are compared with."""

from collections.abc import Iterable
from typing import NamedTuple

BYTES_A_PARAMETER = 30
"""What a float32 step of a matrix has to move: gradient, momentum twice, parameter and update once (20
bytes), and four to five passes over the matrix in half precision."""


class Rates(NamedTuple):
    """The machine's best: FLOP/s of bfloat16 products, bytes/s that copies read and write."""

    products: float
    copies: float


def orthogonalization_operations(rows: int, columns: int) -> float:
    """Five steps on one matrix, in floating-point operations, with products that use symmetry.

    By the Gram form with one restart: (6 ratio + 14) n^3, with n the short side and ratio = long /
    short. The standard form's (15 ratio + 5) n^3 are never fewer, and as many on square matrices.
    """
    short, long = sorted((rows, columns))
    return (6 * long / short + 14) * short**3


def orthogonalization_seconds(shapes: Iterable[tuple[int, int, int]], rates: Rates) -> float:
    """For (count, rows, columns) of matrices, at the machine's rate."""
    operations = (count * orthogonalization_operations(r, c) for count, r, c in shapes)
    return sum(operations) / rates.products


def step_seconds(shapes: Iterable[tuple[int, int, int]], rates: Rates) -> float:
    """A whole step: the arithmetic and then the bytes, as if neither hid the other."""
    shapes = list(shapes)
    parameters = sum(count * rows * columns for count, rows, columns in shapes)
    bytes_moved = BYTES_A_PARAMETER * parameters
    return orthogonalization_seconds(shapes, rates) + bytes_moved / rates.copies
