"""Trees of random arrays, and their leaves by path."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def random_tree(shapes: Any, seed: int, dtype: Any = jnp.float32) -> Any:
    """Normal random arrays in the place of every shape (a tuple) of the tree."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def at(tree: Any, path) -> Any:
    """The leaf, or the subtree, to which a path of keys leads."""
    for key in path:
        tree = tree[key]
    return tree
