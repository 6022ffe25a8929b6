"""What each optimizer trains, and how large its state is."""

import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey

from normuon_core.table import Total
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.question import DOUBT

_KINDS = {"mu": "first moment", "nu": "second moment"}


def totals(
    params: optax.Params, optimizers: Mapping[KeyPath, str], tx: optax.GradientTransformation
) -> list[Total]:
    """For each optimizer its leaves, parameters and bytes of state, over all devices.

    The bytes are those of the arrays that `tx.init` makes for each parameter. Step counters are not
    counted, nor is the state of leaves in doubt.

    Args:
      params: arrays or abstract arrays.
      optimizers: by leaf, what its optimizer is called.
      tx: the transformation.
    """
    leaves: dict[str, list[int]] = {optimizer: [] for optimizer in optimizers.values()}
    for path, _, leaf in named_leaves(params):
        leaves[optimizers[path]].append(math.prod(np.shape(leaf)))
    state: dict[str, dict[str, int]] = {optimizer: {} for optimizer in leaves}
    for path, kind, size in _states(params, optimizers, tx):
        if optimizers[path] == DOUBT:
            continue
        kinds = state[optimizers[path]]
        kinds[kind] = kinds.get(kind, 0) + size
    return [
        Total(optimizer, len(sizes), sum(sizes), state[optimizer])
        for optimizer, sizes in leaves.items()
    ]


def _states(
    params: optax.Params, optimizers: Mapping[KeyPath, str], tx: optax.GradientTransformation
) -> Iterator[tuple[KeyPath, str, int]]:
    """(path of the parameter, kind, bytes) of every array of the state that belongs to a parameter."""
    # Without their places: the sizes are those of whole arrays, and no mesh need be set.
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), params)
    parameters = unbox(params)
    # A statistic of another shape than its parameter's stands outside of the parameter's box.
    owners = dict(zip(parameters.places, parameters.paths, strict=True))
    owners |= {path: path for path in optimizers}
    for path, leaf in jax.tree_util.tree_flatten_with_path(jax.eval_shape(tx.init, abstract))[0]:
        # The longest end first, because another parameter's path may end it; one key more for the
        # blocks of a split leaf, which are a tuple.
        ends = [(start, end) for start in range(len(path)) for end in (len(path), len(path) - 1)]
        for start, end in ends:
            if path[start:end] in owners:
                owner = owners[path[start:end]]
                yield owner, _kind(path[:start]), leaf.size * leaf.dtype.itemsize
                break


def _kind(path: KeyPath) -> str:
    """What the field of a state that holds a tree like the parameters is called."""
    fields = [key.name for key in path if isinstance(key, GetAttrKey)]
    field = fields[-1] if fields else "state"
    return _KINDS.get(field, field.replace("_", " "))
