"""A byte-level GPT in Flax NNX, small enough to read and to train on a laptop.

Pre-norm blocks, rotary positions, RMS-normalised queries and keys, a squared-ReLU MLP, no biases,
and an output head of its own (`lm_head`, not tied to `embed`).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

VOCABULARY = 256  # every byte is a token


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes of the model. `dtype` is that of the activations; parameters stay float32."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    context: int = 128
    dtype: str = "float32"

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} does not split into heads={self.heads} heads of an even size,"
                " which rotary positions need: choose a width divisible by 2 * heads."
            )


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions (arXiv 2104.09864): pair i of a head's channels turns by t * base^(-2i/size).

    Args:
      x: queries or keys, (batch, time, heads, size), any float dtype, which is kept.
    """
    time, size = x.shape[1], x.shape[-1]
    frequency = base ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    angle = jnp.outer(jnp.arange(time, dtype=jnp.float32), frequency)[None, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)  # (1, time, 1, size / 2)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention, (batch, time, width) to the same."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.head_size = config.width // config.heads
        self.query = _linear(config.width, config.width, config, rngs)
        self.key = _linear(config.width, config.width, config, rngs)
        self.value = _linear(config.width, config.width, config, rngs)
        self.query_norm = _norm(self.head_size, config, rngs)
        self.key_norm = _norm(self.head_size, config, rngs)
        self.out = _residual_output(config.width, config.width, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        by_head = (*x.shape[:2], -1, self.head_size)
        query = rotate(self.query_norm(self.query(x).reshape(by_head)))
        key = rotate(self.key_norm(self.key(x).reshape(by_head)))
        value = self.value(x).reshape(by_head)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """relu(x U)^2 V with four times the width inside (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.up = _linear(config.width, 4 * config.width, config, rngs)
        self.down = _residual_output(4 * config.width, config.width, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.square(jax.nn.relu(self.up(x))))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.attention_norm = _norm(config.width, config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config.width, config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nnx.Module):
    """Bytes (batch, time) uint8 to logits (batch, time, 256) float32 of each next byte."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.embed = nnx.Embed(VOCABULARY, config.width, dtype=dtype, rngs=rngs)
        self.embed_norm = _norm(config.width, config, rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.head_norm = _norm(config.width, config, rngs)
        self.lm_head = _linear(config.width, VOCABULARY, config, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_norm(self.embed(tokens.astype(jnp.int32)))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.head_norm(x)).astype(jnp.float32)


def parameter_count(config: GPTConfig) -> int:
    """Numbers in the model's parameters; nothing is allocated to count them."""
    model = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _norm(size: int, config: GPTConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _linear(inputs: int, outputs: int, config: GPTConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _residual_output(inputs: int, outputs: int, config: GPTConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Variance 1 / (2 depth fan-in): the 2 depth branches together then add about unit variance."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        kernel_init=nnx.initializers.variance_scaling(0.5 / config.depth, "fan_in", "normal"),
        rngs=rngs,
    )
