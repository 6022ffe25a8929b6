"""Stage 1: the momentum of each leaf, whatever its shape."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from normuon_core.hyperparameters import check_decay
from normuon_core.recipes import Momentum
from optax_normuon.leaves.parameters import check_trainable
from optax_normuon.leaves.precision import as_schedule, lift, map_updates, working_dtype


class MomentumState(NamedTuple):
    """The state of a momentum.

    Attributes:
      count: steps done, int32.
      momentum: a tree like the parameters.
    """

    count: ArrayLike
    momentum: optax.Params


def lerp_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """An exponential mean of the gradients: m <- m + (1 - mu)(g - m), from m = 0.

    No bias correction: the polar factor that follows does not feel the scale of its input.
    Nesterov hands on u = g + mu (m - g), else u = m. NorMuon (arXiv 2510.05491) and modded-nanogpt
    since 2024-11 use this momentum; `optax.ema` is close, without Nesterov.

    Args:
      momentum: mu, a number or a schedule.
      nesterov: whether u looks one step ahead.
      momentum_dtype: dtype of m; None is float32, or the leaf's where that is wider.

    Returns:
      A transformation of any tree. u is float32, or the leaf's dtype where that is wider.
    """

    def direction(m, g, mu, t):
        del t
        return g + mu * (m - g) if nesterov else m

    return _momentum(_lerp, direction, momentum, momentum_dtype)


def heavy_ball_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """A decaying sum of the gradients: m <- mu m + g, from m = 0.

    Nesterov hands on u = g + mu m, else u = m. The same numbers as `optax.trace`, which takes no
    schedule and rounds u to the gradient's dtype. Arguments and result as `lerp_momentum`'s.
    """

    def accumulate(m, g, mu):
        return mu * m + g

    def direction(m, g, mu, t):
        del t
        return g + mu * m if nesterov else m

    return _momentum(accumulate, direction, momentum, momentum_dtype)


def bias_corrected_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Optax's own: `lerp_momentum` with its terms corrected for the start at zero.

    u = mu m / (1 - mu^(t+1)) + (1 - mu) g / (1 - mu^t) with Nesterov (as in NAdam), else
    m / (1 - mu^t), t from 1; under a schedule the current mu stands in the powers. Source:
    `optax.contrib.scale_by_muon`. Arguments and result as `lerp_momentum`'s.
    """

    def direction(m, g, mu, t):
        if not nesterov:
            return m / (1 - mu**t)
        return mu * m / (1 - mu ** (t + 1)) + (1 - mu) * g / (1 - mu**t)

    return _momentum(_lerp, direction, momentum, momentum_dtype)


_RULES = {
    "lerp": lerp_momentum,
    "heavy_ball": heavy_ball_momentum,
    "bias_corrected": bias_corrected_momentum,
}


def momentum_stage(
    record: Momentum, *, momentum_dtype: DTypeLike | None
) -> optax.GradientTransformation:
    """Stage 1 as a recipe's record describes it."""
    return _RULES[record.rule](
        record.momentum, nesterov=record.nesterov, momentum_dtype=momentum_dtype
    )


def _lerp(m: jax.Array, g: jax.Array, mu: jax.Array) -> jax.Array:
    return m + (1 - mu) * (g - m)


def _momentum(
    accumulate: Callable[..., jax.Array],
    direction: Callable[..., jax.Array],
    momentum: optax.ScalarOrSchedule,
    momentum_dtype: DTypeLike | None,
) -> optax.GradientTransformation:
    """The momentum m <- accumulate(m, g, mu) that hands on u = direction(m, g, mu, t), t = 1 at first.

    mu is rounded to the working dtype before use, so that a number, a tracer and a schedule agree.

    Raises:
      ValueError: `momentum` is a number outside [0, 1).
    """
    check_decay("momentum", momentum)
    schedule = as_schedule(momentum)

    def init(params: optax.Params) -> MomentumState:
        check_trainable(params)
        return MomentumState(
            count=jnp.zeros([], jnp.int32),
            momentum=map_updates(
                lambda p: jnp.zeros_like(p, dtype=momentum_dtype or working_dtype(p.dtype)), params
            ),
        )

    def update(updates, state, params=None):
        del params
        mu = schedule(state.count)
        count = optax.safe_increment(state.count)
        gradients = lift(updates)

        def accumulate_leaf(g: jax.Array, m: jax.Array) -> jax.Array:
            return accumulate(m.astype(g.dtype), g, jnp.asarray(mu, g.dtype))

        def direction_leaf(g: jax.Array, m: jax.Array) -> jax.Array:
            return direction(m, g, jnp.asarray(mu, g.dtype), jnp.asarray(count, g.dtype))

        accumulated = map_updates(accumulate_leaf, gradients, state.momentum)
        directions = map_updates(direction_leaf, gradients, accumulated)
        kept = jax.tree.map(
            lambda m, old: old if m is None else m.astype(old.dtype),
            accumulated,
            state.momentum,
            is_leaf=lambda leaf: leaf is None,
        )
        return directions, MomentumState(count, kept)

    return optax.GradientTransformation(init, update)
