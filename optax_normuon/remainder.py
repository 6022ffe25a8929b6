"""bf16 parameters without loss: the low 16 bits of a float32 weight kept beside its high 16 bits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_normuon.leaves.parameters import check_trainable, require_params
from optax_normuon.leaves.precision import map_updates
from optax_normuon.steps.in_place import has_stepped, may_step, stand_ins, update_in_place


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
        if (stand_in := stand_ins(params, _dtype_of_update)) is not None:
            return stand_in, state
        tree = jax.tree.structure(params)
        joined = join(params, state.remainder)
        gradients = map_updates(lambda g, p: g.astype(p.dtype), updates, joined)
        # Of a joined weight the new one is wanted, and of any other leaf the update.
        wanted = [_is_bf16(p) for p in jax.tree.leaves(params)]
        made, inner_state = update_in_place(
            inner, gradients, state.inner, joined, wanted=wanted, **extra_args
        )
        handed_out, remainder = [], []
        for p, low, (weight, result, stepped) in zip(
            jax.tree.leaves(params), tree.flatten_up_to(state.remainder), made, strict=True
        ):
            if result is None or not _is_bf16(p):
                handed_out.append(result)
                remainder.append(low)
                continue
            new = result if stepped else weight + _rounded(result)
            update, landed, low = _land(p, new)
            if may_step(p):
                has_stepped(p)
                update = landed
            handed_out.append(update)
            remainder.append(low)
        state = Bf16RemainderState(tree.unflatten(remainder), inner_state)
        return tree.unflatten(handed_out), state

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


def _dtype_of_update(leaf: jax.Array) -> DTypeLike:
    return jnp.float32 if _is_bf16(leaf) else leaf.dtype


def _land(p: jax.Array, new: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the update of a bfloat16 parameter, where it lands with it, the low bits of what it stands for).

    Args:
      new: the joined weight to land on.
    """
    update = _high_half(new) - p.astype(jnp.float32)
    landed = (p.astype(jnp.float32) + update).astype(jnp.bfloat16)
    hit = landed.astype(jnp.float32) == _high_half(new)
    return update, landed, jnp.where(hit, _low_bits(new), jnp.uint16(0))


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
