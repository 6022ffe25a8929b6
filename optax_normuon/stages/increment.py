"""Stages 4 and 5 in the order that a recipe gives them."""

import jax
import jax.numpy as jnp
import optax

from normuon_core.recipes import Recipe
from optax_normuon.leaves.layout import Views
from optax_normuon.leaves.multipliers import Multipliers
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.stages.shape_scaling import scale_factor
from optax_normuon.stages.weight_decay import WeightDecayState, decay_term


def decay_and_scale(
    recipe: Recipe,
    decay_rate: optax.Schedule,
    views: Views,
    lr_factors: Multipliers,
    wd_factors: Multipliers,
) -> optax.GradientTransformation:
    """Stages 4 and 5 as the recipe orders them.

    The mask of cautious decay and the norm of the `rms` rule are those of the direction, before either
    stage, in both orders.
    """
    cautious, inside_scale = recipe.decay.cautious, recipe.decay.inside_scale

    def init(params: optax.Params) -> WeightDecayState:
        del params
        return WeightDecayState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        def finish(path: KeyPath, v: jax.Array | None, p: jax.Array) -> jax.Array | None:
            if v is None:
                return None
            scale = scale_factor(recipe.shape_scale, v, views[path], lr_factors.on(path))
            amount = jnp.asarray(decay_rate(state.count), v.dtype) * jnp.asarray(
                wd_factors.on(path), v.dtype
            )
            decay = decay_term(v, p, amount, cautious=cautious)
            return (v + decay) * scale if inside_scale else v * scale + decay

        updates = jax.tree_util.tree_map_with_path(
            finish, updates, params, is_leaf=lambda leaf: leaf is None
        )
        return updates, WeightDecayState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
