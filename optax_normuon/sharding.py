"""Where each matrix of a stack is orthogonalized on a mesh, and the way there and back.

Everything here runs within one `jax.shard_map` over the placed axes of the mesh, so that each
collective is written down once and none is left to the compiler's choice. A collective over several
mesh axes is a single one: a matrix reaches its owner in one hop.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from normuon_core.layout import MatrixView
from normuon_core.placement import Placement, Spread
from optax_normuon.specs import Axes, Specs, explicit_part, partition_spec, unfolded_axes

Factor = tuple[int, tuple[str, ...]]
"""A stretch of a side, outermost first: its size on one device, and the mesh axes that divide it."""


class Cut(NamedTuple):
    """How the matrices of a leaf are divided over a mesh.

    Attributes:
      rows, columns: the two sides, each as its factors.
      batch: mesh axes that divide the batch: their devices have other matrices.
    """

    rows: tuple[Factor, ...]
    columns: tuple[Factor, ...]
    batch: tuple[str, ...]

    @property
    def row_axes(self) -> tuple[str, ...]:
        return _axes_of(self.rows)

    @property
    def column_axes(self) -> tuple[str, ...]:
        return _axes_of(self.columns)


def _axes_of(side: Sequence[Factor]) -> tuple[str, ...]:
    return tuple(axis for _, axes in side for axis in axes)


def cut_of(view: MatrixView, axes: Axes, specs: Specs) -> Cut:
    """How a leaf's matrices are divided, where its axes are divided as `axes` says."""
    axes = unfolded_axes(view, axes)
    axes = Axes(tuple(axis for axis in own if specs.mesh.shape[axis] > 1) for own in axes)
    local = specs.local_shape(view.shape, axes)

    def side(of_side: tuple[int, ...]) -> tuple[Factor, ...]:
        factors: list[Factor] = []
        for axis in of_side:
            size, own = local[axis], axes[axis]
            if factors and (not own or factors[-1][0] == 1):
                outer, outer_axes = factors.pop()
                size, own = outer * size, outer_axes + own
            factors.append((size, own))
        return tuple(factors)

    batch = sorted({name for axis in view.batch_axes for name in axes[axis]})
    return Cut(side(view.row_axes), side(view.column_axes), tuple(batch))


def movable_axes(view: MatrixView, axes: Axes, specs: Specs) -> Axes:
    """The axes over which a leaf is divided while its matrices are moved.

    Its own, unless they cut through the blocks of a fused projection, or an unfolded axis elsewhere than
    between the entries of the first axis that it becomes: these go to another axis that they divide, a
    reduction axis if there is one, or the leaf is gathered.
    """
    whole = {view.stored_axis(axis) for axis in view.output_axes} if view.is_split else set()
    if view.folded is not None:
        first, _ = view.folded
        if view.shape[first] % specs.parts(axes[first]):
            whole.add(first)
    cutting = tuple(name for axis in sorted(whole) for name in axes[axis])
    if specs.parts(cutting) == 1:
        return axes
    moved = [() if axis in whole else own for axis, own in enumerate(axes)]
    shape = view.stored_shape
    for axis in map(view.stored_axis, view.input_axes + view.output_axes):
        if axis not in whole and shape[axis] % specs.parts(moved[axis] + cutting) == 0:
            moved[axis] += cutting
            break
    return Axes(moved)


def spread_of(
    cut: Cut | None, specs: Specs | None, *, count: int, rows: int, columns: int
) -> Spread:
    """What a group's placement is decided from; count: matrices on one device."""
    if cut is None or specs is None:
        return Spread(count, rows, columns)
    used = {*cut.row_axes, *cut.column_axes, *cut.batch}
    return Spread(
        count,
        rows,
        columns,
        row_parts=specs.parts(cut.row_axes),
        column_parts=specs.parts(cut.column_axes),
        replicas=specs.parts(tuple(axis for axis in specs.axes if axis not in used)),
    )


def run_on_mesh(function: Callable, specs: Specs, arguments, in_axes, out_axes):
    """`function` on one device's parts of the arguments.

    Args:
      arguments: a tuple of trees. in_axes, out_axes: trees of `Axes`, like the arguments and the
        result.
    """

    def is_axes(node) -> bool:
        return isinstance(node, Axes)

    def as_specs(tree):
        return jax.tree.map(partition_spec, tree, is_leaf=is_axes)

    arguments = jax.tree.map(
        lambda axes, x: lie_as(x, axes, specs), in_axes, arguments, is_leaf=is_axes
    )
    return jax.shard_map(
        function,
        mesh=specs.mesh,
        in_specs=as_specs(in_axes),
        out_specs=as_specs(out_axes),
        axis_names=set(specs.axes),
        check_vma=False,
    )(*arguments)


def lie_as(x, axes: Axes, specs: Specs):
    """The array divided as `axes` says on the mesh's explicit axes; the others are the compiler's."""
    spec = partition_spec(explicit_part(axes, specs))
    own = jax.typeof(x).sharding
    if all(not entry for entry in spec) and (own.mesh.empty or all(not e for e in own.spec)):
        return x
    if _padded(own.spec, x.ndim) == _padded(spec, x.ndim):
        return x
    return jax.reshard(x, NamedSharding(specs.mesh, spec))


def _padded(spec, rank: int) -> tuple:
    return (*spec, *[None] * (rank - len(spec)))


