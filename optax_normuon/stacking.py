"""Same-shape matrices of many leaves as bounded stacks, and back.

Layouts, splits, grouping, memory and placement on a mesh meet here; a stage on matrices does not know
where they came from.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normuon_core.layout import MatrixView
from normuon_core.placement import Placement, Spread, whole_or_owned
from normuon_core.stacks import even_stacks
from optax_normuon.boxes import unbox
from optax_normuon.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.sharding import (
    Cut,
    Owners,
    Shards,
    Sides,
    cut_of,
    lie_as,
    movable_axes,
    run_on_mesh,
    spread_of,
)
from optax_normuon.specs import (
    Axes,
    Specs,
    SpecTree,
    matrix_statistic_axes,
    note_views,
    resolve_specs,
    unfolded_axes,
    zeros_beside,
)

DEFAULT_MAX_STACK_BYTES = 2**30

_WORKING_COPIES = 4
"""A stack's working memory over its own size: the input, the iterate, and two products."""


class Fed(NamedTuple):
    """What a stage before has done: values are normalised for this form of the iteration, in its compute
    dtype."""

    form: Literal["standard", "gram"]
    by_kernels: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixStack:
    """What a stage on matrices gets and returns.

    Attributes:
      values: (batch, rows, columns), every batch entry a matrix, or one device's part of it.
      output_axis: -2 where the rows are the output neurons, -1 where the columns are.
      shards: how the parts make up whole matrices; None where `values` has them whole.
      fed: None for momentum as it comes.
    """

    values: Any
    output_axis: int = field(metadata={"static": True})
    shards: Shards | None = field(default=None, metadata={"static": True})
    fed: Fed | None = field(default=None, metadata={"static": True})

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of a whole matrix."""
        if self.shards is not None:
            return self.shards.rows, self.shards.columns
        _, rows, columns = self.values.shape
        return rows, columns

    def sum_over(self, x, sides: tuple[int, ...]):
        """The sum of x, (..., rows or 1, columns or 1), over sides of the whole matrices; they become 1.

        Args:
          sides: -2 for the rows, -1 for the columns.
        """
        total = jnp.sum(x, axis=sides, keepdims=True)
        return total if self.shards is None else self.shards.total(total, sides)

    def with_values(self, values, *, fed: Fed | None = None) -> "MatrixStack":
        """The same matrices further on their way."""
        return replace(self, values=values, fed=fed)


def with_an_owner(spread: Spread, may_stay: bool = False) -> Placement:
    """For stages of unknown cost that need whole matrices."""
    del may_stay
    return whole_or_owned(spread, 0, "standard", 4, False)


class MatrixStage(NamedTuple):
    """What `optax.GradientTransformation` is for trees, for a `MatrixStack`.

    Its state must start at zero and consist of arrays (batch, rows or 1, columns or 1).

    Attributes:
      feed: what `update` would do first, on shards, so that less has to be moved to whole matrices.
      place: where on a mesh the stage wants a group of matrices. It is told whether they may stay
        divided, and may answer "shards" only then.
      takes_shards: whether `update` works on parts of matrices, with `MatrixStack.sum_over` for every
        sum and `MatrixStack.sides` for every size. A stage that does not say so never sees any: not
        alone, and not behind a stage that does.
    """

    init: Callable[[MatrixStack], Any]
    update: Callable[[MatrixStack, Any], tuple[MatrixStack, Any]]
    feed: Callable[[MatrixStack], MatrixStack] = lambda stack: stack
    place: Callable[[Spread, bool], Placement] = with_an_owner
    takes_shards: bool = False


def chain_stages(first: MatrixStage, *others: MatrixStage) -> MatrixStage:
    """The stages one after the other; the state is the tuple of theirs. The first chooses the place."""
    stages = (first, *others)

    def init(stack):
        return tuple(stage.init(stack) for stage in stages)

    def update(stack, states):
        new_states = []
        for stage, state in zip(stages, states, strict=True):
            stack, state = stage.update(stack, state)
            new_states.append(state)
        return stack, tuple(new_states)

    takes_shards = all(stage.takes_shards for stage in stages)
    return MatrixStage(init, update, first.feed, first.place, takes_shards)


class Piece(NamedTuple):
    """Matrices `start` to `stop` of one run of output blocks of one leaf."""

    leaf: int
    run: int
    start: int
    stop: int


class Group(NamedTuple):
    """Matrices that can share a stack.

    Attributes:
      rows, columns: of a whole matrix. output_axis: as in `MatrixStack`.
      cut: how a device's part of one is cut; None without a mesh.
    """

    rows: int
    columns: int
    output_axis: int
    dtype: Any
    cut: Cut | None


class PlacedGroup(NamedTuple):
    """A group's matrices in bounded stacks, and where these are orthogonalized."""

    group: Group
    placement: Placement
    stacks: list[list[Piece]]


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
        groups = place_groups(
            inner, placed, {i: leaves[i].dtype for i in placed}, specs, ceiling=ceiling
        )

        def step(values, states):
            return _step_groups(inner, groups, placed, values, states, specs)

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


