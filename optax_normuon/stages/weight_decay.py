"""Stage 4: weight decay where it agrees with the update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from normuon_core.hyperparameters import check_rate
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.multipliers import Multipliers, MultiplierTree, resolve_multipliers
from optax_normuon.leaves.parameters import check_leaves, require_params
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.leaves.precision import as_schedule, working_dtype


class WeightDecayState(NamedTuple):
    """The state of a weight decay.

    Attributes:
      count: steps done, int32.
    """

    count: ArrayLike


@refuse_injection_of_static_arguments
def add_cautious_weight_decay(
    weight_decay: optax.ScalarOrSchedule,
    *,
    cautious: bool = True,
    wd_mul: MultiplierTree = None,
    layout: LayoutTree = None,
) -> optax.GradientTransformation:
    """Adds lambda p where the update (before its sign flip) and the parameter agree in sign.

    v <- v + lambda wd_mul [v p >= 0] p: an entry decays only while the step that follows pulls it
    towards zero as well; a zero update decays. Source: arXiv 2510.12402. Stands between the last
    `scale_by_...` and `optax.scale_by_learning_rate`, as `optax.add_decayed_weights` does.

    Args:
      weight_decay: lambda, a number or a schedule.
      cautious: False adds lambda wd_mul p everywhere: plain decoupled decay with the same multipliers.
      wd_mul: see `normuon`.
      layout: see `normuon`; only the batch axes of arrays in `wd_mul` depend on it.

    Returns:
      A transformation of any tree: float32 arithmetic, or the update's dtype where that is wider.

    Raises:
      ValueError: a negative `weight_decay`, `update` without parameters, or `wd_mul` does not fit.
    """
    check_rate("weight_decay", weight_decay)
    schedule = as_schedule(weight_decay)

    def init(params: optax.Params) -> WeightDecayState:
        _multipliers(params)
        return WeightDecayState(jnp.zeros([], jnp.int32))

    def _multipliers(params: optax.Params) -> Multipliers:
        views = resolve_layouts(layout, params) if wd_mul is not None else Views()
        return resolve_multipliers(wd_mul, params, views, what="wd_mul")

    def update(updates, state, params=None):
        params = require_params(params)
        check_leaves(updates, params)
        factors = _multipliers(params)

        def decay(path: KeyPath, v: jax.Array | None, p: jax.Array) -> jax.Array | None:
            if v is None:
                return None
            v = v.astype(working_dtype(v.dtype))
            amount = jnp.asarray(schedule(state.count), v.dtype) * jnp.asarray(
                factors.on(path), v.dtype
            )
            return v + decay_term(v, p.astype(v.dtype), amount, cautious=cautious)

        updates = jax.tree_util.tree_map_with_path(
            decay, updates, params, is_leaf=lambda leaf: leaf is None
        )
        return updates, WeightDecayState(optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def decay_term(v: jax.Array, p: jax.Array, amount: jax.Array, *, cautious: bool) -> jax.Array:
    """What decay adds to an update v of p: amount [v p >= 0] p if `cautious`, else amount p.

    All arrays have one dtype.
    """
    decayed = amount * p
    # Not v * p >= 0: a product of opposite signs that underflows to zero would count as agreement.
    return jnp.where(jnp.sign(v) * jnp.sign(p) >= 0, decayed, 0) if cautious else decayed
