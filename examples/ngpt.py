"""nGPT (arXiv 2410.01131) in Flax NNX: every state and every matrix's slices are unit vectors.

With N(x) = x / |x| along the channels, a block is

    h <- N(h + |alpha| (N(branch(h)) - h))        alpha per channel, for attention and for the MLP

so each branch turns h a little towards its own output. There are no other norms. Queries and keys are
unit vectors times a scale, and the logits are cosines times a scale for each token. The weights are held
on their spheres by the optimizer: `examples/spheres.py`.

`gated=True` is a variant that was trained elsewhere (dnhkng/nGPT-muon):

    h <- N(h + sigmoid(g) alpha branch(h))        g per channel, alpha one number

with a fixed scale of the logits, and a head that is normalised in the forward pass too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from examples.attention import causal_attention
from examples.embedding import Embedding
from examples.gpt import GPTConfig, dtypes, linear, make_blocks, rotate, through

Axes = Literal["embedding", "inputs"]

AXES: dict[Axes, dict[str, int]] = {
    "embedding": {
        "embed": -1,
        "position": -1,
        "query": -2,
        "key": -2,
        "value": -2,
        "out": -1,
        "up": -2,
        "gate": -2,
        "down": -1,
        "lm_head": -2,
    },
    "inputs": {
        "embed": -1,
        "position": -1,
        "query": -2,
        "key": -2,
        "value": -2,
        "out": -2,
        "up": -2,
        "gate": -2,
        "down": -2,
        "lm_head": -2,
    },
}
"""Along which axis the slices of a matrix lie, by its role. Kernels are (inputs, outputs).

"embedding" is the paper's: always the axis of the model's channels, so that `out` and `down` are
normalised for each input. "inputs" takes the input weights of every neuron."""


@dataclasses.dataclass(frozen=True)
class NGPTConfig(GPTConfig):
    """The model."""

    alpha: float = 0.05
    """How far a branch turns the state at first: of each channel, or one number if gated."""
    logit_scale: float = 1.0
    """Of cosines to logits: what a trained vector starts at, or a fixed number if gated."""
    gated: bool = False
    """Whether a block adds its gated output, instead of turning towards its normalised one."""
    learned_positions: bool = False
    """A trained vector for each position, instead of rotary positions."""
    qk_norm: bool = True
    """Whether queries and keys are unit vectors times a trained scale."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Of the MLP: swiglu has two input matrices with trained scales, gelu one without."""

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        return NGPT(self, rngs=rngs)


def sphere_axes(axes: Axes) -> Callable[[Any], Any]:
    """The `axis` of `optax_normuon.to_sphere` and `project_to_sphere` for this model's parameters.

    Returns:
      A function from parameters, or a part of them, to a tree like them: an axis of `AXES` for a matrix,
      None for a vector.
    """

    def of(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: AXES[axes].get(role_of(path)), params
        )

    return of


def role_of(path: tuple) -> str:
    """The name of a parameter's module: `query`, `lm_head`, ..."""
    return str(getattr(path[-2], "key", path[-2]))


def normalized(x: jax.Array, axis: int = -1) -> jax.Array:
    """N(x) = x / |x| along an axis; zeros stay zeros. float32 arithmetic, x's dtype."""
    wide = x.astype(jnp.float32)
    squares = jnp.square(wide).sum(axis, keepdims=True)
    # Chosen before the root: its slope at zero would be infinite, and the gradient NaN.
    return (wide * jax.lax.rsqrt(jnp.where(squares == 0, 1, squares))).astype(x.dtype)


class Scale(nnx.Module):
    """A trained vector of scales; the parameter is the scale over `factor`.

    A step of Adam has the size of its rate, however large the parameter. A scale is `factor` times the
    parameter, so its own rate is `factor` times Adam's: sqrt(width) for one that starts at 1 and is kept
    as 1 / sqrt(width).

    Args:
      first: the scales at first. kept: the parameter at first.
    """

    def __init__(self, size: int, first: float, kept: float, param_dtype: str):
        self.scale = nnx.Param(jnp.full(size, kept, param_dtype))
        self.factor = first / kept

    def __call__(self) -> jax.Array:
        """(size,) float32."""
        return self.scale[...].astype(jnp.float32) * self.factor


