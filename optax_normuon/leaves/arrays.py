"""Names for arrays in annotations: what their axes are. To a type checker each is `jax.Array`."""

from typing import Annotated

import jax

Matrices = Annotated[jax.Array, "matrices, rows, columns"]
"""A batch of matrices, or one device's parts of them; any floating dtype."""

Statistics = Annotated[jax.Array, "matrices, rows or 1, columns or 1"]
"""One or more numbers for each matrix of a batch: a side that is reduced has size 1."""
