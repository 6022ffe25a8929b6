"""What a step logs, as one array: each copy from a GPU takes the loop's time, however small it is."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Logged:
    """A tree of numbers that comes out of a compiled step as one array.

    Attributes:
      numbers: all of them, float32.
      tree: the structure. shapes: of its leaves.
    """

    numbers: jax.Array | np.ndarray
    tree: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, numbers: Any) -> "Logged":
        """Of a tree of float32 arrays."""
        leaves, tree = jax.tree.flatten(numbers)
        whole = jnp.concatenate([jnp.ravel(leaf).astype(jnp.float32) for leaf in leaves])
        return cls(whole, tree, tuple(jnp.shape(leaf) for leaf in leaves))

    def as_tree(self) -> Any:
        """The tree again, of numbers and lists of numbers."""
        numbers = np.asarray(self.numbers)
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = zip(np.split(numbers, ends), self.shapes, strict=True)
        return self.tree.unflatten(part.reshape(shape).tolist() for part, shape in parts)
