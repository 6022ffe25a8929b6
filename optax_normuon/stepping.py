"""A whole step in one call: new parameters in place of updates."""

from typing import Any, TypeVar

import jax
import optax

from optax_normuon.leaves.parameters import require_params
from optax_normuon.steps.in_place import update_in_place

Params = TypeVar("Params", bound=optax.Params)
"""The parameters come back as the type of tree that they were given as."""


def apply(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: Params,
    **extra_args: Any,
) -> tuple[Params, optax.OptState]:
    """New parameters and state: bit for bit `tx.update` and `optax.apply_updates`, in fewer passes.

    Where the kernels step a matrix and nothing behind them reads its update, they add it to the
    parameter themselves, with the same two roundings: the update's 8 bytes a float32 parameter and
    the pass that adds it are saved. That holds for `normuon`, for `with_bf16_remainder`, and for any
    chain, partition, mask or injection that ends with them. For all else, and without kernels, it is
    the two calls. Call it inside of `jax.jit`, with parameters and state donated:

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def step(grads, params, state):
            params, state = optax_normuon.apply(tx, grads, state, params)
            return params, state

    Args:
      tx: any transformation. It is traced twice, the first time without the matrices' step.
      grads, state, params: as for `tx.update`.
      **extra_args: for `tx.update`.

    Returns:
      The new parameters, in their own dtypes, and the new state.

    Raises:
      ValueError, TypeError: as `tx.update`.
    """
    require_params(params)
    leaves, state = update_in_place(tx, grads, state, params, **extra_args)
    new = [made if stepped else optax.apply_updates(leaf, made) for leaf, made, stepped in leaves]
    return jax.tree.unflatten(jax.tree.structure(params), new), state
