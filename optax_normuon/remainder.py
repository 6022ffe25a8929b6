"""bf16 parameters without loss: the low 16 bits of a float32 weight kept beside its high 16 bits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_normuon.leaves.parameters import check_trainable, require_params
from optax_normuon.leaves.precision import map_updates


class Bf16RemainderState(NamedTuple):
    """The state of `with_bf16_remainder`.

    Attributes:
      remainder: a tree like the parameters, uint16, with `optax.MaskedNode` for a parameter that is not
        bfloat16.
      inner: the wrapped transformation's state.
    """

    remainder: optax.Updates
    inner: optax.OptState


def with_bf16_remainder(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 parameters as exactly as float32 ones, for 2 extra bytes a parameter.

    A bfloat16 parameter is taken as the high half of a float32 weight (truncated, not rounded) whose
    low half is this transformation's state. `inner` sees the joined float32 weight. The updates handed
    out for such parameters are float32 and make `optax.apply_updates` land on the new weight's high
    half; so nothing may be chained behind this transformation. Given equal gradients, the joined
    weight equals that of a float32 run bit for bit. Source: modded-nanogpt, f411b3d3 (2026-08-01).

    Where the new weight is more than 2^16 times smaller than the old one, no float32 update lands on
    its high half: parameter + update has an error of up to half a unit in the last place of the old
    weight. The joined weight is then what the parameter did land on, with a remainder of zero.

    Args:
      inner: any transformation; it must not be stateful in the parameters' dtype otherwise than
        through the parameters it is given.

    Returns:
      A transformation that needs parameters. Leaves that are not bfloat16 go to `inner` as they are.

    Raises:
      ValueError: `update` is called without parameters.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> Bf16RemainderState:
        check_trainable(params)
        remainder = jax.tree.map(
            lambda p: jnp.zeros(p.shape, jnp.uint16) if _is_bf16(p) else optax.MaskedNode(), params
        )
        return Bf16RemainderState(remainder, inner.init(join(params, remainder)))

    def update(updates, state, params=None, **extra_args):
        params = require_params(params)
        joined = join(params, state.remainder)
        gradients = map_updates(lambda g, p: g.astype(p.dtype), updates, joined)
        deltas, inner_state = inner.update(gradients, state.inner, joined, **extra_args)
        deltas = map_updates(_rounded, deltas)

        def landing(delta, weight, p):
            if not _is_bf16(p):
                return delta
            return _high_half(weight + delta) - p.astype(jnp.float32)

        def rest(old, p, delta, weight):
            if delta is None or not _is_bf16(p):
                return old
            new = weight + delta
            landed = (p.astype(jnp.float32) + landing(delta, weight, p)).astype(jnp.bfloat16)
            hit = landed.astype(jnp.float32) == _high_half(new)
            return jnp.where(hit, _low_bits(new), jnp.uint16(0))

        handed_out = map_updates(landing, deltas, joined, params)
        tree = jax.tree.structure(params)
        remainder = tree.unflatten(
            rest(*each)
            for each in zip(
                *map(tree.flatten_up_to, (state.remainder, params, deltas, joined)), strict=True
            )
        )
        return handed_out, Bf16RemainderState(remainder, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def join(params: optax.Params, remainder: optax.Params) -> optax.Params:
    """The float32 weights whose high halves are the bfloat16 parameters; other leaves unchanged.

    Args:
      params: arrays or abstract arrays. remainder: `Bf16RemainderState.remainder`.
    """
    tree = jax.tree.structure(params)
    return tree.unflatten(
        _join_leaf(p, low) if _is_bf16(p) else p
        for p, low in zip(jax.tree.leaves(params), tree.flatten_up_to(remainder), strict=True)
    )


def _rounded(delta: jax.Array) -> jax.Array:
    """`delta`, rounded before anything is added to it.

    Compilers contract weight + rate * v into one operation with one rounding; a float32 run, whose
    updates are handed out, rounds twice. XLA drops an optimization barrier before it fuses on the
    CPU; a select that no compiler can decide stays.
    """
    return jnp.where(jnp.isnan(delta), jnp.nan, delta)


def _is_bf16(leaf) -> bool:
    return leaf.dtype == jnp.bfloat16


def _join_leaf(
    p: jax.Array | jax.ShapeDtypeStruct, low: jax.Array
) -> jax.Array | jax.ShapeDtypeStruct:
    if isinstance(p, jax.ShapeDtypeStruct):
        return p.update(dtype=jnp.float32)
    high = jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(high << 16 | low.astype(jnp.uint32), jnp.float32)


def _high_half(weight: jax.Array) -> jax.Array:
    """The float32 number of the weight's high 16 bits: the weight truncated to bfloat16."""
    bits = jax.lax.bitcast_convert_type(weight, jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)


def _low_bits(weight: jax.Array) -> jax.Array:
    return (jax.lax.bitcast_convert_type(weight, jnp.uint32) & 0xFFFF).astype(jnp.uint16)
