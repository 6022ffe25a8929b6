"""Which leaves are matrices, by path and shape, and which go to AdamW.

A name suggests a role (`normuon_core.names`), the role suggests readings (`readings`), and the leaf's
neighbours (`evidence`) rule some of them out (`candidates`). A matrix whose outputs or inputs are the
model's own may be a head without being called one (`outermost`). Where more than one reading is left the
leaf is in doubt: it is asked about, because a guess would train the wrong thing.
"""

import fnmatch
import math
from collections.abc import Mapping

import numpy as np
import optax

from normuon_core.names import Role
from optax_normuon.leaves.candidates import readings_left
from optax_normuon.leaves.evidence import Leaf, Neighbours, without
from optax_normuon.leaves.outermost import route_at_the_outside
from optax_normuon.leaves.paths import KeyPath, named_leaves, path_parts, unmet_pattern
from optax_normuon.leaves.readings import Reading, Shape
from optax_normuon.leaves.route import (
    NO_ENTRIES,
    LeafLayout,
    Route,
    as_matrix_layout,
    in_doubt_between,
)


def route(
    params: optax.Params, overrides: Mapping[str, LeafLayout] | None = None
) -> dict[KeyPath, Route]:
    """What becomes of every leaf, in their order; one that can be read in two ways is `in_doubt`.

    Args:
      params: arrays or abstract arrays.
      overrides: layouts by path pattern (`fnmatch`), for the leaves that the rules should not decide.

    Raises:
      ValueError: a pattern that meets no leaf.
    """
    overrides = overrides or {}
    leaves = named_leaves(params)
    unmet = unmet_pattern(overrides, params)
    if unmet is not None:
        raise ValueError(
            f"layout_by_path: the pattern {unmet!r} meets no leaf; the leaves are"
            f" {', '.join(name for _, name, _ in leaves)}."
        )
    if not leaves:
        return {}
    neighbours = Neighbours(
        (name, path_parts(path), tuple(np.shape(leaf))) for path, name, leaf in leaves
    )
    routes = {}
    for (path, name, _), leaf in zip(leaves, neighbours.leaves, strict=True):
        pattern = next((p for p in overrides if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            routes[path] = _route_leaf(leaf, neighbours)
        else:
            chosen = overrides[pattern]
            layout = None if chosen is None else as_matrix_layout(name, chosen)
            routes[path] = Route(layout, f"layout given for {pattern}")
    return routes


def _route_leaf(leaf: Leaf, neighbours: Neighbours) -> Route:
    role, shape = leaf.name.role, leaf.shape
    if len(shape) < 2:
        return Route(None, "no matrix")
    if math.prod(shape) == 0:
        return NO_ENTRIES
    if role is Role.EMBEDDING:
        return Route(None, "embedding")
    if role is Role.HEAD:
        return Route(None, "output head")
    if role is Role.VECTOR:
        return Route(None, f"a stack of vectors: {leaf.name.parts[-1]}")
    if role in (Role.NORM, Role.STATE_SPACE):
        return Route(None, role.value)
    if math.prod(shape) == max(shape):
        return Route(None, "a vector: one side is 1")
    if leaf.name.is_raw and shape[0] == 1 and role is Role.UNKNOWN:
        return Route(None, "a learned token or position: its first axis is 1")
    readings = readings_left(leaf, neighbours)
    if len(readings) > 1:
        return in_doubt_between(readings)
    (reading,) = readings
    if reading.layout is None or reading.form is None:
        return Route(None, reading.meaning)
    found = _matrix_unless_vector(shape, reading)
    if found.layout is None or len(shape) != 2:
        return found
    return route_at_the_outside(leaf, reading, neighbours)


def _matrix_unless_vector(shape: Shape, reading: Reading) -> Route:
    """The reading's matrices, unless one of their sides is 1."""
    layout, form = reading.layout, reading.form
    assert layout is not None
    assert form is not None
    if form.one_input_channel is not None:
        own = without(shape, reading.layer_axes)
        if own[form.one_input_channel] == 1:
            return Route(None, "convolution with one input channel a group")
    _, rows, columns = layout.on(shape).stack_shape
    if min(rows, columns) == 1:
        return Route(None, "a vector: one side is 1")
    return Route(layout, reading.meaning)
