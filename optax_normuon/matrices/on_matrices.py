"""Same-shape matrices of many leaves as bounded stacks, and back.

Layouts, splits, grouping, memory and placement on a mesh meet here; a stage on matrices does not know
where they came from.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from normuon_core.layout import MatrixView
from normuon_core.placement import Placement, Spread
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.matrices.plan import Alike, Piece, Stack, plan, stack_ceiling
from optax_normuon.matrices.stack import MatrixStack, MatrixStage
from optax_normuon.matrices.views import (
    join_blocks,
    join_statistic,
    split_blocks,
    split_statistic,
    statistic_leaf_shape,
)
from optax_normuon.mesh.collectives import lie_as, run_on_mesh
from optax_normuon.mesh.owners import Owners, Sides
from optax_normuon.mesh.placed_leaf import PlacedLeaf, place_leaf, state_axes
from optax_normuon.mesh.shards import Shards
from optax_normuon.mesh.specs import Specs, SpecTree, note_views, resolve_specs, zeros_beside


def on_matrices(
    inner: MatrixStage,
    *,
    layout: LayoutTree | Views = None,
    max_stack_bytes: int | None = None,
    param_specs: SpecTree | Specs = None,
) -> optax.GradientTransformation:
    """Runs `inner` on the matrices of a tree.

    Matrices of one shape, orientation and dtype are stacked across leaves, and `inner` is called once
    for each stack. Leaves that are no matrices, and `None`, pass unchanged; results come back in the
    leaf's dtype.

    On a mesh, matrices that are cut alike make a stack; it is moved so that each device owns whole
    matrices, or stays as it is, as `inner.place` says.

    `inner`'s state is kept leaf by leaf in trees like the parameters, each array of its leaf's rank
    with ones where a side is reduced; a leaf that is no matrix has an `optax.MaskedNode`. It stands
    where the leaf does, but outside of the leaf's Flax box, whose names of axes are another shape's.
    With `output_splits` the blocks' statistics stand side by side on the output axis: as many as there
    are outputs, or blocks where a block has one. Only where some of unequal blocks have theirs along
    the outputs and others along the inputs (`longer`), the leaf has a tuple of one array a block.

    Args:
      inner: one stage, or several joined by `chain_stages`.
      layout, param_specs: see `normuon`.
      max_stack_bytes: a ceiling for the working memory of one stack on one device, estimated as four
        times the matrices that it has whole; stacks beyond it run one after the other. None is 1 GiB.
        A single matrix is never cut.

    Raises:
      ValueError: `max_stack_bytes` is not positive; in `init` and `update` see `normuon`.
    """
    ceiling = stack_ceiling(max_stack_bytes)

    def state_of_stack(shape, dtype, output_axis):
        return jax.eval_shape(
            inner.init, MatrixStack(jax.ShapeDtypeStruct(shape, dtype), output_axis)
        )

    template = jax.tree.structure(state_of_stack((1, 1, 1), jnp.float32, -1))

    def block_states(view: MatrixView, dtype) -> list[list[jax.ShapeDtypeStruct]]:
        """For each output block of a leaf the state's arrays, (batch, rows or 1, columns or 1)."""
        of_size = {
            run.size: jax.tree.leaves(
                state_of_stack(view.block_stack_shape(run.size), dtype, view.output_stack_axis)
            )
            for run in view.runs
        }
        return [of_size[size] for size in view.output_sizes]

    def init(params):
        views = resolve_layouts(layout, params)
        note_views(views)
        specs = resolve_specs(param_specs, params)

        parameters = unbox(params)

        def leaf_state(path, leaf, index):
            if path not in views:
                return None if leaf is None else optax.MaskedNode()
            view = views[path]
            blocks = [states[index] for states in block_states(view, leaf.dtype)]

            def zeros(stack_shape, dtype):
                shape = statistic_leaf_shape(stack_shape, view)
                axes = None if specs is None else state_axes(shape, place_leaf(view, path, specs))
                return zeros_beside(leaf, shape, dtype, axes, specs)

            joined = view.joined_statistic([block.shape for block in blocks])
            if joined is not None:
                return zeros(joined, blocks[0].dtype)
            return tuple(zeros(block.shape, block.dtype) for block in blocks)

        return template.unflatten(
            parameters.tree.unflatten(
                leaf_state(path, leaf, index)
                for path, leaf in zip(parameters.paths, parameters.leaves, strict=True)
            )
            for index in range(template.num_leaves)
        )

    def update(updates, state, params=None):
        like = updates if params is None else params
        found, specs = resolve_layouts(layout, like), resolve_specs(param_specs, like)
        taken_apart = unbox(updates)
        leaves, tree = list(taken_apart.leaves), taken_apart.tree
        given = {
            i: path
            for i, (path, leaf) in enumerate(zip(taken_apart.paths, leaves, strict=True))
            if path in found and leaf is not None
        }
        placed = {i: place_leaf(found[path], path, specs) for i, path in given.items()}
        state_leaves = [tree.flatten_up_to(each) for each in template.flatten_up_to(state)]
        states = [{i: each[i] for i in placed} for each in state_leaves]
        dtypes = {i: leaves[i].dtype for i in placed}
        stacks = plan(placed, dtypes, StagesOnXla(inner), specs, ceiling=ceiling)

        def step(values, states):
            return _step_stacks(inner, stacks, placed, values, states, specs)

        arguments = ({i: leaves[i] for i in placed}, states)
        if specs is None:
            values, states = step(*arguments)
        else:
            lying = (
                {i: leaf.axes for i, leaf in placed.items()},
                [
                    {
                        i: jax.tree.map(lambda x, leaf=placed[i]: state_axes(x.shape, leaf), kept)
                        for i, kept in each.items()
                    }
                    for each in states
                ],
            )
            values, states = run_on_mesh(step, specs, arguments, lying, lying)
            values = {i: lie_as(values[i], specs.leaves[path], specs) for i, path in given.items()}
        for i in placed:
            leaves[i] = values[i]
            for each, new in zip(state_leaves, states, strict=True):
                each[i] = new[i]
        return taken_apart.boxed(leaves), template.unflatten(map(tree.unflatten, state_leaves))

    return optax.GradientTransformation(init, update)


