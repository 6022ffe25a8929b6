"""The working dtype: what elementwise arithmetic and optimizer state use, whatever the weights use."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from optax_normuon.leaves.parameters import check_leaves, check_trainable


def working_dtype(dtype: DTypeLike) -> jnp.dtype:
    """float32 for the floating dtypes narrower than it; every other dtype as it is."""
    narrow = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if narrow else dtype)


def as_schedule(value: optax.ScalarOrSchedule) -> optax.Schedule:
    """A number, a traced scalar or a schedule, as a schedule."""
    return cast(optax.Schedule, value) if callable(value) else lambda count: value


def cast_leaf(
    leaf: ArrayLike | jax.ShapeDtypeStruct, dtype: DTypeLike
) -> jax.Array | jax.ShapeDtypeStruct:
    """The array, or the abstract `jax.ShapeDtypeStruct`, in another dtype."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.update(dtype=dtype)
    return jnp.asarray(leaf).astype(dtype)


def map_updates(function: Callable, updates: optax.Updates, *rest: optax.Updates) -> optax.Updates:
    """`jax.tree.map` that leaves the `None` of a parameter without gradient as it is."""
    return jax.tree.map(
        lambda update, *others: None if update is None else function(update, *others),
        updates,
        *rest,
        is_leaf=lambda leaf: leaf is None,
    )


def lift(tree: optax.Params) -> optax.Params:
    """Every leaf in its working dtype: half precision as float32, the rest as it is."""
    return map_updates(lambda leaf: cast_leaf(leaf, working_dtype(leaf.dtype)), tree)


def in_working_precision(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` on parameters and gradients in their working dtype.

    State that `inner` derives from the parameters' dtype becomes float32 for half-precision
    parameters; the updates are rounded once, at the end, to the parameter's dtype (or, without
    parameters, to the gradient's).
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.OptState:
        check_trainable(params)
        return inner.init(lift(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is not None:
            check_leaves(updates, params)
        like = updates if params is None else params
        lifted = None if params is None else lift(params)
        # A gradient in another precision than its parameter's follows the parameter.
        gradients = map_updates(lambda g, p: g.astype(working_dtype(p.dtype)), updates, like)
        updates, state = inner.update(gradients, state, lifted, **extra_args)
        return map_updates(lambda u, p: u.astype(p.dtype), updates, like), state

    return optax.GradientTransformationExtraArgs(init, update)
