"""States of earlier versions, to read their checkpoints."""

import jax
import optax

from normuon_core.layout import MatrixView
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.matrices.views import as_stack, statistic_leaf_shape
from optax_normuon.mesh.found_views import found_views
from optax_normuon.mesh.scales import is_scale


def older_state(tx: optax.GradientTransformation, params: optax.Params) -> optax.OptState:
    """The state of versions in which each block of a leaf with `output_splits` had an array of its own.

    Restore a checkpoint of such a version into it, and go on: `update` takes the state and keeps its
    form.

        state = checkpointer.restore(path, optax_normuon.older_state(tx, params))

    Args:
      tx: the transformation, whoever has wrapped it.
      params: arrays or abstract arrays.

    Returns:
      A tree of `jax.ShapeDtypeStruct`s: `tx.init`'s, but the second moment of a split leaf is a tuple of
      one array a block.
    """
    state, views = found_views(tx, params)
    parameters = unbox(params)
    places = dict(zip(parameters.paths, parameters.places, strict=True))
    split = {places[path]: view for path, view in views.items() if view.is_split}

    def apart(path: KeyPath, leaf: jax.ShapeDtypeStruct):
        for place, view in split.items():
            own = path[len(path) - len(place) :] == place and not is_scale(path)
            if own and leaf.shape != view.stored_shape:
                return tuple(leaf.update(shape=shape) for shape in _block_shapes(leaf, view))
        return leaf

    return jax.tree_util.tree_map_with_path(apart, state)


def _block_shapes(leaf: jax.ShapeDtypeStruct, view: MatrixView) -> list[tuple[int, ...]]:
    """The shape of each block's statistic, of the statistic of a whole leaf."""
    stack = jax.eval_shape(lambda x: as_stack(x, view), leaf).shape
    widths = view.run_widths(stack[view.output_stack_axis])
    shapes = []
    for run, width in zip(view.runs, widths, strict=True):
        block = list(stack)
        block[view.output_stack_axis] = width
        shapes += [statistic_leaf_shape(tuple(block), view)] * run.blocks
    return shapes
