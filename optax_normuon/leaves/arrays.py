"""Names for arrays in annotations: what their axes are.

They help readers and type checkers. At run time each is `jax.Array`, so that the package needs no
jaxtyping.
"""

from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    Matrices = Float[Array, "matrices rows columns"]
    Statistics = Float[Array, "matrices #rows #columns"]
else:
    Matrices = jax.Array
    """A batch of matrices, or one device's parts of them."""

    Statistics = jax.Array
    """One or more numbers for each matrix of a batch: a side that is reduced has size 1."""
