"""Where a leaf's matrices are on a mesh, and where its state is."""

from dataclasses import replace
from typing import NamedTuple

from normuon_core.layout import MatrixView
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.mesh.cut import Cut, cut_of, movable_axes
from optax_normuon.mesh.specs import Axes, Specs, matrix_statistic_axes, unfolded_axes


class PlacedLeaf(NamedTuple):
    """A leaf's view on a mesh.

    Attributes:
      view: of the whole leaf. local: of one device's part, its blocks not cut.
      axes: how the part is cut out. cuts: the same for the matrices of each run of output blocks, None
        without a mesh.
    """

    view: MatrixView
    local: MatrixView
    axes: Axes
    cuts: tuple[Cut | None, ...]


def place_leaf(view: MatrixView, path: KeyPath, specs: Specs | None) -> PlacedLeaf:
    """Where a leaf's matrices are."""
    if specs is None:
        return PlacedLeaf(view, view, Axes(), (None,) * len(view.runs))
    axes = movable_axes(view, specs.leaves[path], specs)
    local = replace(view, shape=specs.local_shape(view.shape, unfolded_axes(view, axes)))
    cut = cut_of(view, axes, specs)
    if view.is_split:
        whole_sides = [((run.size, ()),) for run in view.runs]
        cuts = tuple(
            cut._replace(rows=side) if view.output_is_rows else cut._replace(columns=side)
            for side in whole_sides
        )
        return PlacedLeaf(view, local, axes, cuts)
    _, rows, columns = local.stack_shape
    local = replace(local, output_sizes=(rows if view.output_is_rows else columns,))
    return PlacedLeaf(view, local, axes, (cut,))


def state_axes(shape: tuple[int, ...], leaf: PlacedLeaf) -> Axes:
    """How an array of the state lies; the blocks of a fused projection are not cut."""
    return matrix_statistic_axes(shape, leaf.view, leaf.axes)
