"""A GPT in Flax NNX, small enough to read and to train on a laptop.

Pre-norm blocks, rotary positions, RMS-normalised queries and keys (QK-norm, as in Qwen3) unless that is
switched off, grouped-query attention, a squared-ReLU MLP, no biases, and an output head of its own
(`lm_head`, not tied to `embed`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from examples.attention import causal_attention
from examples.embedding import Embedding
from examples.errors import BadInput
from examples.processes import independent_loops_may_meet

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The model."""

    width: int = 128
    """Channels of the residual stream."""
    depth: int = 2
    """Blocks, each of attention and an MLP."""
    heads: int = 4
    """Heads of the queries."""
    kv_heads: int | None = None
    """Heads of keys and values, each shared by a group of queries; None is one for each."""
    context: int = 128
    """Tokens that the model sees at most."""
    vocabulary: int = 256
    """Token ids. A tokenizer file sets it."""
    dtype: Dtype = "float32"
    """Of activations."""
    param_dtype: Dtype = "float32"
    """Of parameters. In bfloat16 the optimizer keeps the lower half of a float32 weight beside each."""
    qk_norm: bool = True
    """Whether queries and keys are RMS-normalised, which bounds their products."""
    scan: bool = False
    """Keep the blocks as one stack, which a loop goes through: many compile as fast as one."""
    fused_attention: bool = False
    """Attention by cuDNN's kernels on an NVIDIA GPU, in bfloat16; elsewhere XLA computes it."""

    def __post_init__(self):
        if self.width % (2 * self.heads):
            raise BadInput(
                f"width={self.width} does not split into heads={self.heads} heads of an even size,"
                " which rotary positions need: choose a width divisible by 2 * heads."
            )
        if self.heads % self.key_heads:
            raise BadInput(
                f"heads={self.heads} queries cannot share kv_heads={self.kv_heads} keys evenly: choose"
                " kv_heads that divide heads."
            )
        channels = self.head_size
        if self.fused_attention and (self.dtype != "bfloat16" or channels % 8 or channels > 128):
            raise BadInput(
                f"fused_attention takes dtype=bfloat16 and heads of 8, 16, ... 128 channels: these are"
                f" {channels} in {self.dtype}. Give such a size, or leave it to XLA."
            )

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The model with random weights; a subclass with a model of its own builds that."""
        return GPT(self, rngs=rngs)

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        return self.width // self.heads


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
        self.head_size = config.head_size
        self.fused = config.fused_attention
        keys = config.key_heads * config.head_size
        self.query = linear(config.width, config.width, config, rngs)
        self.key = linear(config.width, keys, config, rngs)
        self.value = linear(config.width, keys, config, rngs)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.query_norm = _norm(self.head_size, config, rngs)
            self.key_norm = _norm(self.head_size, config, rngs)
        self.out = _residual_output(config.width, config.width, config, rngs)

    def queries_and_keys(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both (batch, time, heads, size), normalised if they are to be, and turned."""
        by_head = (*x.shape[:2], -1, self.head_size)
        query, key = self.query(x).reshape(by_head), self.key(x).reshape(by_head)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        return rotate(query), rotate(key)

    def largest_logits(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """(heads,) float32: the largest q k / sqrt(size) of a token with one that it attends to."""
        query, key = self.queries_and_keys(x)
        batch, time, heads, size = query.shape
        grouped = query.reshape(batch, time, key.shape[2], -1, size)
        s = jnp.einsum("btkgc,bskc->bkgts", grouped, key, preferred_element_type=jnp.float32)
        s = s.reshape(batch, heads, time, time) * size**-0.5
        seen = jnp.tril(jnp.ones((1, 1, time, time), bool))
        seen = seen if mask is None else seen & mask
        return jnp.where(seen, s, -jnp.inf).max(axis=(0, 2, 3))

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        query, key = self.queries_and_keys(x)
        value = self.value(x).reshape(*x.shape[:2], -1, self.head_size)
        mixed = causal_attention(query, key, value, mask, fused=self.fused)
        return self.out(mixed.reshape(x.shape))


class MLP(nnx.Module):
    """relu(x U)^2 V with four times the width inside (arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.up = linear(config.width, 4 * config.width, config, rngs)
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

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))

    def largest_logits(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Of its attention on the same x."""
        return self.attention.largest_logits(self.attention_norm(x), mask)


class GPT(nnx.Module):
    """Token ids (batch, time) to logits (batch, time, vocabulary) float32 of each next token."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.embed = Embedding(config.vocabulary, config.width, **dtypes(config), rngs=rngs)
        self.embed_norm = _norm(config.width, config, rngs)
        self.blocks = make_blocks(Block, config, rngs)
        self.head_norm = _norm(config.width, config, rngs)
        self.lm_head = linear(config.width, config.vocabulary, config, rngs)

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array | None = None,
        *,
        largest_logits: dict[str, jax.Array] | None = None,
    ) -> jax.Array:
        """Logits.

        Args:
          tokens: (batch, time), an integer dtype.
          segments: (batch, time) integers: a token attends to earlier tokens of its own number, so that
            texts packed into one window do not see each other. None is one text a window.
          largest_logits: is filled with every head's largest attention logit, (heads,) by the path of
            the attention, or (depth, heads) where blocks are scanned: what `qk_clip` takes.
        """
        x = self.embed_norm(self.embed(tokens.astype(jnp.int32)))
        if largest_logits is not None:
            largest_logits |= _largest_logits(self.blocks, x, segments)
        x = through(self.blocks, x, segments)
        return self.lm_head(self.head_norm(x)).astype(jnp.float32)


def first_parameters(config: GPTConfig, seed: int | jax.Array):
    """Random weights: a dictionary of dictionaries of arrays, named as the modules are."""
    return nnx.to_pure_dict(nnx.state(config.build(nnx.Rngs(seed)), nnx.Param))


def apply_model(config: GPTConfig, params, tokens: jax.Array, segments: jax.Array | None = None):
    """The model's logits as a function of its parameters, as `first_parameters` makes them."""
    return _model_of(config, params)(tokens, segments)


def apply_with_largest_logits(
    config: GPTConfig, params, tokens: jax.Array, segments: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(logits, every head's largest attention logit by the path of its attention)."""
    found: dict[str, jax.Array] = {}
    return _model_of(config, params)(tokens, segments, largest_logits=found), found


def _model_of(config: GPTConfig, params) -> Any:
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(nnx.Rngs(0))), nnx.Param)
    return nnx.merge(graph, params)


def parameter_count(config: GPTConfig) -> int:
    """Numbers in the model's parameters; nothing is allocated to count them."""
    params = jax.eval_shape(lambda: first_parameters(config, 0))
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def make_blocks(block: Any, config: GPTConfig, rngs: nnx.Rngs) -> nnx.List | nnx.Module:
    """A list of blocks, or one of which every parameter has the layers as its first axis.

    Args:
      block: a class of modules, made by `block(config, rngs=rngs)`.
    """
    if not config.scan:
        return nnx.List([block(config, rngs=rngs) for _ in range(config.depth)])

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs: nnx.Rngs) -> nnx.Module:
        return block(config, rngs=rngs)

    return stack(rngs)


