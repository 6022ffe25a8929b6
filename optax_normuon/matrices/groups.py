"""The slices or the matrices of a leaf, each of which has a norm of its own."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from normuon_core.layout import MatrixView
from optax_normuon.leaves.arrays import Statistics
from optax_normuon.matrices.views import join_blocks, split_blocks
from optax_normuon.mesh.collectives import everywhere


class Groups(NamedTuple):
    """A leaf's entries in groups, with one number a group where a norm or a radius is meant.

    Attributes:
      total: sums an array like the leaf over each group. The sums have the leaf's rank, with size 1 on
        the axes that they are over; those of a fused projection's matrices stand side by side on the
        output axis.
      spread: brings such sums into a shape that broadcasts to the leaf.
      view: of the leaf, where a layout has made the groups.
    """

    total: Callable[[jax.Array], jax.Array]
    spread: Callable[[jax.Array], jax.Array]
    view: MatrixView | None = None

    def norm(self, x: jax.Array) -> jax.Array:
        """The norm of each group, in the shape of `spread`."""
        return self.spread(jnp.sqrt(self.total(jnp.square(x))))

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """The inner product of each group of x with that of y, in the shape of `spread`."""
        return self.spread(self.total(x * y))


def slices_along(axes: tuple[int, ...]) -> Groups:
    """The slices of any leaf along these axes, none negative."""
    return Groups(lambda x: jnp.sum(x, axes, keepdims=True), lambda sums: sums)


def slices_of(view: MatrixView) -> Groups:
    """The input weights of every output neuron: the slices along the reduction axis of the layout.

    They are the same in a fused projection, whose blocks are sets of outputs.
    """
    stored = {view.stored_axis(axis) for axis in view.input_axes}
    if view.folded is None or view.folded[0] not in stored:
        along = slices_along(tuple(sorted(stored)))
        return along._replace(view=view)
    # The stored axis holds other matrices beside the inputs.
    first, count = view.folded

    def total(x: jax.Array) -> jax.Array:
        sums = jnp.sum(x.reshape(view.shape), view.input_axes, keepdims=True)
        return sums.reshape(view.fold(sums.shape))

    def spread(sums: jax.Array) -> jax.Array:
        sums = sums.reshape(view.unfolded(sums.shape))
        inner = view.shape[first : first + count]
        sums = jnp.broadcast_to(sums, (*sums.shape[:first], *inner, *sums.shape[first + count :]))
        return sums.reshape(*sums.shape[:first], math.prod(inner), *sums.shape[first + count :])

    return Groups(total, spread, view)


def matrices_of(view: MatrixView) -> Groups:
    """The matrices of a leaf; every block of a fused projection is one."""
    return Groups(
        lambda x: join_blocks(sums_of_matrices(x, view), view),
        lambda sums: over_leaf(split_blocks(sums, view), view),
        view,
    )


def sums_of_matrices(x: jax.Array, view: MatrixView) -> list[Statistics]:
    """The sum over each matrix, for each run of output blocks (matrices, 1, 1).

    Args:
      x: like the leaf.
    """
    # A block may end within a device's part: let every device have all of these few numbers.
    sums = everywhere(slices_of(view).total(x))
    return [jnp.sum(block, axis=(-2, -1), keepdims=True) for block in split_blocks(sums, view)]


def over_leaf(factors: list[jax.Array], view: MatrixView) -> jax.Array:
    """One number for each matrix as an array that broadcasts to the leaf.

    Args:
      factors: for each run of output blocks what broadcasts to (matrices, 1, 1).
    """
    # One number for each output neuron broadcasts over the inputs, unless the inputs are folded.
    runs = []
    for run, factor in zip(view.runs, factors, strict=True):
        _, rows, columns = view.block_stack_shape(run.size)
        if view.folded is None:
            rows, columns = (rows, 1) if view.output_is_rows else (1, columns)
        runs.append(jnp.broadcast_to(factor, (view.matrices(run), rows, columns)))
    return join_blocks(runs, view)
