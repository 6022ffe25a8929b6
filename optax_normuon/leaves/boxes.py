"""Flax's boxes: pytree nodes around one array that say how its axes are divided over a mesh.

`flax.linen.with_partitioning` and `flax.nnx.with_partitioning` put a parameter into one. State of the
parameter's own shape may stay in a copy of the box; a statistic of another shape may not, because the
box's names would divide an axis that the statistic has reduced.
"""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from optax_normuon.leaves.paths import KeyPath


def is_box(node: object) -> bool:
    """Whether a node is one of Flax's boxes (`flax.core.meta.AxisMetadata`, `flax.nnx.Variable`)."""
    # Without Flax imported there are no boxes, and Flax need not be a dependency.
    linen, nnx = (sys.modules.get(name) for name in ("flax.core.meta", "flax.nnx"))
    classes = [getattr(linen, "AxisMetadata", None), getattr(nnx, "Variable", None)]
    return isinstance(node, tuple(each for each in classes if each is not None))


class Unboxed(NamedTuple):
    """A tree taken apart, each box with its array as one leaf.

    Attributes:
      paths: of the arrays, the box's own key included.
      places: of the boxes, and of arrays without one.
      leaves: the arrays. `None` is a leaf, and so is a box without an array, as `optax.masked` leaves
        one behind.
      tree: the structure above them, a `PyTreeDef`.
      boxes: for each leaf the `PyTreeDef` of its box, or of the leaf alone.
    """

    paths: list[KeyPath]
    places: list[KeyPath]
    leaves: list[Any]
    tree: Any
    boxes: list[Any]

    def boxed(self, leaves: Sequence[Any]) -> optax.Params:
        """The tree with other arrays of the same shapes, each in its box."""
        nodes = [
            box.unflatten([leaf]) if box.num_leaves == 1 else leaf
            for box, leaf in zip(self.boxes, leaves, strict=True)
        ]
        return self.tree.unflatten(nodes)


def unbox(tree: optax.Params) -> Unboxed:
    """Takes a tree apart; `boxed` puts it together again, and `tree.unflatten` without the boxes."""
    nodes, structure = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: node is None or is_box(node)
    )
    paths, places, leaves, boxes = [], [], [], []
    for place, node in nodes:
        path = place
        inside, box = jax.tree_util.tree_flatten_with_path(node)
        if len(inside) == 1:
            ((key, node),) = inside
            path = (*place, *key)
        paths.append(path)
        places.append(place)
        leaves.append(node)
        boxes.append(box)
    return Unboxed(paths, places, leaves, structure, boxes)
