"""Checks of the parameters, and of the gradients that come with them."""

import jax.numpy as jnp
import optax

from optax_normuon.leaves.paths import named_leaves


def require_params(params: optax.Params | None) -> optax.Params:
    """The parameters, where an update needs them.

    Raises:
      ValueError: they are missing. It is the error that Optax raises.
    """
    if params is not None:
        return params
    # The message itself is not public: let a public transformation raise it.
    optax.add_decayed_weights(1.0).update((), optax.EmptyState(), None)
    raise AssertionError("Optax has accepted an update without parameters")


def check_trainable(params: optax.Params) -> None:
    """Checks that every leaf is a real floating-point array, or stands for one.

    Raises:
      TypeError: a leaf is none; it names the leaf.
    """
    for _, name, leaf in named_leaves(params):
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise TypeError(
                f"{name}: a leaf of type {type(leaf).__name__} is no array, and cannot be trained. Give"
                " the optimizer arrays alone: eqx.filter(model, eqx.is_inexact_array) for an Equinox"
                " model, nnx.state(model, nnx.Param) for Flax NNX; or jnp.asarray(...) of a number that"
                " is to be trained."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{name}: dtype {leaf.dtype} has no NorMuon or AdamW update; parameters must be real"
                " floating point. Leave the leaf out with optax.masked or eqx.filter(model,"
                " eqx.is_inexact_array), or split a complex one into its real and imaginary parts."
            )


def check_leaves(updates: optax.Updates, params: optax.Params) -> None:
    """Checks that every gradient has a parameter of its shape; parameters without gradient are fine.

    Raises:
      ValueError: a gradient has none; it names the leaf.
      TypeError: see `check_trainable`.
    """
    check_trainable(params)
    check_trainable(updates)
    shapes = {path: leaf.shape for path, _, leaf in named_leaves(params)}
    for path, name, leaf in named_leaves(updates):
        if path not in shapes:
            raise ValueError(f"{name}: a gradient without a parameter. {_REMEDY}")
        if leaf.shape != shapes[path]:
            raise ValueError(
                f"{name}: a gradient of shape {leaf.shape} for a parameter of shape {shapes[path]}."
                f" {_REMEDY}"
            )


_REMEDY = "Pass the parameters that the gradients were taken of."