def stack_ceiling(max_stack_bytes: int | None) -> int:
    """The ceiling in bytes.

    Raises:
      ValueError: it is not positive.
    """
    ceiling = DEFAULT_MAX_STACK_BYTES if max_stack_bytes is None else max_stack_bytes
    if ceiling <= 0:
        raise ValueError(f"max_stack_bytes={max_stack_bytes} must be positive, or None for 1 GiB.")
    return ceiling


def place_leaf(view: MatrixView, path, specs: Specs | None) -> PlacedLeaf:
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


def place_groups(
    inner: MatrixStage,
    leaves: Mapping[int, PlacedLeaf],
    dtypes: Mapping[int, Any],
    specs: Specs | None,
    *,
    ceiling: int,
) -> list[PlacedGroup]:
    """The leaves' matrices in groups, each in as many stacks as the ceiling demands."""
    members: dict[Group, list[Piece]] = defaultdict(list)
    for index, leaf in leaves.items():
        for number, run in enumerate(leaf.view.runs):
            _, rows, columns = leaf.view.block_stack_shape(run.size)
            group = Group(
                rows, columns, leaf.view.output_stack_axis, dtypes[index], leaf.cuts[number]
            )
            members[group].append(Piece(index, number, 0, leaf.local.matrices(run)))
    result = []
    for group, pieces in members.items():
        sizes = [piece.stop for piece in pieces]
        spread = spread_of(
            group.cut, specs, count=sum(sizes), rows=group.rows, columns=group.columns
        )
        placement = inner.place(spread, inner.takes_shards)
        if placement.strategy == "shards" and not inner.takes_shards:
            raise ValueError(
                "a stage on matrices placed them as shards without `takes_shards`, which says that it"
                " works on parts of matrices; place them with `with_an_owner`."
            )
        entries = group.rows * group.columns
        if placement.strategy == "shards":
            entries = entries // spread.parts + spread.short**2
        limit = max(1, ceiling // (_WORKING_COPIES * entries * group.dtype.itemsize))
        cuts = even_stacks(sizes, limit, owners=placement.owners)
        stacks = [
            [pieces[i]._replace(start=start, stop=stop) for i, start, stop in stack]
            for stack in cuts
        ]
        result.append(PlacedGroup(group, placement, stacks))
    return result


def _step_groups(
    inner: MatrixStage,
    groups: list[PlacedGroup],
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
    stacks = [(group, pieces) for group in groups for pieces in group.stacks]
    outputs: list = []
    for (group, placement, _), pieces in stacks:
        values = _gather(blocks, pieces)
        if outputs and len(stacks) > 1:
            # Unordered, the compiler may hold the working memory of all stacks at once.
            values, outputs[-1] = jax.lax.optimization_barrier((values, outputs[-1]))
        gathered = [_gather(each, pieces) for each in state_blocks]
        outputs.append(_step_stack(inner, group, placement, values, gathered, specs))
    scattered = [_scatter([p for _, p in stacks], each) for each in zip(*outputs, strict=True)]
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
    inner: MatrixStage, group: Group, placement: Placement, values, states, specs: Specs | None
) -> list:
    """One stack through `inner` at its place: its values and its states' arrays, as they came."""
    rows, columns, output_axis, dtype, cut = group
    template = jax.eval_shape(
        inner.init,
        MatrixStack(jax.ShapeDtypeStruct((1, rows, columns), dtype), output_axis),
    )
    structure = jax.tree.structure(template)
    if placement.strategy == "whole" or specs is None or cut is None:
        output, state = inner.update(MatrixStack(values, output_axis), structure.unflatten(states))
        return [output.values, *jax.tree.leaves(state)]
    stay = placement.strategy == "shards"
    shards = Shards(rows, columns, cut.row_axes, cut.column_axes, stay)
    if stay:
        stack = inner.feed(MatrixStack(values, output_axis, shards))
        output, state = inner.update(stack, structure.unflatten(states))
        return [output.values, *jax.tree.leaves(state)]
    count = len(values)
    owners = Owners.of(cut, placement, specs, count=count)
    fed = inner.feed(MatrixStack(owners.share(values), output_axis, shards))
    sides = [Sides(rows=s.shape[1] > 1, columns=s.shape[2] > 1) for s in jax.tree.leaves(template)]
    moved = [
        owners.collect_statistic(state, which) for state, which in zip(states, sides, strict=True)
    ]
    whole = replace(fed, values=owners.collect(fed.values), shards=None)
    output, state = inner.update(whole, structure.unflatten(moved))
    new_states = list(zip(jax.tree.leaves(state), sides, strict=True))
    return [
        owners.hand_back(output.values, count),
        *owners.hand_back_statistics(new_states, count),
    ]


def as_stack(x, view: MatrixView):
    """A leaf, or a statistic of its rank, as (batch, rows, columns)."""
    ordered = x.reshape(view.unfolded(x.shape)).transpose(view.order)
    batch, rows = len(view.batch_axes), len(view.row_axes)
    sides = (
        ordered.shape[:batch],
        ordered.shape[batch : batch + rows],
        ordered.shape[batch + rows :],
    )
    return ordered.reshape([math.prod(side) for side in sides])


def as_leaf(values, view: MatrixView):
    """The inverse of `as_stack`."""
    inverse = sorted(range(len(view.order)), key=view.order.__getitem__)
    leaf = values.reshape(view.statistic_shape(values.shape)).transpose(inverse)
    return leaf.reshape(view.fold(leaf.shape))


def statistic_leaf_shape(stack_shape: tuple[int, ...], view: MatrixView) -> tuple[int, ...]:
    """What `as_leaf` makes of (batch, rows or 1, columns or 1)."""
    return jax.eval_shape(
        lambda x: as_leaf(x, view), jax.ShapeDtypeStruct(stack_shape, jnp.float32)
    ).shape


def split_blocks(leaf, view: MatrixView) -> list:
    """The output blocks of a leaf, or of a statistic of it: each run's, (matrices, rows, columns).

    A run's blocks stand beside each other within an entry of the batch.
    """
    stack, axis = as_stack(leaf, view), view.output_stack_axis
    runs, start = [], 0
    for run, width in zip(view.runs, view.run_widths(stack.shape[axis]), strict=True):
        stop = start + run.blocks * width
        part = stack
        if len(view.runs) > 1:
            part = jax.lax.slice_in_dim(stack, start, stop, axis=axis)
        runs.append(_blocks_to_batch(part, run.blocks, axis))
        start = stop
    return runs


def join_blocks(runs: list, view: MatrixView):
    """The inverse of `split_blocks`."""
    axis = view.output_stack_axis
    parts = [
        _blocks_from_batch(x, run.blocks, axis) for x, run in zip(runs, view.runs, strict=True)
    ]
    return as_leaf(parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis), view)


