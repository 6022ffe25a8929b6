"""What a step does to the blocks' matrices: means over all of them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.optimizers import compute_dtype, is_matrix
from normuon_core.recipes import Recipe
from optax_normuon import orthogonality_errors, update_diagnostics
from studies.parts.arms import CLIP
from studies.training import Inspect, Measured

MEASURES = (
    "update_neurons",
    "update_singular",
    "weight_neurons",
    "weight_singular",
    "orthogonality_error",
    "masked",
)
"""Spread of neuron norms and of squared singular values, of updates and of weights; distance of the
polar factor from an orthogonal matrix; share of entries that cautious decay leaves out, or would."""


def measures(recipe: Recipe | None) -> Inspect:
    """Of an arm; without a recipe (AdamW) there is no polar factor, and its error is NaN."""

    def inspect(tx: optax.GradientTransformation, grads: Any, state: Any, params: Any) -> Measured:
        updates, _ = tx.update(grads, state, params)
        numbers = update_diagnostics(updates, params)
        blocks = [found for path, found in numbers.items() if path.startswith("blocks/")]
        weights, steps = _matrices(params), _matrices(updates)
        return {
            "update_neurons": _mean([found.neuron_norm_spread for found in blocks]),
            "update_singular": _mean(map(singular_spread, steps)),
            "weight_neurons": _mean(map(neuron_spread, weights)),
            "weight_singular": _mean(map(singular_spread, weights)),
            "orthogonality_error": _error(recipe, grads, state, params),
            "masked": _mean([found.masked_decay for found in blocks]),
        }

    return inspect


def neuron_spread(matrix: jax.Array) -> jax.Array:
    """Standard deviation of the output neurons' norms over their mean; `matrix` is (in, out)."""
    norms = jnp.sqrt(jnp.square(matrix).sum(0))
    return norms.std() / norms.mean()


def singular_spread(matrix: jax.Array) -> jax.Array:
    """Standard deviation of the squared singular values over their mean: 0 of an orthogonal matrix.

    With G the Gram matrix of the shorter side, of k rows: sum s^2 = tr G and sum s^4 = |G|_F^2, so that
    the squared spread is k |G|_F^2 / (tr G)^2 - 1. It takes one product and no decomposition.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / jnp.sqrt(jnp.square(x).sum())  # so that nothing underflows in the fourth power
    gram = jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.sqrt(jnp.maximum(0.0, len(gram) * jnp.square(gram).sum() - 1.0))


def _error(recipe: Recipe | None, grads: Any, state: Any, params: Any) -> jax.Array:
    if recipe is None:
        return jnp.float32(jnp.nan)
    clip = optax.clip_by_global_norm(CLIP)
    clipped, _ = clip.update(grads, clip.init(params))
    errors = orthogonality_errors(
        clipped, state, params, recipe=recipe, compute_dtype=compute_dtype()
    )
    return _mean(errors.values())


def _matrices(tree: Any) -> list[jax.Array]:
    return [x for path, x in jax.tree_util.tree_leaves_with_path(tree) if is_matrix(path)]


def _mean(values) -> jax.Array:
    return jnp.stack([jnp.mean(value) for value in values]).mean()
