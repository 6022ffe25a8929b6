"""Looking tokens up in a table, with a gradient that is the same on every run.

The gradient of a lookup adds the rows of all places of a token. On a GPU, XLA does so by atomic
additions, in an order that differs from run to run, and in the dtype of the activations: in bfloat16
the sum of a frequent token stops growing. The additions to one row also wait for each other. Here the
gradient is a product with the tokens' one-hot rows, summed in float32, which costs what one of the
output head's three products costs.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Embedding(nnx.Embed):
    """`nnx.Embed`, whose table gets its gradient from `lookup`."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return lookup(self.embedding[...].astype(self.dtype), inputs)


@jax.custom_vjp
def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table.

    Args:
      table: (vocabulary, width), a float dtype.
      tokens: any shape, an integer dtype.

    Returns:
      The tokens' shape and the width, in the table's dtype.
    """
    return jnp.take(table, tokens, axis=0)


def _forward(table, tokens):
    return lookup(table, tokens), (table, tokens)


def _backward(kept, gradient):
    table, tokens = kept
    vocabulary, width = table.shape
    chosen = jax.nn.one_hot(tokens.reshape(-1), vocabulary, dtype=gradient.dtype)
    summed = jax.lax.dot_general(
        chosen,
        gradient.reshape(-1, width),
        (((0,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,  # A GPU would round float32 to TF32 before a product.
        preferred_element_type=jnp.float64 if gradient.dtype == jnp.float64 else jnp.float32,
    )
    return summed.astype(table.dtype), None


lookup.defvjp(_forward, _backward)