class StagesOnXla(NamedTuple):
    """The engine that runs a stage on matrices by XLA's operations."""

    stage: MatrixStage

    @property
    def name(self) -> str:
        """As `describe` prints it."""
        return "xla"

    def alike(self, leaf: PlacedLeaf, dtype: str) -> list[Alike]:
        """Stored sides and orientation: a stage is told of a stack which side its outputs are."""
        sides = [leaf.view.block_stack_shape(run.size)[1:] for run in leaf.view.runs]
        return [
            Alike(rows, columns, cut, dtype, leaf.view.output_stack_axis)
            for (rows, columns), cut in zip(sides, leaf.cuts, strict=True)
        ]

    def place(self, spread: Spread) -> Placement:
        """As the stage wants it.

        Raises:
          ValueError: it wants parts of matrices without saying that it works on them.
        """
        placement = self.stage.place(spread, self.stage.takes_shards)
        if placement.strategy == "shards" and not self.stage.takes_shards:
            raise ValueError(
                "a stage on matrices placed them as shards without `takes_shards`, which says that it"
                " works on parts of matrices; place them with `with_an_owner`."
            )
        return placement

    def bytes_a_matrix(self, spread: Spread, placement: Placement) -> int:
        """The input, the iterate and two products, in the dtype in which the matrices come."""
        entries = spread.rows * spread.columns
        if placement.strategy == "shards":
            entries = entries // spread.parts + spread.short**2
        return 4 * entries * jnp.dtype(spread.dtype).itemsize


