"""Same-shape matrices of many leaves as bounded stacks, and back.

Layouts, splits, grouping and memory live here; a stage on matrices does not know where they came from.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normuon_core.layout import MatrixView
from normuon_core.stacks import even_stacks
from optax_normuon.layout import LayoutTree, Views, resolve_layouts

DEFAULT_MAX_STACK_BYTES = 2**30

_WORKING_COPIES = 4
"""A stack's working memory over its own size: the input, the iterate, and two products."""


@jax.tree_util.register_pytree_node_class
class MatrixStack:
    """What a stage on matrices gets and returns.

    Attributes:
      values: (batch, rows, columns), every batch entry a matrix.
      output_axis: -2 where the rows are the output neurons, -1 where the columns are.
    """

    def __init__(self, values, output_axis: int):
        self.values = values
        self.output_axis = output_axis

    def tree_flatten(self):
        return (self.values,), self.output_axis

    @classmethod
    def tree_unflatten(cls, output_axis, children):
        (values,) = children
        return cls(values, output_axis)


class MatrixStage(NamedTuple):
    """What `optax.GradientTransformation` is for trees, for a `MatrixStack`.

    Its state must start at zero and consist of arrays (batch, rows or 1, columns or 1).
    """

    init: Callable[[MatrixStack], Any]
    update: Callable[[MatrixStack, Any], tuple[MatrixStack, Any]]


def chain_stages(*stages: MatrixStage) -> MatrixStage:
    """The stages one after the other; the state is the tuple of theirs."""

    def init(stack):
        return tuple(stage.init(stack) for stage in stages)

    def update(stack, states):
        new_states = []
        for stage, state in zip(stages, states, strict=True):
            stack, state = stage.update(stack, state)
            new_states.append(state)
        return stack, tuple(new_states)

    return MatrixStage(init, update)


class _Piece(NamedTuple):
    """Entries `start` to `stop` of the batch of one output block of one leaf."""

    leaf: int
    block: int
    start: int
    stop: int


def on_matrices(
    inner: MatrixStage,
    *,
    layout: LayoutTree | Views = None,
    max_stack_bytes: int | None = None,
) -> optax.GradientTransformation:
    """Runs `inner` on the matrices of a tree.

    Matrices of one shape, orientation and dtype are stacked across leaves, and `inner` is called once
    for each stack. Leaves that are no matrices, and `None`, pass unchanged; results come back in the
    leaf's dtype.

    `inner`'s state is kept leaf by leaf in trees like the parameters, each array of its leaf's rank
    with ones where a side is reduced; a leaf with `output_splits` has a tuple of one array a block,
    and a leaf that is no matrix an `optax.MaskedNode`.

    Args:
      inner: one stage, or several joined by `chain_stages`.
      layout: see `normuon`.
      max_stack_bytes: a ceiling for the working memory of one stack, estimated as four times the
        stack itself; stacks beyond it run one after the other. None is 1 GiB. A single matrix is
        never cut.

    Raises:
      ValueError: `max_stack_bytes` is not positive.
    """
    ceiling = DEFAULT_MAX_STACK_BYTES if max_stack_bytes is None else max_stack_bytes
    if ceiling <= 0:
        raise ValueError(f"max_stack_bytes={max_stack_bytes} must be positive, or None for 1 GiB.")

    def state_of_stack(shape, dtype, output_axis):
        return jax.eval_shape(
            inner.init, MatrixStack(jax.ShapeDtypeStruct(shape, dtype), output_axis)
        )

    template = jax.tree.structure(state_of_stack((1, 1, 1), jnp.float32, -1))

    def init(params):
        views = resolve_layouts(layout, params)

        def leaf_state(path, leaf, index):
            if path not in views:
                return optax.MaskedNode()
            view = views[path]
            blocks = []
            for size in view.output_sizes:
                shape = view.block_stack_shape(size)
                state = state_of_stack(shape, leaf.dtype, view.output_stack_axis)
                stacked = jax.tree.leaves(state)[index]
                blocks.append(as_leaf(jnp.zeros(stacked.shape, stacked.dtype), view))
            return tuple(blocks) if view.is_split else blocks[0]

        return template.unflatten(
            jax.tree_util.tree_map_with_path(lambda p, leaf, i=i: leaf_state(p, leaf, i), params)
            for i in range(template.num_leaves)
        )

    def update(updates, state, params=None):
        found = resolve_layouts(layout, updates if params is None else params)
        paths_and_leaves, tree = jax.tree_util.tree_flatten_with_path(
            updates, is_leaf=lambda leaf: leaf is None
        )
        leaves = [leaf for _, leaf in paths_and_leaves]
        views = {
            i: found[path]
            for i, (path, leaf) in enumerate(paths_and_leaves)
            if path in found and leaf is not None
        }
        blocks = {i: split_blocks(leaves[i], view) for i, view in views.items()}
        state_leaves = [tree.flatten_up_to(each) for each in template.flatten_up_to(state)]
        state_blocks = [
            {i: _state_blocks(each[i], view) for i, view in views.items()} for each in state_leaves
        ]

        stacks = _bounded_stacks(views, blocks, ceiling)
        outputs: list = []
        for pieces in stacks:
            values = _gather(blocks, pieces)
            if outputs and len(stacks) > 1:
                # Unordered, the compiler may hold the working memory of all stacks at once.
                values, outputs[-1] = jax.lax.optimization_barrier((values, outputs[-1]))
            inner_state = template.unflatten(_gather(each, pieces) for each in state_blocks)
            output_axis = views[pieces[0].leaf].output_stack_axis
            output, inner_state = inner.update(MatrixStack(values, output_axis), inner_state)
            outputs.append([output.values, *jax.tree.leaves(inner_state)])

        scattered = [_scatter(stacks, each) for each in zip(*outputs, strict=True)]
        for i, view in views.items():
            values, *states = (each[i] for each in scattered)
            # Before they are joined: blocks of other shapes may have another compute dtype.
            values = [value.astype(leaves[i].dtype) for value in values]
            leaves[i] = join_blocks(values, view)
            for each, new in zip(state_leaves, states, strict=True):
                kept = tuple(as_leaf(block, view) for block in new)
                each[i] = kept if view.is_split else kept[0]
        return tree.unflatten(leaves), template.unflatten(map(tree.unflatten, state_leaves))

    return optax.GradientTransformation(init, update)


