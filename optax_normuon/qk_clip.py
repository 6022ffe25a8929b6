"""QK-clip: attention logits bounded by scaling the weights of queries and keys after the step."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from normuon_core.attention_heads import HeadLayout, Heads, check_tau, module_of, parent_of
from optax_normuon.leaves.parameters import require_params
from optax_normuon.leaves.paths import KeyPath, named_leaves, unmet_pattern
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.mesh.collectives import everywhere

LargestLogits = Any
"""A tree of arrays, (query heads,) or (layers, query heads), at the paths of attention modules."""


def qk_clip(
    tau: ArrayLike, weights: Mapping[str, HeadLayout]
) -> optax.GradientTransformationExtraArgs:
    """Ends a chain: scales queries and keys of the heads whose largest logit was above tau.

    The rule of MuonClip. With S the largest logit of a head, q k / sqrt(size) over the batch and before
    any mask's minus infinity, gamma = min(1, tau / S), and

        w <- gamma^power (w + update)

    with a power of 1/2 for queries and keys. Queries take the gamma of their own head. A key that
    several heads share takes the smallest gamma of these, so that no head stays above tau. In latent
    attention a head's rotary queries take gamma itself, and the rotary key, which all heads share, is
    not scaled: see `HeadLayout`. Where gamma is 1, updates are handed on as they are, bit for bit.

        tx = optax.chain(
            optax.clip_by_global_norm(1.0),
            normuon(0.02),
            qk_clip(100.0, {"*/query/kernel": HeadLayout(heads=8), "*/key/kernel": HeadLayout(heads=2)}),
        )
        updates, state = tx.update(grads, state, params, largest_logits={"blocks/0/attention": s, ...})

    It stands last, behind the learning rate, for it scales what the step makes of the weights; within
    `with_bf16_remainder(optax.chain(normuon(...), qk_clip(...)))` it scales the whole float32 weights.
    Bfloat16 parameters without a remainder round a gamma near 1 away. Models that normalise queries and
    keys have no use for it: the norm divides the factor out.

    Args:
      tau: the largest logit that is allowed; Kimi K2 took 100.
      weights: from path patterns (`fnmatch` style, `*` crosses `/`) of the projections to queries and
        keys, and of their biases, to where their heads lie. The first pattern that fits counts.

    Returns:
      A stateless transformation that needs parameters, and `largest_logits`: arrays of the largest logit
      of every query head, (query heads,), or (layers, query heads) where layers are stacked. They stand
      in a tree at the paths of the attention modules, as in `{"blocks/0/attention": s}` or `{"blocks":
      {0: {"attention": s}}}`; a single array is for a model with one. A weight takes those of the module
      that it lies in. With micro-batches they are the largest over all of them.

    Raises:
      ValueError: here: a tau that is not above 0; in `init` and `update`: a pattern that meets no leaf,
        or a layout that does not fit; in `update`: logits that are missing or do not fit, or no params.

    Source: Kimi K2, arXiv 2507.20534, section 2.1.
    """
    check_tau(tau)
    weights = dict(weights)

    def heads_of(params: optax.Params) -> dict[KeyPath, Heads]:
        unmet = unmet_pattern(weights, params)
        if unmet is not None:
            names = ", ".join(name for _, name, _ in named_leaves(params))
            raise ValueError(
                f"qk_clip: the pattern {unmet!r} meets no leaf; the leaves are {names}."
            )
        found = {}
        for path, name, leaf in named_leaves(params):
            layout = next((w for pattern, w in weights.items() if fnmatchcase(name, pattern)), None)
            if layout is not None:
                found[path] = layout.on(jnp.shape(leaf), name)
        return found

    def init(params: optax.Params) -> optax.EmptyState:
        heads_of(params)
        return optax.EmptyState()

    def update(updates, state, params=None, *, largest_logits: LargestLogits = None, **extra_args):
        del extra_args
        params = require_params(params)
        found = heads_of(params)
        logits = {name: leaf for _, name, leaf in named_leaves(largest_logits)}
        of_weight = {path: _logits_of(heads, logits) for path, heads in found.items()}

        def clip(path: KeyPath, u: jax.Array | None, p: jax.Array) -> jax.Array | None:
            if u is None or path not in found:
                return u
            dtype = working_dtype(p.dtype)
            gamma = _gamma(of_weight[path], tau, dtype)
            factor = _factors(gamma, found[path])
            u_wide, p_wide = u.astype(dtype), p.astype(dtype)
            clipped = u_wide * factor + p_wide * (factor - 1)
            return jnp.where(factor == 1, u_wide, clipped).astype(u.dtype)

        clipped = jax.tree_util.tree_map_with_path(
            clip, updates, params, is_leaf=lambda leaf: leaf is None
        )
        return clipped, state

    return optax.GradientTransformationExtraArgs(init, update)


def _logits_of(heads: Heads, logits: Mapping[str, ArrayLike]) -> jax.Array:
    """The largest logits of the module that a weight lies in."""
    module = module_of(heads.name, logits, "/")
    if module is None:
        above = parent_of(heads.name, "/")
        given = f"those of {', '.join(logits)}" if logits else "none"
        raise ValueError(
            f"{heads.name}: qk_clip needs the largest logits of its heads, and got {given}; write"
            f" tx.update(grads, state, params, largest_logits={{{above!r}: an array of one number a"
            " query head}), with an entry for every attention module."
        )
    own = jnp.asarray(logits[module])
    heads.check_logits(own.shape)
    # A head's number is wanted where its weights lie.
    return everywhere(own)


def _gamma(logits: jax.Array, tau: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """min(1, tau / S); NaN where S is not finite and no factor would be right."""
    s, tau = logits.astype(dtype), jnp.asarray(tau, dtype)
    above = jnp.where(jnp.isinf(s), jnp.nan, tau / s)
    return jnp.where(s <= tau, jnp.ones_like(s), above)


def _factors(gamma: jax.Array, heads: Heads) -> jax.Array:
    """gamma ([layers,] query heads) to what the weight is multiplied by, of its rank."""
    layers = gamma.shape[:-1]
    own = gamma.reshape(*layers, heads.count, -1).min(axis=-1)
    powers = jnp.asarray(heads.powers, gamma.dtype)
    own = own[..., None]
    # Every section that is left alone is exactly 1, whatever gamma is.
    by_channel = jnp.where(
        powers == 0, 1, jnp.power(own, powers.reshape((1,) * (own.ndim - 1) + (-1,)))
    )
    if heads.merged:
        by_channel = by_channel.reshape(*layers, -1)
    order, shape = heads.broadcast(stacked=bool(layers))
    return by_channel.transpose(order).reshape(shape)
