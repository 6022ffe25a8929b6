"""Which entries of an int8 array share a scale: blocks along the inputs of one neuron of one matrix.

A block never holds entries of two matrices, so that what is not finite in one stays in it, and a layout
decides alone which entries share a block: a weight that PyTorch stores (out, in) and Flax (in, out) has
the same blocks.
"""

from normuon_core.layout import MatrixView

BLOCK = 32
"""Entries of a block. One scale of two bytes for each is 1.0625 bytes an entry."""

LARGEST = 127
"""The largest int8 that is used: the range is symmetric, and -m is stored as minus what m is."""

SMALLEST_SCALE = 2.0**-126
"""The smallest normal number of float32 and bfloat16: a smaller divisor may be taken for zero."""


def block_axis(view: MatrixView) -> int:
    """The axis of `view.shape` that blocks lie along: the longest of the inputs, the first of equals.

    Args:
      view: of the whole weight; a part of one may have another longest axis.
    """
    return max(view.input_axes, key=lambda axis: view.shape[axis])


def blocks(length: int) -> int:
    """How many blocks an axis has; the last may have fewer entries."""
    return -(-length // BLOCK)


def scale_shape(view: MatrixView) -> tuple[int, ...]:
    """The shape of a weight's scales: its stored shape, with an entry for each block on their axis."""
    axis, shape = block_axis(view), view.shape
    return view.fold((*shape[:axis], blocks(shape[axis]), *shape[axis + 1 :]))