def through(blocks: Any, x: jax.Array, segments: jax.Array | None) -> jax.Array:
    """What `make_blocks` made, applied to x one after the other.

    Args:
      segments: (batch, time) integers or None: a token attends to those of its own number.
    """
    mask = _mask_of(segments)
    if not isinstance(blocks, nnx.List):
        return _scan(_one_block, out_axes=nnx.Carry)(blocks, x, mask)
    for block in blocks:
        x = block(x, mask)
    return x


def _mask_of(segments: jax.Array | None) -> jax.Array | None:
    """(batch, 1, time, time): whether a token may attend to another."""
    if segments is None:
        return None
    return segments[:, None, :, None] == segments[:, None, None, :]


def _scan(step: Callable, out_axes: Any) -> Callable:
    """Of (a stack of blocks, x, mask): `step` of each block, with its x from the one before."""
    in_axes = (0, nnx.Carry, None)
    return nnx.scan(step, in_axes=in_axes, out_axes=out_axes, unroll=independent_loops_may_meet())


def _one_block(block: Any, x: jax.Array, mask: jax.Array | None) -> jax.Array:
    return block(x, mask)


def _largest_logits(blocks: Any, x: jax.Array, segments: jax.Array | None) -> dict[str, jax.Array]:
    """By the path of each attention, as `GPT` goes through its blocks."""
    mask = _mask_of(segments)
    if not isinstance(blocks, nnx.List):
        _, largest = _scan(_one_block_and_logits, out_axes=(nnx.Carry, 0))(blocks, x, mask)
        return {"blocks/attention": largest}
    found = {}
    for index, block in enumerate(blocks):
        found[f"blocks/{index}/attention"] = block.largest_logits(x, mask)
        x = block(x, mask)
    return found


def _one_block_and_logits(
    block: Any, x: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    return block(x, mask), block.largest_logits(x, mask)


def dtypes(config: GPTConfig) -> dict:
    """Keywords of a Flax module."""
    return dict(dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.param_dtype))


def linear(
    inputs: int, outputs: int, config: GPTConfig, rngs: nnx.Rngs, **keywords: Any
) -> nnx.Linear:
    """Without a bias; `keywords` are Flax's own."""
    return nnx.Linear(inputs, outputs, use_bias=False, **dtypes(config), rngs=rngs, **keywords)


def _norm(size: int, config: GPTConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, **dtypes(config), rngs=rngs)


def _residual_output(inputs: int, outputs: int, config: GPTConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """Variance 1 / (2 depth fan-in): the 2 depth branches together then add about unit variance."""
    normal = nnx.initializers.variance_scaling(0.5 / config.depth, "fan_in", "normal")
    return linear(inputs, outputs, config, rngs, kernel_init=normal)
