"""Matrices that stay divided, and the sums over their parts."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from optax_normuon.leaves.arrays import Matrices
from optax_normuon.mesh.collectives import all_to_all


@dataclass(frozen=True)
class Shards:
    """One device's parts of matrices that are divided over a mesh.

    Attributes:
      rows, columns: of a whole matrix.
      row_axes, column_axes: the mesh axes that divide each side.
      stay: whether the matrices stay divided while they are orthogonalized.
    """

    rows: int
    columns: int
    row_axes: tuple[str, ...]
    column_axes: tuple[str, ...]
    stay: bool

    def total(self, x: jax.Array, sides: tuple[int, ...]) -> jax.Array:
        """The sum over sides (-2, -1 or both) of whole matrices, from the sum x of this device's."""
        axes = (self.row_axes if -2 in sides else ()) + (self.column_axes if -1 in sides else ())
        return jax.lax.psum(x, axes) if axes else x

    @property
    def _short_side(self) -> tuple[int, tuple[str, ...]]:
        """(its axis in the stack, the mesh axes that divide it)."""
        return (-2, self.row_axes) if self.rows <= self.columns else (-1, self.column_axes)

    def along_the_long_side(self, x: Matrices) -> Matrices:
        """Moves the division to the long side: the short side of the result is whole.

        A long side that does not divide evenly is filled up with zeros, and its entries lie in another
        order: the Gram matrix does not depend on either.
        """
        side, axes = self._short_side
        if not axes:
            return x
        parts, long = jax.lax.axis_size(axes), -3 - side
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[long] = (0, -x.shape[long] % parts)
        x = jnp.pad(x, padding)
        x = x.reshape(*_split(x.shape, long % 3, parts))
        x = all_to_all(jnp.moveaxis(x, long % 3, 0), axes)
        # (source, count, ...): the source is the outer index of the short side.
        x = jnp.moveaxis(x, 0, side % 3)
        return x.reshape(_merged(x.shape, side % 3))

    def back(self, x: Matrices, shape: tuple[int, ...]) -> Matrices:
        """The inverse of `along_the_long_side`, for parts of this shape."""
        side, axes = self._short_side
        if not axes:
            return x
        parts, long = jax.lax.axis_size(axes), -3 - side
        x = x.reshape(*_split(x.shape, side % 3, parts))
        x = all_to_all(jnp.moveaxis(x, side % 3, 0), axes)
        x = jnp.moveaxis(x, 0, long % 3)
        x = x.reshape(_merged(x.shape, long % 3))
        return jax.lax.slice(x, (0, 0, 0), shape)


def _split(shape: tuple[int, ...], axis: int, parts: int) -> tuple[int, ...]:
    return (*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])


def _merged(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
