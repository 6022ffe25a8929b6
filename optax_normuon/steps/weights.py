"""One weight as the kernels take it, and what a step makes of it."""

from dataclasses import replace
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from normuon_core.kernels.geometry import block_geometries
from normuon_core.kernels.pieces import Block, Leaf
from normuon_core.layout import MatrixView
from normuon_core.recipes import Recipe
from optax_normuon.kernels.polar import output_of
from optax_normuon.leaves.arrays import Statistics
from optax_normuon.matrices.views import as_leaf, as_stack, join_statistic, split_statistic
from optax_normuon.mesh.leaf_on_mesh import LeafOnMesh, state_axes
from optax_normuon.mesh.specs import MeshAxes
from optax_normuon.mesh.statistics import unfolded_axes

Entry = TypeVar("Entry")
"""An array, or how it lies."""


class Weight(NamedTuple, Generic[Entry]):
    """One weight's arrays in a step, or how each of them lies on the mesh.

    Attributes:
      gradient, parameter, momentum: of the weight's shape.
      second_moment: as the state keeps it, see `on_matrices`; empty without stage 3.
      scales, decays: one array for each run of output blocks, over the batch axes and then the blocks,
        float32.
    """

    gradient: Entry
    parameter: Entry
    momentum: Entry
    second_moment: Entry | tuple[Entry, ...]
    scales: tuple[Entry, ...]
    decays: tuple[Entry, ...]


class Stepped(NamedTuple, Generic[Entry]):
    """What a step makes of a `Weight`, or how it lies.

    Attributes:
      result: the update, or the new parameter.
    """

    result: Entry
    momentum: Entry
    second_moment: Entry | tuple[Entry, ...]


def with_leading_batch(view: MatrixView, size: int) -> MatrixView:
    """The view of `size` such arrays stacked along a new first axis."""

    def moved(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(axis + 1 for axis in axes)

    return replace(
        view,
        shape=(size, *view.shape),
        batch_axes=(0, *moved(view.batch_axes)),
        row_axes=moved(view.row_axes),
        column_axes=moved(view.column_axes),
        folded=None if view.folded is None else (view.folded[0] + 1, view.folded[1]),
    )


class LaidOut:
    """A weight as the kernels take it; `stepped` brings it back.

    Attributes:
      leaf: its arrays. blocks: its runs of output blocks.
    """

    def __init__(
        self,
        on_mesh: LeafOnMesh,
        weight: Weight[jax.Array],
        rates: jax.Array,
        recipe: Recipe,
        *,
        adds: bool,
    ):
        view = on_mesh.local
        self.view, self.weight, self.recipe = view, weight, recipe
        # Where a side's axes do not lie in one piece, no stride steps along it: the array is copied.
        self.in_place = view.strides() is not None
        laid_out = view if self.in_place else view.stacked
        gradient, parameter, momentum = (
            x if self.in_place else as_stack(x, view)
            for x in (weight.gradient, weight.parameter, weight.momentum)
        )
        moments = [None] * len(view.runs)
        if recipe.neuron_norm is not None:
            moments = [_flat(x) for x in split_statistic(weight.second_moment, view)]
        self.leaf = Leaf(
            gradient=gradient,
            parameter=parameter,
            momentum=momentum,
            rates=rates,
            momentum_output=output_of(momentum),
            parameter_output=output_of(parameter),
            adds=adds,
        )
        rule = recipe.neuron_norm
        geometries = block_geometries(
            laid_out,
            whole=on_mesh.view,
            axis="output" if rule is None else rule.axis,
            rates=len(rates),
            equilibrated=recipe.row_equilibration is not None,
        )
        self.blocks = [
            Block(
                self.leaf,
                geometry,
                view.matrices(run),
                moment,
                scale.reshape(-1),
                decay.reshape(-1),
            )
            for run, geometry, moment, scale, decay in zip(
                view.runs, geometries, moments, weight.scales, weight.decays, strict=True
            )
        ]

    def stepped(self) -> Stepped[jax.Array]:
        """What the step has made of the weight."""
        result, momentum = (
            x if self.in_place else as_leaf(x, self.view)
            for x in (self.leaf.result, self.leaf.momentum)
        )
        kept = self.weight.second_moment
        if self.recipe.neuron_norm is not None:
            moments = [
                _moment_of(block).reshape(old.shape)
                for block, old in zip(self.blocks, split_statistic(kept, self.view), strict=True)
            ]
            kept = join_statistic(moments, self.view, like=kept)
        return Stepped(result, momentum, kept)


def _flat(moment: Statistics) -> jax.Array:
    """The same as (matrices, neurons)."""
    return moment.reshape(len(moment), -1)


def _moment_of(block: Block) -> jax.Array:
    return jnp.concatenate(block.new_moments) if block.new_moments else block.second_moment


def mesh_axes_of(leaf: LeafOnMesh, weight: Weight[jax.Array]) -> Weight[MeshAxes]:
    """How a weight's arrays lie on the mesh."""
    own = leaf.axes
    of_view = unfolded_axes(leaf.view, own)
    batch = MeshAxes((*(of_view[axis] for axis in leaf.view.batch_axes), ()))
    moment = jax.tree.map(lambda x: state_axes(x.shape, leaf), weight.second_moment)
    runs = len(leaf.view.runs)
    return Weight(own, own, own, moment, (batch,) * runs, (batch,) * runs)
