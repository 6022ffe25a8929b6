"""Routing by path and shape, with layouts of the caller's own for the paths that a pattern meets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from optax_normuon.leaves.question import refuse_doubts
from optax_normuon.leaves.route import LeafLayout
from optax_normuon.leaves.routing import route

LayoutTree = Any
"""A `LeafLayout`, a tree or prefix tree of them, or a callable from the parameters to one."""


@dataclass(frozen=True)
class LayoutByPath:
    """What `layout_by_path` returns: routing by path and shape, with overrides."""

    overrides: Mapping[str, LeafLayout]

    def __call__(self, params: optax.Params) -> LayoutTree:
        """The tree of layouts, for callers who compose their own.

        Raises:
          ValueError: leaves that can be read in two ways, or a pattern that meets no leaf.
        """
        routes = route(params, self.overrides)
        refuse_doubts(params, routes, self.overrides)
        return jax.tree_util.tree_map_with_path(lambda path, _: routes[path].layout, params)


def layout_by_path(overrides: Mapping[str, LeafLayout]) -> LayoutByPath:
    """A layout that routes by path and shape except where a pattern says otherwise.

    Args:
      overrides: from path patterns (`fnmatch` style, `*` crosses `/`) to a `MatrixLayout`, an
        `optax.contrib.MuonDimensionNumbers`, or None for AdamW. The first pattern that fits counts.

    Returns:
      A callable for the `layout` argument.

    Example: `normuon(0.02, layout=layout_by_path({"*/conv/kernel": None}))`.
    """
    return LayoutByPath(dict(overrides))
