"""A leaf's matrices as stacks, and back."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from normuon_core.layout import MatrixView
from optax_normuon.leaves.arrays import Matrices, Statistics

LeafStatistic = jax.Array | tuple[jax.Array, ...]
"""A statistic as the state keeps it for a leaf: see `on_matrices` for when it is a tuple."""


def as_stack(x: jax.Array, view: MatrixView) -> Matrices:
    """A leaf, or a statistic of its rank, as (batch, rows, columns)."""
    ordered = x.reshape(view.unfolded(x.shape)).transpose(view.order)
    batch, rows = len(view.batch_axes), len(view.row_axes)
    sides = (
        ordered.shape[:batch],
        ordered.shape[batch : batch + rows],
        ordered.shape[batch + rows :],
    )
    return ordered.reshape([math.prod(side) for side in sides])


def as_leaf(values: Matrices | Statistics, view: MatrixView) -> jax.Array:
    """The inverse of `as_stack`."""
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    batch, rows, columns = values.shape
    leaf = values.reshape(view.statistic_shape((batch, rows, columns))).transpose(inverse)
    return leaf.reshape(view.fold(leaf.shape))


def statistic_leaf_shape(stack_shape: tuple[int, ...], view: MatrixView) -> tuple[int, ...]:
    """The shape that `as_leaf` gives to a statistic of shape (batch, rows or 1, columns or 1)."""
    return jax.eval_shape(
        lambda x: as_leaf(x, view), jax.ShapeDtypeStruct(stack_shape, jnp.float32)
    ).shape


def split_blocks(leaf: jax.Array, view: MatrixView) -> list[jax.Array]:
    """The output blocks of a leaf, or of a statistic of it: one (matrices, rows, columns) for each run.

    The blocks of one entry of the batch follow each other.
    """
    stack, axis = as_stack(leaf, view), view.output_stack_axis
    runs, start = [], 0
    for run, width in zip(view.runs, view.run_widths(stack.shape[axis]), strict=True):
        stop = start + run.blocks * width
        part = stack
        if len(view.runs) > 1:
            part = jax.lax.slice_in_dim(stack, start, stop, axis=axis)
        runs.append(_blocks_to_batch(part, run.blocks, axis))
        start = stop
    return runs


def join_blocks(runs: Sequence[jax.Array], view: MatrixView) -> jax.Array:
    """The inverse of `split_blocks`."""
    axis = view.output_stack_axis
    parts = [
        _blocks_from_batch(x, run.blocks, axis) for x, run in zip(runs, view.runs, strict=True)
    ]
    return as_leaf(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis), view)


def _blocks_to_batch(x: jax.Array, blocks: int, axis: int) -> jax.Array:
    """Takes `blocks` blocks along a side apart, into a batch `blocks` times as large."""
    if blocks == 1:
        return x
    batch, rows, columns = x.shape
    if axis == -2:
        return x.reshape(batch * blocks, rows // blocks, columns)
    apart = x.reshape(batch, rows, blocks, columns // blocks)
    return apart.swapaxes(1, 2).reshape(batch * blocks, rows, columns // blocks)


def _blocks_from_batch(x: jax.Array, blocks: int, axis: int) -> jax.Array:
    """The inverse of `_blocks_to_batch`."""
    if blocks == 1:
        return x
    matrices, rows, columns = x.shape
    if axis == -2:
        return x.reshape(matrices // blocks, blocks * rows, columns)
    apart = x.reshape(matrices // blocks, blocks, rows, columns)
    return apart.swapaxes(1, 2).reshape(matrices // blocks, rows, blocks * columns)


def split_statistic(kept: LeafStatistic, view: MatrixView) -> list[jax.Array]:
    """As `split_blocks`, of a statistic as the state keeps it."""
    if not isinstance(kept, tuple):
        return split_blocks(kept, view)
    blocks, runs = iter([as_stack(block, view) for block in kept]), []
    for run in view.runs:
        stack = jnp.stack([next(blocks) for _ in range(run.blocks)], axis=1)
        runs.append(stack.reshape(-1, *stack.shape[2:]))
    return runs


def join_statistic(
    runs: Sequence[jax.Array], view: MatrixView, *, like: LeafStatistic
) -> LeafStatistic:
    """The inverse of `split_statistic`: an array, or a tuple if `like` is one."""
    if not isinstance(like, tuple):
        return join_blocks(runs, view)
    return tuple(
        as_leaf(block, view)
        for x, run in zip(runs, view.runs, strict=True)
        for block in x.reshape(-1, run.blocks, *x.shape[1:]).swapaxes(0, 1)
    )