def _blocks_to_batch(x, blocks: int, axis: int):
    """(batch, rows, columns) whose side `axis` is so many blocks: (batch blocks, rows, columns)."""
    if blocks == 1:
        return x
    batch, rows, columns = x.shape
    if axis == -2:
        return x.reshape(batch * blocks, rows // blocks, columns)
    apart = x.reshape(batch, rows, blocks, columns // blocks)
    return apart.swapaxes(1, 2).reshape(batch * blocks, rows, columns // blocks)


def _blocks_from_batch(x, blocks: int, axis: int):
    if blocks == 1:
        return x
    matrices, rows, columns = x.shape
    if axis == -2:
        return x.reshape(matrices // blocks, blocks * rows, columns)
    apart = x.reshape(matrices // blocks, blocks, rows, columns)
    return apart.swapaxes(1, 2).reshape(matrices // blocks, rows, blocks * columns)


def split_statistic(kept, view: MatrixView) -> list:
    """A statistic as the state keeps it, run by run: as `split_blocks`."""
    if not isinstance(kept, tuple):
        return split_blocks(kept, view)
    blocks, runs = iter([as_stack(block, view) for block in kept]), []
    for run in view.runs:
        stack = jnp.stack([next(blocks) for _ in range(run.blocks)], axis=1)
        runs.append(stack.reshape(-1, *stack.shape[2:]))
    return runs


def join_statistic(runs: list, view: MatrixView, *, like):
    """The inverse of `split_statistic`, kept as `like` is."""
    if not isinstance(like, tuple):
        return join_blocks(runs, view)
    return tuple(
        as_leaf(block, view)
        for x, run in zip(runs, view.runs, strict=True)
        for block in x.reshape(-1, run.blocks, *x.shape[1:]).swapaxes(0, 1)
    )


def state_axes(shape: tuple[int, ...], leaf: PlacedLeaf) -> Axes:
    """How an array of the state lies; the blocks of a fused projection are not cut."""
    return matrix_statistic_axes(shape, leaf.view, leaf.axes)


def _gather(runs, pieces: list[Piece]):
    arrays = [runs[piece.leaf][piece.run][piece.start : piece.stop] for piece in pieces]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _scatter(stacks: list[list[Piece]], arrays) -> dict[int, list]:
    """For every leaf its runs of output blocks, each (matrices, ...), from the stacks' arrays."""
    parts: dict[tuple[int, int], list] = defaultdict(list)
    for pieces, array in zip(stacks, arrays, strict=True):
        start = 0
        for piece in pieces:
            count = piece.stop - piece.start
            parts[piece.leaf, piece.run].append(array[start : start + count])
            start += count
    leaves: dict[int, list] = defaultdict(list)
    for (leaf, _), cuts in sorted(parts.items()):
        leaves[leaf].append(cuts[0] if len(cuts) == 1 else jnp.concatenate(cuts))
    return leaves
