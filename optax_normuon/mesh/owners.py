"""Where each matrix of a stack is orthogonalized on a mesh, and the way there and back.

Everything here runs within one `jax.shard_map` over the placed axes of the mesh, so that each
collective is written down once and none is left to the compiler's choice. A collective over several
mesh axes is a single one: a matrix reaches its owner in one hop.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from normuon_core.placement import Placement
from optax_normuon.mesh.collectives import all_to_all, with_bits
from optax_normuon.mesh.cut import Cut, Factor, axes_of
from optax_normuon.mesh.specs import Specs


class Sides(NamedTuple):
    """Which sides of a stack's arrays are there; a statistic has reduced the other one to 1."""

    rows: bool
    columns: bool


BOTH_SIDES = Sides(rows=True, columns=True)


@dataclass(frozen=True)
class Owners:
    """The way of one stack's matrices to their owners, and back.

    Padded with zeros to `each` for every owner, matrix (replica, part, i) of the stack belongs to the
    replica's part-th device.

    Attributes:
      cut: how the matrices lie. axes: the mesh axes that divide them, in the mesh's order.
      replicas: mesh axes whose devices hold the same parts and share the work.
      sizes: of the mesh's axes. each: matrices of one owner.
    """

    cut: Cut
    axes: tuple[str, ...]
    replicas: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    each: int

    @classmethod
    def of(cls, cut: Cut, placement: Placement, specs: Specs, *, count: int) -> "Owners":
        """For a stack of `count` matrices."""
        divided = {*cut.row_axes, *cut.column_axes}
        axes = tuple(axis for axis in specs.axes if axis in divided)
        replicas = tuple(axis for axis in specs.axes if axis not in divided | set(cut.batch))
        if placement.owners == specs.parts(axes):
            replicas = ()
        sizes = tuple((axis, specs.mesh.shape[axis]) for axis in specs.axes)
        return cls(cut, axes, replicas, sizes, math.ceil(count / placement.owners))

    def replicas_share(self, x):
        """Of the stack (count, ...) what this replica's owners are to have: (parts x each, ...)."""
        here = self._parts(self.axes) * self.each
        total = here * self._parts(self.replicas)
        x = jnp.pad(x, [(0, total - len(x)), *[(0, 0)] * (x.ndim - 1)])
        if not self.replicas:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.replicas) * here, here)

    def to_owners(self, x, sides: Sides = BOTH_SIDES):
        """From parts, (parts x each, rows, columns), this owner's whole matrices, `each` of them."""
        if not self.axes:
            return x
        factors = self._factors(sides)
        x = all_to_all(x.reshape(self._parts(self.axes), self.each, *x.shape[1:]), self.axes)
        x = x.reshape(*self._shape(self.axes), self.each, *[size for size, _ in factors])
        # What divides none of the array's sides has sent the same.
        unused = [axis for axis in self.axes if axis not in axes_of(factors)]
        x = x[tuple(0 if axis in unused else slice(None) for axis in self.axes)]
        used = [axis for axis in self.axes if axis not in unused]
        order = [len(used)]
        for place, (_, axes) in enumerate(factors):
            order += [*map(used.index, axes), len(used) + 1 + place]
        return x.transpose(order).reshape(self.each, *self._whole(sides))

    def to_holders(self, x, count: int):
        """The inverse of `replicas_share` and `to_owners`; count: of the stack."""
        if self.axes:
            x = all_to_all(self._parted(x, BOTH_SIDES, ()), self.axes)
            x = x.reshape(-1, *x.shape[2:])
        if self.replicas:
            x = with_bits(lambda x: jax.lax.all_gather(x, self.replicas, axis=0, tiled=True), x)
        return x[:count]

    def statistics_to_holders(self, arrays: Sequence[tuple[jax.Array, Sides]], count: int) -> list:
        """As `to_holders`, for arrays of one dtype that are small beside the matrices: in one message.

        Each is (each, rows or 1, columns or 1) with what sides it has. An all-to-all over the replicas
        as well: their own gathering would take less memory, and a message more.
        """
        axes = self.replicas + self.axes
        if not axes or not arrays:
            return [x[:count] for x, _ in arrays]
        parted = [self._parted(x, sides, self.replicas) for x, sides in arrays]
        ends = list(itertools.accumulate(math.prod(x.shape[2:]) for x in parted))
        flat = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in parted], axis=-1)
        received = all_to_all(flat, axes).reshape(-1, ends[-1])[:count]
        return [
            part.reshape(count, *x.shape[2:])
            for part, x in zip(jnp.split(received, ends[:-1], axis=-1), parted, strict=True)
        ]

    def statistic_to_owners(self, x, sides: Sides):
        """`replicas_share` and `to_owners` of an array that is small beside the matrices."""
        divided = axes_of(self._factors(sides))
        return self.to_owners(self.replicas_share(x), sides) if divided else self.own_rows(x)

    def own_rows(self, x):
        """Of (count, ...), which every device has whole, the rows of what this device owns."""
        x = self.replicas_share(x)
        if not self.axes:
            return x
        start = jax.lax.axis_index(self.axes) * self.each
        return jax.lax.dynamic_slice_in_dim(x, start, self.each)

    def gather_parts(self, x):
        """(count, rows, columns) of one device's part: all devices' parts as (count, rows, columns).

        In the order in which they make up a whole matrix, where a mesh axis divides a side in one piece.
        """
        if not self.axes:
            return x
        count, rows, columns = x.shape
        x = jax.lax.all_gather(x, self.axes).reshape(*self._shape(self.axes), *x.shape)
        place = {axis: index for index, axis in enumerate(self.axes)}
        first = len(self.axes)
        row_axes = [place[axis] for axis in self.cut.row_axes]
        column_axes = [place[axis] for axis in self.cut.column_axes]
        x = x.transpose(first, *row_axes, first + 1, *column_axes, first + 2)
        return x.reshape(
            count,
            rows * self._parts(self.cut.row_axes),
            columns * self._parts(self.cut.column_axes),
        )

    def _parted(self, x, sides: Sides, replicas: tuple[str, ...]):
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
        rows = math.prod(part[1 : 1 + len(self.cut.rows)]) if sides.rows else 1
        return x.reshape(self._parts(replicas + self.axes), self.each, rows, -1)

    def _factors(self, sides: Sides) -> tuple[Factor, ...]:
        rows = self.cut.rows if sides.rows else ((1, ()),)
        columns = self.cut.columns if sides.columns else ((1, ()),)
        return (*rows, *columns)

    def _whole(self, sides: Sides) -> tuple[int, int]:
        rows = self._size(self.cut.rows) if sides.rows else 1
        return rows, self._size(self.cut.columns) if sides.columns else 1

    def _size(self, side: Sequence[Factor]) -> int:
        return math.prod(size * self._parts(axes) for size, axes in side)

    def _shape(self, axes: Sequence[str]) -> tuple[int, ...]:
        return tuple(dict(self.sizes)[axis] for axis in axes)

    def _parts(self, axes: Sequence[str]) -> int:
        return math.prod(self._shape(axes))