def _step_stacks(
    inner: MatrixStage,
    stacks: list[Stack[int]],
    placed: Mapping[int, PlacedLeaf],
    leaves,
    states,
    specs: Specs | None,
):
    """`inner` on all stacks: (leaves, states), as they were given, of one device's parts."""
    blocks = {i: split_blocks(leaf, placed[i].local) for i, leaf in leaves.items()}
    state_blocks = [
        {i: split_statistic(kept, placed[i].local) for i, kept in each.items()} for each in states
    ]
    outputs: list = []
    for stack in stacks:
        values = _gather(blocks, stack.pieces)
        if outputs and len(stacks) > 1:
            # Unordered, the compiler may hold the working memory of all stacks at once.
            values, outputs[-1] = jax.lax.optimization_barrier((values, outputs[-1]))
        gathered = [_gather(each, stack.pieces) for each in state_blocks]
        outputs.append(_step_stack(inner, stack.alike, stack.placement, values, gathered, specs))
    scattered = [_scatter(stacks, each) for each in zip(*outputs, strict=True)]
    new_leaves, new_states = {}, [{} for _ in states]
    for i, leaf in leaves.items():
        view = placed[i].local
        values, *arrays = (each[i] for each in scattered)
        # Before they are joined: blocks of other shapes may have another compute dtype.
        values = [value.astype(leaf.dtype) for value in values]
        new_leaves[i] = join_blocks(values, view)
        for new, kept, own in zip(new_states, states, arrays, strict=True):
            new[i] = join_statistic(own, view, like=kept[i])
    return new_leaves, new_states


def _step_stack(
    inner: MatrixStage, alike: Alike, placement: Placement, values, states, specs: Specs | None
) -> list:
    """One stack through `inner` at its place: its values and its states' arrays, as they came."""
    rows, columns, cut, dtype, output_axis = alike
    assert isinstance(output_axis, int)
    template = jax.eval_shape(
        inner.init,
        MatrixStack(jax.ShapeDtypeStruct((1, rows, columns), dtype), output_axis),
    )
    structure = jax.tree.structure(template)
    here = MatrixStack(values, output_axis, placement=placement)
    if placement.strategy == "whole" or specs is None or cut is None:
        output, state = inner.update(here, structure.unflatten(states))
        return [output.values, *jax.tree.leaves(state)]
    stay = placement.strategy == "shards"
    here = replace(here, shards=Shards(rows, columns, cut.row_axes, cut.column_axes, stay))
    if stay:
        output, state = inner.update(inner.feed(here), structure.unflatten(states))
        return [output.values, *jax.tree.leaves(state)]
    count = len(values)
    owners = Owners.of(cut, placement, specs, count=count)
    fed = inner.feed(replace(here, values=owners.replicas_share(values)))
    sides = [Sides(rows=s.shape[1] > 1, columns=s.shape[2] > 1) for s in jax.tree.leaves(template)]
    moved = [
        owners.statistic_to_owners(state, which) for state, which in zip(states, sides, strict=True)
    ]
    whole = replace(fed, values=owners.to_owners(fed.values), shards=None)
    output, state = inner.update(whole, structure.unflatten(moved))
    new_states = list(zip(jax.tree.leaves(state), sides, strict=True))
    return [
        owners.to_holders(output.values, count),
        *owners.statistics_to_holders(new_states, count),
    ]


def _gather(runs, pieces: Sequence[Piece[int]]):
    arrays = [runs[piece.leaf][piece.run][piece.start : piece.stop] for piece in pieces]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _scatter(stacks: list[Stack[int]], arrays) -> dict[int, list]:
    """For every leaf its runs of output blocks, each (matrices, ...), from the stacks' arrays."""
    parts: dict[tuple[int, int], list] = defaultdict(list)
    for stack, array in zip(stacks, arrays, strict=True):
        start = 0
        for piece in stack.pieces:
            count = piece.stop - piece.start
            parts[piece.leaf, piece.run].append(array[start : start + count])
            start += count
    leaves: dict[int, list] = defaultdict(list)
    for (leaf, _), cuts in sorted(parts.items()):
        leaves[leaf].append(cuts[0] if len(cuts) == 1 else jnp.concatenate(cuts))
    return leaves
