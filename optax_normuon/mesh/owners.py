"""Which device owns each matrix of a stack on a mesh, and how the matrix travels there and back.

Everything here runs within one `jax.shard_map` over the mesh axes that arrays are divided over, so that
each collective is written down once and none is left to the compiler's choice. A collective over several
mesh axes is a single one: a matrix reaches its owner in one hop.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from normuon_core.deal import Deal
from optax_normuon.leaves.arrays import Matrices, Statistics
from optax_normuon.mesh.collectives import all_to_all, with_bits
from optax_normuon.mesh.matrix_sharding import Factor, MatrixSharding, axes_of
from optax_normuon.mesh.specs import Specs

Result = TypeVar("Result")


class Sides(NamedTuple):
    """Which sides an array of a stack has; a side that a statistic has reduced has size 1."""

    rows: bool
    columns: bool


BOTH_SIDES = Sides(rows=True, columns=True)


@dataclass(frozen=True)
class Owners:
    """How one stack's matrices travel to their owners, and back.

    The stack is filled up with zeros, as `deal` says, until every owner has `each` matrices. Seen as
    (replica, part, each), its matrix (r, p, i) belongs to the p-th of the devices that make up replica
    r.

    Attributes:
      sharding: how the matrices are divided.
      axes: the mesh axes that divide them, in the mesh's order.
      replicas: mesh axes whose devices hold the same parts and share the work.
      sizes: (name, size) of every mesh axis that arrays are divided over.
      deal: which matrices each owner has.
    """

    sharding: MatrixSharding
    axes: tuple[str, ...]
    replicas: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    deal: Deal

    @classmethod
    def of(cls, sharding: MatrixSharding, specs: Specs, deal: Deal) -> "Owners":
        """For a stack of matrices that are dealt to so many owners."""
        divided = {*sharding.row_axes, *sharding.column_axes}
        axes = tuple(axis for axis in specs.axes if axis in divided)
        replicas = tuple(axis for axis in specs.axes if axis not in divided | set(sharding.batch))
        if deal.owners == specs.parts(axes):
            replicas = ()
        sizes = tuple((axis, specs.mesh.shape[axis]) for axis in specs.axes)
        return cls(sharding, axes, replicas, sizes, deal)

    @property
    def each(self) -> int:
        """Matrices of one owner, the zeros that fill up its share included."""
        return self.deal.each

    def numbers(self) -> np.ndarray:
        """The owner that each device of the mesh is, by its place on the axes of `sizes`, flattened."""
        place = np.indices(self._shape([axis for axis, _ in self.sizes]))
        of_axis = {axis: place[index] for index, (axis, _) in enumerate(self.sizes)}
        number = np.zeros(place.shape[1:], int)
        for axis in self.replicas + self.axes:
            number = number * dict(self.sizes)[axis] + of_axis[axis]
        return number.reshape(-1)

    def on_own(self, function: Callable[..., Result], *arrays: Any) -> Result:
        """`function` of the matrices that this device really has; what it lacks is zero in the result.

        Args:
          function: from trees of (matrices, ...) to such a tree, without collectives.
          *arrays: of `each` matrices, zeros in the place of what is lacking.
        """
        if self.deal.is_even or not self.deal.leaves_out:
            return function(*arrays)

        def of_one_less(*arrays: Any) -> Result:
            if self.each == 1:
                made = jax.eval_shape(function, *arrays)
                return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)
            made = function(*jax.tree.map(lambda x: x[:-1], arrays))
            return jax.tree.map(lambda x: jnp.pad(x, [(0, 1), *[(0, 0)] * (x.ndim - 1)]), made)

        owner = jax.lax.axis_index(self.replicas + self.axes)
        return jax.lax.cond(self.deal.is_larger(owner), function, of_one_less, *arrays)

    def replicas_share(self, x: jax.Array) -> jax.Array:
        """What this replica's owners work on: (parts x each, ...) of the stack (count, ...)."""
        x = self._dealt(x)
        if not self.replicas:
            return x
        here = self._parts(self.axes) * self.each
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.replicas) * here, here)

    def _dealt(self, x: jax.Array) -> jax.Array:
        """(owners x each, ...) of the stack (count, ...), with zeros where an owner lacks a matrix."""
        deal, each = self.deal, self.each
        if deal.is_even:
            return x
        rest = x[deal.larger * each :].reshape(deal.owners - deal.larger, each - 1, *x.shape[1:])
        rest = jnp.pad(rest, [(0, 0), (0, 1), *[(0, 0)] * (x.ndim - 1)])
        ring = jnp.concatenate([x[: deal.larger * each], rest.reshape(-1, *x.shape[1:])])
        return jnp.roll(ring, deal.first * each, axis=0)

    def _in_order(self, x: jax.Array) -> jax.Array:
        """The inverse of `_dealt`."""
        deal, each = self.deal, self.each
        if deal.is_even:
            return x
        ring = jnp.roll(x, -deal.first * each, axis=0)
        rest = ring[deal.larger * each :].reshape(-1, each, *x.shape[1:])[:, : each - 1]
        return jnp.concatenate([ring[: deal.larger * each], rest.reshape(-1, *x.shape[1:])])

    def to_owners(self, x: jax.Array, sides: Sides = BOTH_SIDES) -> jax.Array:
        """This owner's `each` whole matrices, from its parts (parts x each, rows, columns) of all."""
        if not self.axes:
            return x
        factors = self._factors(sides)
        x = all_to_all(x.reshape(self._parts(self.axes), self.each, *x.shape[1:]), self.axes)
        x = x.reshape(*self._shape(self.axes), self.each, *[size for size, _ in factors])
        # Devices along an axis that divides no side of the array have sent the same: keep one.
        unused = [axis for axis in self.axes if axis not in axes_of(factors)]
        x = x[tuple(0 if axis in unused else slice(None) for axis in self.axes)]
        used = [axis for axis in self.axes if axis not in unused]
        order = [len(used)]
        for place, (_, axes) in enumerate(factors):
            order += [*map(used.index, axes), len(used) + 1 + place]
        return x.transpose(order).reshape(self.each, *self._whole(sides))

    def to_holders(self, x: Matrices) -> Matrices:
        """The inverse of `replicas_share` and `to_owners`."""
        if self.axes:
            x = all_to_all(self._parted(x, BOTH_SIDES, ()), self.axes)
            x = x.reshape(-1, *x.shape[2:])
        if self.replicas:
            x = with_bits(lambda x: jax.lax.all_gather(x, self.replicas, axis=0, tiled=True), x)
        return self._in_order(x)

    def statistics_to_holders(self, arrays: Sequence[tuple[Statistics, Sides]]) -> list[Statistics]:
        """As `to_holders`, for several arrays that are small beside the matrices: one message for all.

        The all-to-all goes over the replicas as well. To gather among replicas by itself would take less
        memory, but a second message.

        Args:
          arrays: (each, rows or 1, columns or 1) of one dtype, with the sides that each has.
        """
        axes = self.replicas + self.axes
        if not axes or not arrays:
            return [self._in_order(x) for x, _ in arrays]
        parted = [self._parted(x, sides, self.replicas) for x, sides in arrays]
        ends = list(itertools.accumulate(math.prod(x.shape[2:]) for x in parted))
        flat = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in parted], axis=-1)
        received = self._in_order(all_to_all(flat, axes).reshape(-1, ends[-1]))
        return [
            part.reshape(len(received), *x.shape[2:])
            for part, x in zip(jnp.split(received, ends[:-1], axis=-1), parted, strict=True)
        ]

    def statistic_to_owners(self, x: Statistics, sides: Sides) -> Statistics:
        """`replicas_share` and `to_owners` of an array that is small beside the matrices."""
        divided = axes_of(self._factors(sides))
        return self.to_owners(self.replicas_share(x), sides) if divided else self.own_rows(x)

    def own_rows(self, x: jax.Array) -> jax.Array:
        """The rows of what this device owns, of (count, ...), which every device has whole."""
        x = self.replicas_share(x)
        if not self.axes:
            return x
        start = jax.lax.axis_index(self.axes) * self.each
        return jax.lax.dynamic_slice_in_dim(x, start, self.each)

    def gather_parts(self, x: jax.Array) -> jax.Array:
        """All devices' parts side by side, from this device's part, (count, rows, columns).

        They stand in the order in which they make up a whole matrix, if each side has a single `Factor`.
        """
        if not self.axes:
            return x
        count, rows, columns = x.shape
        x = jax.lax.all_gather(x, self.axes).reshape(*self._shape(self.axes), *x.shape)
        place = {axis: index for index, axis in enumerate(self.axes)}
        first = len(self.axes)
        row_axes = [place[axis] for axis in self.sharding.row_axes]
        column_axes = [place[axis] for axis in self.sharding.column_axes]
        x = x.transpose(first, *row_axes, first + 1, *column_axes, first + 2)
        return x.reshape(
            count,
            rows * self._parts(self.sharding.row_axes),
            columns * self._parts(self.sharding.column_axes),
        )

    def _parted(self, x: jax.Array, sides: Sides, replicas: tuple[str, ...]) -> jax.Array:
        """Whole matrices as (destinations, each, rows of a part, columns of a part)."""
        factors = self._factors(sides)
        divided, shape, place, local = axes_of(factors), [self.each], {}, []
        for size, axes in factors:
            for axis in axes:
                place[axis] = len(shape)
                shape.append(dict(self.sizes)[axis])
            local.append(len(shape))
            shape.append(size)
        used = [axis for axis in self.axes if axis in divided]
        x = x.reshape(shape).transpose([*(place[axis] for axis in used), 0, *local])
        part = x.shape[len(used) :]
        # A statistic goes to every device along the axes that do not divide it.
        x = x.reshape(*(dict(self.sizes)[a] if a in used else 1 for a in self.axes), *part)
        x = jnp.broadcast_to(x, (*self._shape(replicas), *self._shape(self.axes), *part))
        rows = math.prod(part[1 : 1 + len(self.sharding.rows)]) if sides.rows else 1
        return x.reshape(self._parts(replicas + self.axes), self.each, rows, -1)

    def _factors(self, sides: Sides) -> tuple[Factor, ...]:
        rows = self.sharding.rows if sides.rows else ((1, ()),)
        columns = self.sharding.columns if sides.columns else ((1, ()),)
        return (*rows, *columns)

    def _whole(self, sides: Sides) -> tuple[int, int]:
        rows = self._size(self.sharding.rows) if sides.rows else 1
        return rows, self._size(self.sharding.columns) if sides.columns else 1

    def _size(self, side: Sequence[Factor]) -> int:
        return math.prod(size * self._parts(axes) for size, axes in side)

    def _shape(self, axes: Sequence[str]) -> tuple[int, ...]:
        return tuple(dict(self.sizes)[axis] for axis in axes)

    def _parts(self, axes: Sequence[str]) -> int:
        return math.prod(self._shape(axes))