def as_stack(x, view: MatrixView):
    """A leaf, or a statistic of its rank, as (batch, rows, columns)."""
    ordered = x.transpose(view.order)
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
    return values.reshape(view.statistic_shape(values.shape)).transpose(inverse)


def split_blocks(leaf, view: MatrixView) -> list:
    """The output blocks of a leaf, each (batch, rows, columns)."""
    stack = as_stack(leaf, view)
    return [stack[block] for block in view.blocks] if view.is_split else [stack]


def join_blocks(blocks: list, view: MatrixView):
    """The inverse of `split_blocks`."""
    stack = jnp.concatenate(blocks, axis=view.output_stack_axis) if view.is_split else blocks[0]
    return as_leaf(stack, view)


def _state_blocks(kept, view: MatrixView) -> list:
    return [as_stack(block, view) for block in (kept if view.is_split else (kept,))]


def _bounded_stacks(views: dict[int, MatrixView], blocks, ceiling: int) -> list[list[_Piece]]:
    """Pieces of equal shape, orientation and dtype, as many in a stack as the ceiling allows."""
    groups: dict[tuple, list[_Piece]] = defaultdict(list)
    limits = {}
    for leaf, view in views.items():
        for block, array in enumerate(blocks[leaf]):
            batch, rows, columns = array.shape
            key = (rows, columns, view.output_stack_axis, array.dtype)
            working_bytes = _WORKING_COPIES * rows * columns * array.dtype.itemsize
            limits[key] = max(1, ceiling // working_bytes)
            groups[key].append(_Piece(leaf, block, 0, batch))
    return [
        [group[i]._replace(start=start, stop=stop) for i, start, stop in stack]
        for key, group in groups.items()
        for stack in even_stacks([piece.stop for piece in group], limits[key])
    ]


def _gather(blocks, pieces: list[_Piece]):
    arrays = [blocks[piece.leaf][piece.block][piece.start : piece.stop] for piece in pieces]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _scatter(stacks: list[list[_Piece]], arrays) -> dict[int, list]:
    """For every leaf its output blocks, each (batch, ...), from the stacks' arrays."""
    parts: dict[tuple[int, int], list] = defaultdict(list)
    for pieces, array in zip(stacks, arrays, strict=True):
        start = 0
        for piece in pieces:
            count = piece.stop - piece.start
            parts[piece.leaf, piece.block].append(array[start : start + count])
            start += count
    leaves: dict[int, list] = defaultdict(list)
    for (leaf, _), cuts in sorted(parts.items()):
        leaves[leaf].append(cuts[0] if len(cuts) == 1 else jnp.concatenate(cuts))
    return leaves
