"""How a mesh cuts a leaf's matrices."""

from collections.abc import Sequence
from typing import NamedTuple

from normuon_core.layout import MatrixView
from normuon_core.placement import Spread
from optax_normuon.mesh.specs import Axes, Specs, unfolded_axes

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
        return axes_of(self.rows)

    @property
    def column_axes(self) -> tuple[str, ...]:
        return axes_of(self.columns)


def axes_of(side: Sequence[Factor]) -> tuple[str, ...]:
    """The mesh axes that divide a side, outermost first."""
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
    cut: Cut | None, specs: Specs | None, *, count: int, rows: int, columns: int, dtype: str
) -> Spread:
    """What a group's placement is decided from; count: matrices on one device."""
    if cut is None or specs is None:
        return Spread(count, rows, columns, dtype=dtype, on_mesh=specs is not None)
    used = {*cut.row_axes, *cut.column_axes, *cut.batch}
    return Spread(
        count,
        rows,
        columns,
        row_parts=specs.parts(cut.row_axes),
        column_parts=specs.parts(cut.column_axes),
        replicas=specs.parts(tuple(axis for axis in specs.axes if axis not in used)),
        dtype=dtype,
        on_mesh=True,
    )
