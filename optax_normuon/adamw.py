"""AdamW, for what is no matrix: embeddings, output heads, norms, biases."""

from collections.abc import Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from optax_normuon.multipliers import Multipliers
from optax_normuon.paths import named_leaves
from optax_normuon.precision import map_updates


def scale_by_adam(
    b1, b2, eps, eps_root, *, nesterov: bool, moment_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, in which a parameter without gradient keeps its moments.

    A narrow first moment is widened before the arithmetic. (Optax multiplies a bfloat16 one by b1 in
    bfloat16, where 0.9 is 0.8984.)

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

    def where_given(updates, new, old):
        return jax.tree.map(
            lambda g, new, old: old if g is None else new,
            *(updates, new, old),
            is_leaf=lambda leaf: leaf is None,
        )

    def update(updates, state: Any, params=None):
        given = where_given(updates, updates, jax.tree.map(jnp.zeros_like, state.nu))
        wide = jax.tree.map(lambda m, n: m.astype(n.dtype), state.mu, state.nu)
        # Optax raises a float to its integer step count, which callers' strict promotion forbids.
        with jax.numpy_dtype_promotion("standard"):
            directions, new = cast(tuple[Any, Any], adam.update(given, state._replace(mu=wide)))
        kept = new._replace(
            mu=where_given(updates, new.mu, state.mu), nu=where_given(updates, new.nu, state.nu)
        )
        return map_updates(lambda _, direction: direction, updates, directions), kept

    return optax.GradientTransformation(adam.init, update)


def check_others(others: Any, given: Iterable[str]) -> None:
    """Refuses an `others` that is no transformation, and AdamW's keywords beside it.

    Args:
      given: the names of all arguments that the caller gave.

    Raises:
      TypeError: `others` is no `optax.GradientTransformation`.
      ValueError: there is a keyword of AdamW's.
    """
    if others is None:
        return
    if not isinstance(others, optax.GradientTransformation):
        raise TypeError(
            f"others={others!r} is no optax.GradientTransformation; give one, such as"
            " optax.lion(1e-4), or None for AdamW."
        )
    unused = [name for name in given if name.startswith("adam_")]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} would do nothing: `others` takes AdamW's place. Say these in"
            " `others`, as in others=optax.adamw(3e-3, b2=0.95), or leave `others` out."
        )


def check_no_multipliers(params: Any, matrices: Iterable[Any], factors: Multipliers, what: str):
    """Refuses factors on leaves that `others` trains: it would not hear of them.

    Args:
      matrices: the key paths of the leaves that are matrices.

    Raises:
      ValueError: it names the leaf.
    """
    for path, name, _ in named_leaves(params):
        factor = factors.on(path)
        if path not in matrices and not (
            isinstance(factor, int | float | np.generic) and factor == 1
        ):
            raise ValueError(
                f"{name}: {what}={factor} would do nothing, for `others` trains this leaf; leave it out"
                f" of {what}, and scale inside `others` with optax.partition or optax.masked."
            )