class Attention(nnx.Module):
    """Causal self-attention of unit vectors, (batch, time, width) to the same."""

    def __init__(self, config: NGPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        keys = config.key_heads * config.head_size
        self.query = _unit_linear("query", config.width, config.width, config, rngs)
        self.key = _unit_linear("key", config.width, keys, config, rngs)
        self.value = _unit_linear("value", config.width, keys, config, rngs)
        self.out = _unit_linear("out", config.width, config.width, config, rngs)
        if config.qk_norm:
            self.query_key_scale = Scale(keys, 1.0, config.width**-0.5, config.param_dtype)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        config = self.config
        by_head = (*x.shape[:2], -1, config.head_size)
        query, key = self.query(x).reshape(by_head), self.key(x).reshape(by_head)
        value = self.value(x).reshape(by_head)
        if not config.learned_positions:
            query, key = rotate(query), rotate(key)
        softmax_scale = config.head_size**-0.5
        if config.qk_norm:
            # Of unit vectors of random directions the product has the variance 1 / size.
            softmax_scale = config.head_size**0.5
            scale = self.query_key_scale().reshape(1, 1, -1, config.head_size).astype(x.dtype)
            key = scale * normalized(key)
            query = jnp.repeat(scale, config.heads // config.key_heads, 2) * normalized(query)
        mixed = causal_attention(
            query, key, value, mask, scale=softmax_scale, fused=config.fused_attention
        )
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """(u silu(v)) W, u = s_u (x U), v = s_v sqrt(width) (x V); or gelu(x U) W. Four times the width."""

    def __init__(self, config: NGPTConfig, *, rngs: nnx.Rngs):
        inner = 4 * config.width
        self.config = config
        self.up = _unit_linear("up", config.width, inner, config, rngs)
        if config.activation == "swiglu":
            self.gate = _unit_linear("gate", config.width, inner, config, rngs)
            self.up_scale = Scale(inner, 1.0, 1.0, config.param_dtype)
            self.gate_scale = Scale(inner, 1.0, 1.0, config.param_dtype)
        self.down = _unit_linear("down", inner, config.width, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.config.activation == "gelu":
            return self.down(jax.nn.gelu(self.up(x), approximate=False))
        up = _scaled(self.up(x), self.up_scale())
        # The entries of x V have the size 1 / sqrt(width), where silu is nearly linear.
        gate = _scaled(self.gate(x), self.gate_scale() * self.config.width**0.5)
        return self.down(up * jax.nn.silu(gate))


class Residual(nnx.Module):
    """How a branch moves the state: see the two formulas at the top of this file."""

    def __init__(self, config: NGPTConfig):
        width, dtype = config.width, config.param_dtype
        self.gated = config.gated
        if config.gated:
            self.gate = nnx.Param(jnp.zeros(width, dtype))
            self.strength = nnx.Param(jnp.full((), config.alpha, dtype))
        else:
            self.alpha = Scale(width, config.alpha, width**-0.5, dtype)

    def __call__(self, h: jax.Array, branch: jax.Array) -> jax.Array:
        """Unit vectors (batch, time, width), like h; the branch may have any length."""
        if not self.gated:
            return normalized(h + _scaled(normalized(branch) - h, jnp.abs(self.alpha())))
        gate, strength = (p[...].astype(jnp.float32) for p in (self.gate, self.strength))
        return normalized(h + _scaled(branch, jax.nn.sigmoid(gate) * strength))


class Block(nnx.Module):
    """Attention, then the MLP, each by a `Residual`."""

    def __init__(self, config: NGPTConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        self.attention_residual = Residual(config)
        self.mlp = MLP(config, rngs=rngs)
        self.mlp_residual = Residual(config)

    def __call__(self, h: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        h = self.attention_residual(h, self.attention(h, mask))
        return self.mlp_residual(h, self.mlp(h))


class NGPT(nnx.Module):
    """Token ids (batch, time) to logits (batch, time, vocabulary) float32 of each next token."""

    def __init__(self, config: NGPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = _unit_embed(config.vocabulary, config, rngs)
        if config.learned_positions:
            self.position = _unit_embed(config.context, config, rngs)
        self.blocks = make_blocks(Block, config, rngs)
        self.lm_head = _unit_linear("lm_head", config.width, config.vocabulary, config, rngs)
        if not config.gated:
            self.logit_scale = Scale(
                config.vocabulary, config.logit_scale, config.width**-0.5, config.param_dtype
            )

    def __call__(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Logits; arguments as `examples.gpt.GPT`'s."""
        # The weights may be off their spheres where the optimizer projects them every k-th step only.
        h = normalized(self.embed(tokens.astype(jnp.int32)))
        if self.config.learned_positions:
            place = normalized(self.position(jnp.arange(tokens.shape[1])))
            h = normalized(h + place[None])
        h = through(self.blocks, h, segments)
        if not self.config.gated:
            return _scaled(self.lm_head(h).astype(jnp.float32), self.logit_scale())
        head = normalized(self.lm_head.kernel[...], axis=0).astype(h.dtype)
        return self.config.logit_scale * (h @ head).astype(jnp.float32)


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """(batch, time, n) times (n,) in x's dtype."""
    return x * scale.astype(x.dtype)[None, None]


def _unit_linear(
    role: str, inputs: int, outputs: int, config: NGPTConfig, rngs: nnx.Rngs
) -> nnx.Linear:
    return linear(inputs, outputs, config, rngs, kernel_init=_unit_slices(role))


def _unit_embed(count: int, config: NGPTConfig, rngs: nnx.Rngs) -> Embedding:
    init = _unit_slices("embed")
    return Embedding(count, config.width, embedding_init=init, **dtypes(config), rngs=rngs)


def _unit_slices(role: str) -> Callable[..., jax.Array]:
    """An initializer: slices of norm 1 along the paper's axis, each of a random direction."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return normalized(jax.random.normal(key, shape), AXES["embedding"][role]).astype(dtype)

    return draw
