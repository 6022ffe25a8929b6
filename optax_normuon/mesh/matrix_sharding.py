"""How a mesh divides a leaf's matrices."""

from collections.abc import Sequence
from typing import NamedTuple

from normuon_core.layout import MatrixView
from normuon_core.placement import Spread
from optax_normuon.mesh.specs import MeshAxes, Specs
from optax_normuon.mesh.statistics import unfolded_axes

Factor = tuple[int, tuple[str, ...]]
"""One factor of a side's length: its size on one device, and the mesh axes that divide it.

A side of several axes, such as heads and their size, is the product of its factors, outermost first."""


class MatrixSharding(NamedTuple):
    """How the matrices of a leaf are divided over a mesh.

    Attributes:
      rows, columns: the two sides, each as its factors.
      batch: mesh axes that divide the batch; devices along these have different matrices.
    """

    rows: tuple[Factor, ...]
    columns: tuple[Factor, ...]
    batch: tuple[str, ...]

    @property
    def row_axes(self) -> tuple[str, ...]:
        return axes_of(self.rows)

    @property
    def column_axes(self) -> tuple[str, ...]:
        return axes_of(self.columns)


def axes_of(side: Sequence[Factor]) -> tuple[str, ...]:
    """The mesh axes that divide a side, outermost first."""
    return tuple(axis for _, axes in side for axis in axes)


def matrix_sharding(view: MatrixView, axes: MeshAxes, specs: Specs) -> MatrixSharding:
    """How the matrices of a leaf are divided whose axes are divided as `axes` says."""
    axes = unfolded_axes(view, axes)
    axes = MeshAxes(tuple(axis for axis in own if specs.mesh.shape[axis] > 1) for own in axes)
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
    return MatrixSharding(side(view.row_axes), side(view.column_axes), tuple(batch))


def movable_axes(view: MatrixView, axes: MeshAxes, specs: Specs) -> MeshAxes:
    """The axes over which a leaf is divided while its matrices are moved.

    These are its own where they leave whole what must stay whole: the blocks of a fused projection, and
    the entries of the first axis that an unfolded axis becomes. Mesh axes that divide one of these go to
    another axis that they divide evenly, preferably one of the inputs; if there is none, the leaf is
    gathered.
    """
    whole = {view.stored_axis(axis) for axis in view.output_axes} if view.is_split else set()
    if view.folded is not None:
        first, _ = view.folded
        if view.shape[first] % specs.parts(axes[first]):
            whole.add(first)
    misplaced = tuple(name for axis in sorted(whole) for name in axes[axis])
    if specs.parts(misplaced) == 1:
        return axes
    moved = [() if axis in whole else own for axis, own in enumerate(axes)]
    shape = view.stored_shape
    for axis in map(view.stored_axis, view.input_axes + view.output_axes):
        if axis not in whole and shape[axis] % specs.parts(moved[axis] + misplaced) == 0:
            moved[axis] += misplaced
            break
    return MeshAxes(moved)


def spread_of(
    sharding: MatrixSharding | None,
    specs: Specs | None,
    *,
    count: int,
    rows: int,
    columns: int,
    dtype: str,
) -> Spread:
    """What decides where a group of matrices is orthogonalized.

    Args:
      count: matrices of which a device has parts. rows, columns, dtype: of a whole matrix.
    """
    if sharding is None or specs is None:
        return Spread(count, rows, columns, dtype=dtype, on_mesh=specs is not None)
    used = {*sharding.row_axes, *sharding.column_axes, *sharding.batch}
    return Spread(
        count,
        rows,
        columns,
        row_parts=specs.parts(sharding.row_axes),
        column_parts=specs.parts(sharding.column_axes),
        replicas=specs.parts(tuple(axis for axis in specs.axes if axis not in used)),
        dtype=dtype,
        on_mesh=True,
    )
