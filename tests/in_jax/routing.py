"""What the tests of routing share: trees of leaves, and what became of them."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from optax_normuon import describe
from tests.in_jax.tables import leaf_rows

ADAMW = "AdamW"


def outcome(params, layout=None):
    """{path: "AdamW", "?", or the matrices that NorMuon gets}."""
    result = {}
    for path, row in leaf_rows(describe(params, layout)).items():
        is_matrix = row["optimizer"] == "NorMuon"
        assert is_matrix or row["optimizer"] in (ADAMW, "?")
        assert bool(row["matrices x (out, in)"]) == bool(row["scale"]) == is_matrix
        assert row["why"]
        result[path] = row["matrices x (out, in)"] if is_matrix else row["optimizer"]
    return result


def reasons(params):
    return {path: row["why"] for path, row in leaf_rows(describe(params)).items()}


def shapes(tree) -> Any:
    """Abstract float32 parameters from a tree of shapes."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def linen(module, *inputs, **keywords) -> Any:
    """The abstract parameters of a Linen module."""
    inputs = [jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x for x in inputs]
    # Flax adds biases to batches.
    with jax.numpy_rank_promotion("allow"):
        return jax.eval_shape(
            lambda *inputs: module.init(jax.random.key(0), *inputs, **keywords), *inputs
        )["params"]


def of_nnx(make) -> Any:
    """The abstract parameters of an NNX module, from a function of its random streams."""
    return nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)


TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


ATTENTION = {
    "query/kernel": "1 x (8, 12)",
    "key/kernel": "1 x (8, 12)",
    "value/kernel": "1 x (8, 12)",
    "out/kernel": "1 x (12, 8)",
}


ATTENTION_BIASES = {f"{name}/bias": ADAMW for name in ("query", "key", "value", "out")}


class Block(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(use_bias=self.use_bias)(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=self.use_bias)(h)
        h = nn.Dense(20, use_bias=self.use_bias)(nn.RMSNorm()(x))
        return x + nn.Dense(12, use_bias=self.use_bias)(nn.gelu(h)), None


class Transformer(nn.Module):
    use_bias: bool = True
    scanned: bool = False
    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(30, 12)
        x = embed(tokens) + self.param("pos_embedding", nn.initializers.normal(), (1, 5, 12))
        if self.scanned:
            stack = nn.scan(
                Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            x, _ = stack(self.use_bias, name="blocks")(x, None)
        else:
            x, _ = Block(self.use_bias)(x)
        x = nn.LayerNorm(use_bias=self.use_bias)(x)
        return embed.attend(x) if self.tied else nn.Dense(30, use_bias=False, name="lm_head")(x)