@dataclass(frozen=True)
class Shards:
    """One device's parts of matrices that are divided over a mesh.

    Attributes:
      rows, columns: of a whole matrix.
      row_axes, column_axes: the mesh axes that divide each side.
      stay: whether the matrices are to be orthogonalized as they lie.
    """

    rows: int
    columns: int
    row_axes: tuple[str, ...]
    column_axes: tuple[str, ...]
    stay: bool

    def total(self, x, sides: tuple[int, ...]):
        """The sum over the devices of x, a sum of one device's part over `sides`, -2 and -1."""
        axes = (self.row_axes if -2 in sides else ()) + (self.column_axes if -1 in sides else ())
        return jax.lax.psum(x, axes) if axes else x

    @property
    def _short_side(self) -> tuple[int, tuple[str, ...]]:
        """Its axis in the stack, and the mesh axes that divide it."""
        return (-2, self.row_axes) if self.rows <= self.columns else (-1, self.column_axes)

    def along_the_long_side(self, x):
        """The parts (count, rows, columns), with the short side whole and the long one in more parts.

        Zeros fill up a long side that does not divide; the order of what is divided is another.
        """
        side, axes = self._short_side
        if not axes:
            return x
        parts, long = jax.lax.axis_size(axes), -3 - side
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[long] = (0, -x.shape[long] % parts)
        x = jnp.pad(x, padding)
        x = x.reshape(*_split(x.shape, long % 3, parts))
        x = _exchange(jnp.moveaxis(x, long % 3, 0), axes)
        # (source, count, ...): the source is the outer index of the short side.
        x = jnp.moveaxis(x, 0, side % 3)
        return x.reshape(_merged(x.shape, side % 3))

    def back(self, x, shape: tuple[int, ...]):
        """The inverse of `along_the_long_side`, for parts that had `shape`."""
        side, axes = self._short_side
        if not axes:
            return x
        parts, long = jax.lax.axis_size(axes), -3 - side
        x = x.reshape(*_split(x.shape, side % 3, parts))
        x = _exchange(jnp.moveaxis(x, side % 3, 0), axes)
        x = jnp.moveaxis(x, 0, long % 3)
        x = x.reshape(_merged(x.shape, long % 3))
        return jax.lax.slice(x, (0, 0, 0), shape)


def _split(shape: tuple[int, ...], axis: int, parts: int) -> tuple[int, ...]:
    return (*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])


def _merged(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])


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

    def share(self, x):
        """Of the stack (count, ...) what this replica's owners are to have: (parts x each, ...)."""
        here = self._parts(self.axes) * self.each
        total = here * self._parts(self.replicas)
        x = jnp.pad(x, [(0, total - len(x)), *[(0, 0)] * (x.ndim - 1)])
        if not self.replicas:
            return x
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.replicas) * here, here)

    def collect(self, x, sides: Sides = BOTH_SIDES):
        """From parts, (parts x each, rows, columns), this owner's whole matrices, `each` of them."""
        if not self.axes:
            return x
        factors = self._factors(sides)
        x = _exchange(x.reshape(self._parts(self.axes), self.each, *x.shape[1:]), self.axes)
        x = x.reshape(*self._shape(self.axes), self.each, *[size for size, _ in factors])
        # What divides none of the array's sides has sent the same.
        unused = [axis for axis in self.axes if axis not in _axes_of(factors)]
        x = x[tuple(0 if axis in unused else slice(None) for axis in self.axes)]
        used = [axis for axis in self.axes if axis not in unused]
        order = [len(used)]
        for place, (_, axes) in enumerate(factors):
            order += [*map(used.index, axes), len(used) + 1 + place]
        return x.transpose(order).reshape(self.each, *self._whole(sides))

    def hand_back(self, x, count: int):
        """The inverse of `share` and `collect`; count: of the stack."""
        if self.axes:
            x = _exchange(self._parted(x, BOTH_SIDES, ()), self.axes)
            x = x.reshape(-1, *x.shape[2:])
        if self.replicas:
            x = _with_bits(lambda x: jax.lax.all_gather(x, self.replicas, axis=0, tiled=True), x)
        return x[:count]

    def hand_back_statistics(self, arrays: Sequence[tuple[jax.Array, Sides]], count: int) -> list:
        """As `hand_back` for arrays of one dtype that are small beside the matrices, all in one message.

        Each is (each, rows or 1, columns or 1) with what sides it has. An all-to-all over the replicas
        as well: their own gathering would take less memory, and a message more.
        """
        axes = self.replicas + self.axes
        if not axes or not arrays:
            return [x[:count] for x, _ in arrays]
        parted = [self._parted(x, sides, self.replicas) for x, sides in arrays]
        ends = list(itertools.accumulate(math.prod(x.shape[2:]) for x in parted))
        flat = jnp.concatenate([x.reshape(*x.shape[:2], -1) for x in parted], axis=-1)
        received = _exchange(flat, axes).reshape(-1, ends[-1])[:count]
        return [
            part.reshape(count, *x.shape[2:])
            for part, x in zip(jnp.split(received, ends[:-1], axis=-1), parted, strict=True)
        ]

    def collect_statistic(self, x, sides: Sides):
        """`share` and `collect` of an array that is small beside the matrices."""
        divided = _axes_of(self._factors(sides))
        return self.collect(self.share(x), sides) if divided else self.own_rows(x)

    def own_rows(self, x):
        """Of (count, ...), which every device has whole, the rows of what this device owns."""
        x = self.share(x)
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
        divided, shape, place, local = _axes_of(factors), [self.each], {}, []
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


def _exchange(x, axes: tuple[str, ...]):
    """All-to-all: (destinations, ...) to (sources, ...)."""
    return _with_bits(lambda x: jax.lax.all_to_all(x, axes, 0, 0), x)


def _with_bits(function, x):
    """A collective that moves numbers without reading them: as integers where they are half precision,
    which compilers for CPUs would widen."""
    if x.dtype.itemsize != 2:
        return function(x)
    moved = function(jax.lax.bitcast_convert_type(x, jnp.uint16))
    return jax.lax.bitcast_convert_type(moved, x.dtype)
