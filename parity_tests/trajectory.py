"""What a driver returns: one weight's way through a trace."""

import math
from typing import Any, NamedTuple

import numpy as np

from normuon_core import MatrixLayout, MatrixView


class Trajectory(NamedTuple):
    """What became of one weight.

    Attributes:
      params: (T + 1, *shape). momentum: (*shape), after the last step.
      second_moment: by step from 1, flat, block by block and matrix by matrix; empty where the recipe
        has none.
    """

    params: np.ndarray
    momentum: np.ndarray
    second_moment: dict[int, np.ndarray]


def block_by_block(kept: Any, layout: MatrixLayout, shape: tuple[int, ...]) -> np.ndarray:
    """A second moment as either framework keeps it, flat: block by block and matrix by matrix.

    Args:
      kept: the blocks' in one array, or one array for each. shape: of the weight.
    """
    if isinstance(kept, list | tuple):
        return np.concatenate([np.ravel(block) for block in kept])
    view = layout.on(shape)
    whole = np.asarray(kept).transpose(view.order)
    whole = whole.reshape(view.stack_shape[0], *_sides(whole.shape, view))
    size = whole.shape[view.output_stack_axis]
    sizes = view.output_sizes if size == sum(view.output_sizes) else (1,) * len(view.output_sizes)
    blocks = np.split(whole, np.cumsum(sizes)[:-1], axis=view.output_stack_axis)
    return np.concatenate([block.ravel() for block in blocks])


def _sides(ordered: tuple[int, ...], view: MatrixView) -> tuple[int, int]:
    first, last = len(view.batch_axes), len(view.batch_axes) + len(view.row_axes)
    return math.prod(ordered[first:last]), math.prod(ordered[last:])
