"""How the scales of an int8 array lie on a mesh: one for each block of its entries."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from jax.tree_util import GetAttrKey

from normuon_core.layout import MatrixView
from normuon_core.quantization import BLOCK, block_axis
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.mesh.matrix_sharding import movable_axes
from optax_normuon.mesh.specs import MeshAxes, Specs
from optax_normuon.mesh.statistics import unfolded_axes

SCALE = "momentum_scale"
"""The field of a state that holds scales, beside the int8 arrays that they belong to."""


class BlocksOnMesh(NamedTuple):
    """The blocks of a leaf on a mesh; without a mesh, of the whole leaf.

    Attributes:
      local: the view of what one device has.
      axis: of the view's shape, which the blocks lie along.
      length: of that axis in the whole leaf.
      axes, scale_axes: how the array lies while it is converted, and its scales.
      divided: the mesh axes that divide blocks; empty where every device has whole ones.
    """

    local: MatrixView
    axis: int
    length: int
    axes: MeshAxes
    scale_axes: MeshAxes
    divided: tuple[str, ...]


def blocks_on_mesh(view: MatrixView, path: KeyPath, specs: Specs | None) -> BlocksOnMesh:
    """How the blocks of one leaf lie."""
    axis = block_axis(view)
    length = view.shape[axis]
    if specs is None:
        return BlocksOnMesh(view, axis, length, MeshAxes(), MeshAxes(), ())
    # Blocks lie along the inputs: those of a fused projection may be divided through its outputs.
    unsplit = replace(view, output_sizes=(sum(view.output_sizes),))
    axes = movable_axes(unsplit, specs.leaves[path], specs)
    of_view = unfolded_axes(view, axes)
    scales = scale_axes(view, axes, specs.mesh.shape)
    return BlocksOnMesh(
        replace(view, shape=specs.local_shape(view.shape, of_view)),
        axis,
        length,
        axes,
        scales,
        of_view[axis] if scales != axes else (),
    )


def scale_axes(view: MatrixView, axes: MeshAxes, sizes: Mapping[str, int]) -> MeshAxes:
    """As the leaf's, but whole along its blocks where the mesh divides one of them.

    Args:
      view: of the whole leaf. axes: how the leaf lies.
      sizes: of the mesh axes; one that is missing is taken to divide blocks.
    """
    axis = block_axis(view)
    own = unfolded_axes(view, axes)[axis]
    known = all(name in sizes for name in own)
    if not own or (known and view.shape[axis] % (BLOCK * math.prod(sizes[n] for n in own)) == 0):
        return axes
    stored = view.stored_axis(axis)
    return MeshAxes((*axes[:stored], (), *axes[stored + 1 :]))


def is_scale(path: KeyPath) -> bool:
    """Whether an array of a state has the scales of another."""
    return GetAttrKey(SCALE) in path
