"""Which leaves of a tree are matrices, and how each holds them: the caller's layouts, resolved."""

import math
from collections.abc import Mapping

import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from normuon_core.layout import MatrixLayout, MatrixView
from optax_normuon.leaves.layout_by_path import LayoutByPath, LayoutTree
from optax_normuon.leaves.parameters import check_trainable
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.prefixes import broadcast_prefix, called_on
from optax_normuon.leaves.question import refuse_doubts
from optax_normuon.leaves.route import NO_ENTRIES, LeafLayout, Route, as_matrix_layout
from optax_normuon.leaves.routing import route


class Views(dict[KeyPath, MatrixView]):
    """The matrix leaves of one tree by key path; leaves that are no matrices are absent.

    Keyed by path and not shaped like the tree, so that it still fits after `optax.partition` has
    masked leaves away.
    """


def resolve_layouts(layout: LayoutTree | Views, params: optax.Params) -> Views:
    """One `MatrixView` for each leaf that is a matrix; the leaves that are not are absent.

    Args:
      layout: see `LayoutTree`; None at the root routes by path and shape, None at a leaf or subtree
        leaves it to AdamW. `Views` are handed back as they are.
      params: arrays or abstract arrays.

    Raises:
      ValueError: a layout that does not fit its leaf or the tree, or (None at the root) a leaf that
        can be read in two ways; TypeError: a complex or integer leaf. Each names the leaf.
    """
    if isinstance(layout, Views):
        return layout
    routes = find_routes(layout, params)
    refuse_doubts(params, routes, overrides_of(layout))
    return views_of(routes, params)


def views_of(routes: Mapping[KeyPath, Route], params: optax.Params) -> Views:
    """The matrices among the routed leaves; a leaf in doubt is none."""
    return Views(
        {
            path: found.layout.on(np.shape(leaf), name)
            for (path, name, leaf), found in zip(named_leaves(params), routes.values(), strict=True)
            if found.layout is not None
        }
    )


def overrides_of(layout: LayoutTree) -> Mapping[str, LeafLayout]:
    """The patterns for which a layout has an answer already."""
    return layout.overrides if isinstance(layout, LayoutByPath) else {}


def find_routes(layout: LayoutTree, params: optax.Params) -> dict[KeyPath, Route]:
    """What becomes of every leaf, in the leaves' order; some may be in doubt."""
    leaves = named_leaves(params)
    if not leaves:
        return {}
    check_trainable(params)
    if isinstance(layout, LayoutByPath):
        return route(params, layout.overrides)
    layout = called_on(layout, params)
    if layout is None:
        return route(params)
    given = broadcast_prefix(layout, params, is_leaf=_is_leaf_layout, what="layout")
    return {path: _given_route(name, np.shape(leaf), given[path]) for path, name, leaf in leaves}


def _given_route(name: str, shape: tuple[int, ...], layout: LeafLayout) -> Route:
    if layout is None:
        return Route(None, "layout: None")
    route = Route(as_matrix_layout(name, layout), "layout given")
    return route if math.prod(shape) else NO_ENTRIES


def _is_leaf_layout(node: object) -> bool:
    return node is None or isinstance(node, MatrixLayout | MuonDimensionNumbers)
