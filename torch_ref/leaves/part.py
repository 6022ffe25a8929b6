"""The part of a weight that one process steps: a rectangle of it, or all of it."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch

from normuon_core import MatrixView

Region = tuple[tuple[int, int], ...]
"""A rectangle of an array: (first, one after the last) on each axis."""


def whole_region(shape: Sequence[int]) -> Region:
    """All of an array."""
    return tuple((0, size) for size in shape)


def region_shape(region: Region) -> tuple[int, ...]:
    """The shape of the rectangle."""
    return tuple(stop - start for start, stop in region)


def cut(array: torch.Tensor, region: Region) -> torch.Tensor:
    """A view of the rectangle; the array itself where that is all of it."""
    if region == whole_region(array.shape):
        return array
    return array[tuple(slice(*bounds) for bounds in region)]


def unfolded_region(view: MatrixView, region: Region) -> Region:
    """The rectangle of the array once the view's layout has unfolded an axis.

    Raises:
      ValueError: it begins or ends within an entry of the first of the axes that the one becomes.
    """
    if view.folded is None:
        return region
    first, count = view.folded
    sizes = view.shape[first : first + count]
    entry = math.prod(sizes[1:])
    start, stop = region[first]
    if start % entry or stop % entry:
        raise ValueError(
            f"the entries {start} to {stop} of axis {first}, which the layout unfolds to {sizes}, begin"
            f" or end within one of its {sizes[0]} parts of {entry}"
        )
    inner = ((start // entry, stop // entry), *((0, size) for size in sizes[1:]))
    return (*region[:first], *inner, *region[first + 1 :])


def stack_indices(view: MatrixView, region: Region) -> tuple[list[int], list[int], list[int]]:
    """Which matrices, rows and columns of the view's whole stack the region holds, in ascending order.

    The stack of the region itself has them in the same order.
    """
    region = unfolded_region(view, region)
    sides = (view.batch_axes, view.row_axes, view.column_axes)
    batch, rows, columns = (
        _merged([view.shape[a] for a in s], [region[a] for a in s]) for s in sides
    )
    return batch, rows, columns


def _merged(sizes: Sequence[int], region: Sequence[tuple[int, int]]) -> list[int]:
    everything = np.arange(math.prod(sizes)).reshape(tuple(sizes))
    return everything[tuple(slice(*bounds) for bounds in region)].reshape(-1).tolist()


@dataclass(frozen=True)
class Part:
    """A rectangle of a weight.

    Whatever depends on the shape of a matrix depends on that of the whole weight, `view`; `local` says
    how the part itself becomes a stack.

    Attributes:
      view: where the matrices of the whole weight are.
      region: which rectangle of the weight this is.
    """

    view: MatrixView
    region: Region

    @cached_property
    def local(self) -> MatrixView:
        """The part as a stack of parts of matrices. An output block may have no neurons here."""
        if self.region == whole_region(self.view.shape):
            return self.view
        _, rows, columns = stack_indices(self.view, self.region)
        outputs = rows if self.view.output_is_rows else columns
        starts = [bisect_left(outputs, start) for start in accumulate(self.view.output_sizes)]
        sizes = tuple(stop - start for start, stop in pairwise([0, *starts]))
        shape = region_shape(unfolded_region(self.view, self.region))
        return replace(self.view, shape=shape, output_sizes=sizes)

    def multiplier(self, value: float | torch.Tensor) -> float | torch.Tensor:
        """A multiplier over the whole weight's batch axes, for the matrices of the part."""
        if not isinstance(value, torch.Tensor):
            return value
        region = unfolded_region(self.view, self.region)
        batch = tuple(slice(*region[axis]) for axis in self.view.batch_axes)
        return value.broadcast_to(self.view.batch_shape)[batch]
