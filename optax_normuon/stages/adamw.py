"""AdamW, for what is no matrix: embeddings, output heads, norms, biases."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_normuon.leaves.precision import map_updates


def scale_by_adam(
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    eps_root: ArrayLike,
    *,
    nesterov: bool,
    moment_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with two differences.

    A parameter without gradient keeps its moments. A first moment in half precision is widened before
    the arithmetic: Optax multiplies a bfloat16 one by b1 in bfloat16, where 0.9 is 0.8984.

    Raises:
      ValueError: `moment_dtype` is no floating dtype.
    """
    if moment_dtype is not None and not jnp.issubdtype(moment_dtype, jnp.floating):
        raise ValueError(
            f"adam_moment_dtype={jnp.dtype(moment_dtype)} cannot hold a mean of gradients; use a"
            " floating dtype, such as jnp.bfloat16 or jnp.float32, or None."
        )
    adam = optax.scale_by_adam(
        b1=b1, b2=b2, eps=eps, eps_root=eps_root, mu_dtype=moment_dtype, nesterov=nesterov
    )

    def where_given(
        updates: optax.Updates, new: optax.Updates, old: optax.Updates
    ) -> optax.Updates:
        """`new` where there is a gradient, and `old` elsewhere."""
        return jax.tree.map(
            lambda g, new, old: old if g is None else new,
            *(updates, new, old),
            is_leaf=lambda leaf: leaf is None,
        )

    def update(
        updates: optax.Updates, state, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        given = where_given(updates, updates, jax.tree.map(jnp.zeros_like, state.nu))
        wide = jax.tree.map(lambda m, n: m.astype(n.dtype), state.mu, state.nu)
        # Optax raises a float to its integer step count, which callers' strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            directions, new = adam.update(given, state._replace(mu=wide))
        assert isinstance(new, optax.ScaleByAdamState)
        kept = new._replace(
            mu=where_given(updates, new.mu, state.mu), nu=where_given(updates, new.nu, state.nu)
        )
        return map_updates(lambda _, direction: direction, updates, directions), kept

    return optax.GradientTransformation(adam.init, update)
