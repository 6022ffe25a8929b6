"""A leaf's matrices as stacks, and back."""

import math

import jax
import jax.numpy as jnp

from normuon_core.layout import MatrixView


def as_stack(x, view: MatrixView):
    """A leaf, or a statistic of its rank, as (batch, rows, columns)."""
    ordered = x.reshape(view.unfolded(x.shape)).transpose(view.order)
    batch, rows = len(view.batch_axes), len(view.row_axes)
    sides = (
        ordered.shape[:batch],
        ordered.shape[batch : batch + rows],
        ordered.shape[batch + rows :],
    )
    return ordered.reshape([math.prod(side) for side in sides])


def as_leaf(values, view: MatrixView):
    """The inverse of `as_stack`."""
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    leaf = values.reshape(view.statistic_shape(values.shape)).transpose(inverse)
    return leaf.reshape(view.fold(leaf.shape))


def statistic_leaf_shape(stack_shape: tuple[int, ...], view: MatrixView) -> tuple[int, ...]:
    """What `as_leaf` makes of (batch, rows or 1, columns or 1)."""
    return jax.eval_shape(
        lambda x: as_leaf(x, view), jax.ShapeDtypeStruct(stack_shape, jnp.float32)
    ).shape


def split_blocks(leaf, view: MatrixView) -> list:
    """The output blocks of a leaf, or of a statistic of it: each run's, (matrices, rows, columns).

    A run's blocks stand beside each other within an entry of the batch.
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


def join_blocks(runs: list, view: MatrixView):
    """The inverse of `split_blocks`."""
    axis = view.output_stack_axis
    parts = [
        _blocks_from_batch(x, run.blocks, axis) for x, run in zip(runs, view.runs, strict=True)
    ]
    return as_leaf(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis), view)


def _blocks_to_batch(x, blocks: int, axis: int):
    """(batch, rows, columns) whose side `axis` is so many blocks: (batch blocks, rows, columns)."""
    if blocks == 1:
        return x
    batch, rows, columns = x.shape
    if axis == -2:
        return x.reshape(batch * blocks, rows // blocks, columns)
    apart = x.reshape(batch, rows, blocks, columns // blocks)
    return apart.swapaxes(1, 2).reshape(batch * blocks, rows, columns // blocks)


def _blocks_from_batch(x, blocks: int, axis: int):
    if blocks == 1:
        return x
    matrices, rows, columns = x.shape
    if axis == -2:
        return x.reshape(matrices // blocks, blocks * rows, columns)
    apart = x.reshape(matrices // blocks, blocks, rows, columns)
    return apart.swapaxes(1, 2).reshape(matrices // blocks, rows, blocks * columns)


def split_statistic(kept, view: MatrixView) -> list:
    """A statistic as the state keeps it, run by run: as `split_blocks`."""
    if not isinstance(kept, tuple):
        return split_blocks(kept, view)
    blocks, runs = iter([as_stack(block, view) for block in kept]), []
    for run in view.runs:
        stack = jnp.stack([next(blocks) for _ in range(run.blocks)], axis=1)
        runs.append(stack.reshape(-1, *stack.shape[2:]))
    return runs


def join_statistic(runs: list, view: MatrixView, *, like):
    """The inverse of `split_statistic`, kept as `like` is."""
    if not isinstance(like, tuple):
        return join_blocks(runs, view)
    return tuple(
        as_leaf(block, view)
        for x, run in zip(runs, view.runs, strict=True)
        for block in x.reshape(-1, run.blocks, *x.shape[1:]).swapaxes(0, 1)
    )
