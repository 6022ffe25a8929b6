"""How a leaf's matrices and its state lie on a mesh."""

from dataclasses import replace
from typing import NamedTuple

from normuon_core.layout import MatrixView
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.mesh.matrix_sharding import MatrixSharding, matrix_sharding, movable_axes
from optax_normuon.mesh.specs import MeshAxes, Specs
from optax_normuon.mesh.statistics import matrix_statistic_axes, unfolded_axes


class LeafOnMesh(NamedTuple):
    """A leaf's view on a mesh; without a mesh, the leaf is whole.

    Attributes:
      view: of the whole leaf.
      local: of one device's part, which divides no output block.
      axes: how the leaf is divided while its matrices are moved, see `movable_axes`.
      shardings: how the matrices of each run of output blocks are divided; None without a mesh.
    """

    view: MatrixView
    local: MatrixView
    axes: MeshAxes
    shardings: tuple[MatrixSharding | None, ...]


def leaf_on_mesh(view: MatrixView, path: KeyPath, specs: Specs | None) -> LeafOnMesh:
    """How the matrices of one leaf lie."""
    if specs is None:
        return LeafOnMesh(view, view, MeshAxes(), (None,) * len(view.runs))
    axes = movable_axes(view, specs.leaves[path], specs)
    local = replace(view, shape=specs.local_shape(view.shape, unfolded_axes(view, axes)))
    sharding = matrix_sharding(view, axes, specs)
    if view.is_split:
        whole_sides = [((run.size, ()),) for run in view.runs]
        shardings = tuple(
            sharding._replace(rows=side) if view.output_is_rows else sharding._replace(columns=side)
            for side in whole_sides
        )
        return LeafOnMesh(view, local, axes, shardings)
    _, rows, columns = local.stack_shape
    local = replace(local, output_sizes=(rows if view.output_is_rows else columns,))
    return LeafOnMesh(view, local, axes, (sharding,))


def state_axes(shape: tuple[int, ...], leaf: LeafOnMesh) -> MeshAxes:
    """How an array of the state lies; the blocks of a fused projection are whole on every device."""
    return matrix_statistic_axes(shape, leaf.view, leaf.axes)
