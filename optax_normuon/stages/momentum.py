"""Stage 1: the momentum of each leaf, whatever its shape."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from normuon_core.hyperparameters import check_decay
from normuon_core.recipes import Momentum
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, Views
from optax_normuon.leaves.parameters import check_trainable
from optax_normuon.leaves.precision import as_schedule, lift, map_updates, working_dtype
from optax_normuon.mesh.specs import Specs, SpecTree
from optax_normuon.stages.int8_momentum import Int8Leaves


class MomentumState(NamedTuple):
    """The state of a momentum.

    Attributes:
      count: steps done, int32.
      momentum: a tree like the parameters.
    """

    count: ArrayLike
    momentum: optax.Params


class Int8MomentumState(NamedTuple):
    """The state of a momentum that is kept in int8.

    Attributes:
      count: steps done, int32.
      momentum: a tree like the parameters: int8 for matrices, floats for leaves that are none.
      momentum_scale: a tree like the parameters without their boxes: for matrices bfloat16 of the leaf's
        rank, one number for each block; `optax.MaskedNode` for other leaves.
    """

    count: ArrayLike
    momentum: optax.Params
    momentum_scale: optax.Params


@refuse_injection_of_static_arguments
def lerp_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
    layout: LayoutTree | Views = None,
    param_specs: SpecTree | Specs = None,
) -> optax.GradientTransformation:
    """An exponential mean of the gradients: m <- m + (1 - mu)(g - m), from m = 0.

    No bias correction: the polar factor that follows does not feel the scale of its input.
    Nesterov hands on u = g + mu (m - g), else u = m. NorMuon (arXiv 2510.05491) and modded-nanogpt
    since 2024-11 use this momentum; `optax.ema` is close, without Nesterov.

    Args:
      momentum: mu, a number or a schedule.
      nesterov: whether u looks one step ahead.
      momentum_dtype: dtype in which m is kept: a floating one, or "int8", which is for matrices, in
        blocks of 32 with a scale each; None is float32, or the leaf's where that is wider.
      layout, param_specs: for "int8" alone, whose blocks lie along a matrix's inputs: see `normuon`.

    Returns:
      A transformation of any tree. u is float32, or the leaf's dtype where that is wider.
    """

    def direction(m, g, mu, t):
        del t
        return g + mu * (m - g) if nesterov else m

    return _momentum(_lerp, direction, momentum, _Keeping(momentum_dtype, layout, param_specs))


@refuse_injection_of_static_arguments
def heavy_ball_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
    layout: LayoutTree | Views = None,
    param_specs: SpecTree | Specs = None,
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

    return _momentum(accumulate, direction, momentum, _Keeping(momentum_dtype, layout, param_specs))


@refuse_injection_of_static_arguments
def bias_corrected_momentum(
    momentum: optax.ScalarOrSchedule = 0.95,
    *,
    nesterov: bool = True,
    momentum_dtype: DTypeLike | None = None,
    layout: LayoutTree | Views = None,
    param_specs: SpecTree | Specs = None,
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

    return _momentum(_lerp, direction, momentum, _Keeping(momentum_dtype, layout, param_specs))


_RULES = {
    "lerp": lerp_momentum,
    "heavy_ball": heavy_ball_momentum,
    "bias_corrected": bias_corrected_momentum,
}


def momentum_stage(record: Momentum, **keywords: Any) -> optax.GradientTransformation:
    """Stage 1 as a recipe's record describes it; keywords as `lerp_momentum`'s."""
    return _RULES[record.rule](record.momentum, nesterov=record.nesterov, **keywords)


def check_momentum_dtype(dtype: DTypeLike | None) -> None:
    """Raises a ValueError unless momentum can be kept in this dtype."""
    if dtype is None or jnp.issubdtype(dtype, jnp.floating) or is_int8(dtype):
        return
    raise ValueError(
        f"momentum_dtype={jnp.dtype(dtype).name!r} cannot hold a mean of gradients; use a floating"
        " dtype, such as jnp.bfloat16, or 'int8', or None."
    )


def is_int8(dtype: DTypeLike | None) -> bool:
    """Whether momentum is kept in int8."""
    return dtype is not None and jnp.dtype(dtype) == jnp.int8


def _lerp(m: jax.Array, g: jax.Array, mu: jax.Array) -> jax.Array:
    return m + (1 - mu) * (g - m)


class _Keeping(NamedTuple):
    """How a momentum is kept between steps: the keywords of these names."""

    momentum_dtype: DTypeLike | None
    layout: LayoutTree | Views
    param_specs: SpecTree | Specs


def _momentum(
    accumulate: Callable[..., jax.Array],
    direction: Callable[..., jax.Array],
    momentum: optax.ScalarOrSchedule,
    keeping: _Keeping,
) -> optax.GradientTransformation:
    """The momentum m <- accumulate(m, g, mu) that hands on u = direction(m, g, mu, t), t = 1 at first.

    mu is rounded to the working dtype before use, so that a number, a tracer and a schedule agree. u is
    of the m that is not rounded yet.

    Raises:
      ValueError: `momentum` is a number outside [0, 1), or a dtype that cannot hold it.
    """
    check_decay("momentum", momentum)
    check_momentum_dtype(keeping.momentum_dtype)
    schedule = as_schedule(momentum)

    def init(params: optax.Params) -> MomentumState | Int8MomentumState:
        check_trainable(params)
        count, dtype = jnp.zeros([], jnp.int32), keeping.momentum_dtype
        if is_int8(dtype):
            leaves = Int8Leaves.of(keeping.layout, keeping.param_specs, params)
            return Int8MomentumState(count, *leaves.zeros(params))
        zeros = map_updates(
            lambda p: jnp.zeros_like(p, dtype=dtype or working_dtype(p.dtype)), params
        )
        return MomentumState(count, zeros)

    def update(updates, state, params=None):
        mu = schedule(state.count)
        count = optax.safe_increment(state.count)
        gradients = lift(updates)

        def accumulate_leaf(g: jax.Array, m: jax.Array) -> jax.Array:
            return accumulate(m.astype(g.dtype), g, jnp.asarray(mu, g.dtype))

        def direction_leaf(g: jax.Array, m: jax.Array) -> jax.Array:
            return direction(m, g, jnp.asarray(mu, g.dtype), jnp.asarray(count, g.dtype))

        if is_int8(keeping.momentum_dtype):
            like = updates if params is None else params
            leaves = Int8Leaves.of(keeping.layout, keeping.param_specs, like)
            before = leaves.read(state.momentum, state.momentum_scale, gradients)
            accumulated = map_updates(accumulate_leaf, gradients, before)
            directions = map_updates(direction_leaf, gradients, accumulated)
            kept = leaves.kept(accumulated, state.momentum, state.momentum_scale)
            return directions, Int8MomentumState(count, *kept)
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
