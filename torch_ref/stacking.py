"""From weights to stacks of matrices, and back.

The matrices of one shape, whichever weights they come from, are orthogonalized as one batch; the
batch is cut where it would take too much memory.
"""

import math
from collections.abc import Sequence

import torch

from normuon_core import MatrixView


def to_stack(array: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """An array in its weight's rank, or a statistic of one, as (batch, rows, columns).

    A side that a statistic reduces has size 1. A view of `array` wherever its memory allows.
    """
    ordered = array.permute(view.order)
    batch, rows = len(view.batch_axes), len(view.row_axes)
    sides = (
        ordered.shape[:batch],
        ordered.shape[batch : batch + rows],
        ordered.shape[batch + rows :],
    )
    return ordered.reshape([math.prod(side) for side in sides])


def from_stack(stack: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """The inverse of `to_stack`: (batch, rows, columns) in the weight's rank and order of axes."""
    batch, rows, columns = stack.shape
    ordered = stack.reshape(view.statistic_shape((batch, rows, columns)))
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    return ordered.permute(inverse)


def to_blocks(array: torch.Tensor, view: MatrixView) -> list[torch.Tensor]:
    """The output blocks of a weight, each (batch, rows, columns); one where nothing is split."""
    stack = to_stack(array, view)
    return [stack[block] for block in view.blocks]


def from_blocks(blocks: Sequence[torch.Tensor], view: MatrixView) -> torch.Tensor:
    """The inverse of `to_blocks`."""
    stack = torch.cat(list(blocks), dim=view.output_stack_axis) if view.is_split else blocks[0]
    return from_stack(stack, view)


def bytes_per_matrix(
    rows: int, columns: int, *, dtype: torch.dtype, compute_dtype: torch.dtype
) -> int:
    """Temporary memory of one matrix in a stack, at its peak, rounded up.

    Four arrays of the matrix's size in the working dtype `dtype` and three in the compute dtype,
    and as many of its Gram matrix's.
    """
    entries = rows * columns + min(rows, columns) ** 2
    return entries * (4 * dtype.itemsize + 3 * compute_dtype.itemsize)
