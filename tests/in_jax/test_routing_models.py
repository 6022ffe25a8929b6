"""Routing of whole models."""

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.in_jax.routing import (
    ADAMW,
    ATTENTION,
    ATTENTION_BIASES,
    TOKENS,
    Transformer,
    linen,
    of_nnx,
    outcome,
    reasons,
)


def block_of(matrices, use_bias):
    """The expected outcome for a Linen block, with so many matrices in each leaf."""
    attention = "MultiHeadDotProductAttention_0"
    result = {
        "LayerNorm_0/scale": ADAMW,
        "RMSNorm_0/scale": ADAMW,
        **{f"{attention}/{path}": cell for path, cell in ATTENTION.items()},
        "Dense_0/kernel": "1 x (20, 12)",
        "Dense_1/kernel": "1 x (12, 20)",
    }
    if use_bias:
        result |= {f"{attention}/{path}": ADAMW for path in ATTENTION_BIASES}
        result |= dict.fromkeys(["LayerNorm_0/bias", "Dense_0/bias", "Dense_1/bias"], ADAMW)
    return {path: cell.replace("1 x", f"{matrices} x") for path, cell in result.items()}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scanned", [False, True], ids=["one block", "scanned"])
def test_every_leaf_of_a_linen_transformer_is_routed_by_its_role(scanned, use_bias):
    params = linen(Transformer(use_bias, scanned), TOKENS)
    prefix = "blocks" if scanned else "Block_0"
    block = block_of(3 if scanned else 1, use_bias)
    expected = {f"{prefix}/{path}": cell for path, cell in block.items()}
    expected |= dict.fromkeys(
        ["Embed_0/embedding", "pos_embedding", "LayerNorm_0/scale", "lm_head/kernel"], ADAMW
    )
    if use_bias:
        expected["LayerNorm_0/bias"] = ADAMW
    assert outcome(params) == expected
    why = reasons(params)
    assert why["Embed_0/embedding"] == "embedding"
    assert why["lm_head/kernel"] == "output head"
    assert "embedding" in why["pos_embedding"]
    kind = "3 attention kernels" if scanned else "an attention kernel"
    query = f"{prefix}/MultiHeadDotProductAttention_0/query/kernel"
    assert why[query] == f"{kind}, 12 in, 2x4 out"


def test_a_tied_head_is_the_embedding():
    params = linen(Transformer(tied=True), TOKENS)
    assert outcome(params)["Embed_0/embedding"] == ADAMW
    assert not [path for path in outcome(params) if "head" in path]


class NnxBlock(nnx.Module):
    def __init__(self, rngs, use_bias=True):
        self.ln1 = nnx.LayerNorm(12, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(
            2, 12, qkv_features=8, use_bias=use_bias, decode=False, rngs=rngs
        )
        self.ln2 = nnx.RMSNorm(12, rngs=rngs)
        self.fc1 = nnx.Linear(12, 20, use_bias=use_bias, rngs=rngs)
        self.fc2 = nnx.Linear(20, 12, use_bias=use_bias, rngs=rngs)


class NnxTransformer(nnx.Module):
    def __init__(self, rngs, layers, use_bias=True):
        self.wte = nnx.Embed(30, 12, rngs=rngs)
        self.wpe = nnx.Param(jnp.zeros((5, 12)))
        if layers is None:
            stacked = nnx.vmap(lambda rngs: NnxBlock(rngs, use_bias))
            self.layers = nnx.split_rngs(splits=3)(stacked)(rngs)
        else:
            self.layers = nnx.List([NnxBlock(rngs, use_bias) for _ in range(layers)])
        self.norm = nnx.RMSNorm(12, rngs=rngs)
        self.lm_head = nnx.Linear(12, 30, use_bias=False, rngs=rngs)


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layers", [2, None], ids=["listed", "vmapped"])
def test_every_leaf_of_an_nnx_transformer_is_routed_by_its_role(layers, use_bias):
    params = of_nnx(lambda rngs: NnxTransformer(rngs, layers, use_bias))
    block = {
        "ln1/scale": ADAMW,
        "ln1/bias": ADAMW,
        "ln2/scale": ADAMW,
        **{f"attn/{path}": cell for path, cell in ATTENTION.items()},
        "fc1/kernel": "1 x (20, 12)",
        "fc2/kernel": "1 x (12, 20)",
    }
    if use_bias:
        block |= dict.fromkeys(["fc1/bias", "fc2/bias"], ADAMW)
        block |= {f"attn/{path}": ADAMW for path in ATTENTION_BIASES}
    count = "1 x" if layers else "3 x"
    expected = {
        f"{prefix}/{path}": cell.replace("1 x", count)
        for prefix in (["layers/0", "layers/1"] if layers else ["layers"])
        for path, cell in block.items()
    }
    expected |= dict.fromkeys(["wte/embedding", "wpe", "norm/scale", "lm_head/kernel"], ADAMW)
    assert outcome(params) == expected


def test_a_stack_of_experts_holds_one_matrix_a_layer_and_expert():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(12, name="down_proj")(nn.Dense(20, name="up_proj")(x))

    experts = nn.vmap(Experts, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)

    class Mixture(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            nn.Dense(6, use_bias=False, name="gate")(x[0])
            return experts(name="experts")(x), None

    scanned = nn.scan(Mixture, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    for mixture, layers in ((Mixture(), 1), (scanned(), 3)):
        assert outcome(linen(mixture, (6, 5, 12), None)) == {
            "gate/kernel": f"{layers} x (6, 12)",
            "experts/up_proj/kernel": f"{6 * layers} x (20, 12)",
            "experts/up_proj/bias": ADAMW,
            "experts/down_proj/kernel": f"{6 * layers} x (12, 20)",
            "experts/down_proj/bias": ADAMW,
        }
