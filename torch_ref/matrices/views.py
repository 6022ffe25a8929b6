"""From weights to stacks of matrices, and back.

The matrices of one shape, whichever weights they come from, are orthogonalized as one batch.
"""

import math
from collections.abc import Sequence

import torch

from normuon_core import MatrixView


def to_stack(array: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """An array in its weight's rank, or a statistic of one, as (batch, rows, columns).

    A side that a statistic reduces has size 1. A view of `array` wherever its memory allows.
    """
    batch, rows = len(view.batch_axes), len(view.row_axes)
    ordered = array if view.folded is None else array.reshape(view.unfolded(array.shape))
    if view.order != tuple(range(len(view.order))):
        ordered = ordered.permute(view.order)
    shape = tuple(ordered.shape)
    sides = (shape[:batch], shape[batch : batch + rows], shape[batch + rows :])
    return ordered.reshape([math.prod(side) for side in sides])


def from_stack(stack: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """The inverse of `to_stack`: (batch, rows, columns) in the weight's rank and order of axes."""
    batch, rows, columns = stack.shape
    ordered = stack.reshape(view.statistic_shape((batch, rows, columns)))
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    array = ordered.permute(inverse)
    return array if view.folded is None else array.reshape(view.fold(tuple(array.shape)))


def to_blocks(
    array: torch.Tensor, view: MatrixView, widths: Sequence[int] | None = None
) -> list[torch.Tensor]:
    """The output blocks of a weight: each run's, (matrices, rows, columns).

    A run's blocks stand beside each other within an entry of the batch. A view of `array` wherever its
    memory allows.

    Args:
      widths: for a statistic, how much of the output side is one of a run's blocks'; None is the blocks'
        own sizes.
    """
    stack, axis = to_stack(array, view), view.output_stack_axis
    if not view.is_split:
        return [stack]
    result, start = [], 0
    for run, width in zip(view.runs, widths or [run.size for run in view.runs], strict=True):
        part = stack.narrow(axis, start, run.blocks * width)
        start += run.blocks * width
        if run.blocks > 1:
            apart = part.unflatten(axis, (run.blocks, width))
            part = (apart if axis == -2 else apart.transpose(1, 2)).flatten(0, 1)
        result.append(part)
    return result


def from_blocks(runs: Sequence[torch.Tensor], view: MatrixView) -> torch.Tensor:
    """The inverse of `to_blocks`."""
    axis, parts = view.output_stack_axis, []
    for part, run in zip(runs, view.runs, strict=True):
        if run.blocks > 1:
            apart = part.unflatten(0, (-1, run.blocks))
            part = (apart if axis == -2 else apart.transpose(1, 2)).flatten(axis - 1, axis)
        parts.append(part)
    return from_stack(parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis), view)


def bytes_per_matrix(
    rows: int, columns: int, *, dtype: torch.dtype, compute_dtype: torch.dtype
) -> int:
    """An upper estimate of the temporary memory that one matrix of a stack takes at its peak.

    Four arrays of the matrix's size in the working dtype `dtype` and three in the compute dtype,
    and as many of its Gram matrix's.
    """
    entries = rows * columns + min(rows, columns) ** 2
    return entries * (4 * dtype.itemsize + 3 * compute_dtype.itemsize)
