"""Routing of single layers."""

import flax.linen as nn
import pytest
from flax import nnx

from optax_normuon import MatrixLayout, layout_by_path
from tests.in_jax.routing import (
    ADAMW,
    ATTENTION,
    ATTENTION_BIASES,
    TOKENS,
    linen,
    of_nnx,
    outcome,
    reasons,
)

SEQUENCE, IMAGE = (2, 5, 12), (2, 8, 8, 6)


LINEN = {
    "Dense": (nn.Dense(20), SEQUENCE, {"kernel": "1 x (20, 12)", "bias": ADAMW}),
    "2-D Einsum": (
        nn.Einsum((12, 20), "bsd,df->bsf"),
        SEQUENCE,
        {"kernel": "1 x (20, 12)", "bias": ADAMW},
    ),
    "1-D Conv": (nn.Conv(20, (3,)), SEQUENCE, {"kernel": "1 x (20, 36)", "bias": ADAMW}),
    "2-D Conv": (nn.Conv(20, (3, 3)), IMAGE, {"kernel": "1 x (20, 54)", "bias": ADAMW}),
    "1x1 Conv": (nn.Conv(20, (1, 1)), IMAGE, {"kernel": "1 x (20, 6)", "bias": ADAMW}),
    "3-D Conv": (
        nn.Conv(20, (2, 2, 2)),
        (1, 4, 4, 4, 6),
        {"kernel": "1 x (20, 48)", "bias": ADAMW},
    ),
    "depthwise Conv": (
        nn.Conv(6, (3, 3), feature_group_count=6),
        IMAGE,
        {"kernel": ADAMW, "bias": ADAMW},
    ),
    "depthwise 1-D Conv": (
        nn.Conv(12, (3,), feature_group_count=12),
        SEQUENCE,
        {"kernel": ADAMW, "bias": ADAMW},
    ),
    "ConvTranspose": (
        nn.ConvTranspose(20, (3, 3)),
        IMAGE,
        {"kernel": "1 x (20, 54)", "bias": ADAMW},
    ),
    "Embed": (nn.Embed(30, 12), TOKENS, {"embedding": ADAMW}),
    "DenseGeneral to two axes": (
        nn.DenseGeneral((2, 4)),
        SEQUENCE,
        {"kernel": "1 x (8, 12)", "bias": ADAMW},
    ),
    "DenseGeneral from two axes": (
        nn.DenseGeneral(20, axis=(-2, -1)),
        (5, 2, 4),
        {"kernel": "1 x (20, 8)", "bias": ADAMW},
    ),
    "LayerNorm": (nn.LayerNorm(), SEQUENCE, {"scale": ADAMW, "bias": ADAMW}),
    "RMSNorm": (nn.RMSNorm(), SEQUENCE, {"scale": ADAMW}),
    "GroupNorm": (nn.GroupNorm(3), SEQUENCE, {"scale": ADAMW, "bias": ADAMW}),
    "BatchNorm": (
        nn.BatchNorm(use_running_average=True),
        SEQUENCE,
        {"scale": ADAMW, "bias": ADAMW},
    ),
}


@pytest.mark.parametrize(("module", "inputs", "expected"), LINEN.values(), ids=LINEN.keys())
def test_a_linen_layer_is_read_as_the_matrices_that_it_multiplies_by(module, inputs, expected):
    assert outcome(linen(module, inputs)) == expected


NNX = {
    "Linear": (lambda r: nnx.Linear(12, 20, rngs=r), {"kernel": "1 x (20, 12)", "bias": ADAMW}),
    "2-D Einsum": (
        lambda r: nnx.Einsum("bd,df->bf", (12, 20), (20,), rngs=r),
        {"kernel": "1 x (20, 12)", "bias": ADAMW},
    ),
    "3-D Einsum": (
        lambda r: nnx.Einsum("bd,dhf->bhf", (12, 2, 4), (2, 4), rngs=r),
        {"kernel": "1 x (8, 12)", "bias": ADAMW},
    ),
    "1-D Conv": (
        lambda r: nnx.Conv(12, 20, (3,), rngs=r),
        {"kernel": "1 x (20, 36)", "bias": ADAMW},
    ),
    "2-D Conv": (
        lambda r: nnx.Conv(6, 20, (3, 3), rngs=r),
        {"kernel": "1 x (20, 54)", "bias": ADAMW},
    ),
    "depthwise Conv": (
        lambda r: nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=r),
        {"kernel": ADAMW, "bias": ADAMW},
    ),
    "ConvTranspose": (
        lambda r: nnx.ConvTranspose(6, 20, (3, 3), rngs=r),
        {"kernel": "1 x (20, 54)", "bias": ADAMW},
    ),
    "Embed": (lambda r: nnx.Embed(30, 12, rngs=r), {"embedding": ADAMW}),
    "LinearGeneral to two axes": (
        lambda r: nnx.LinearGeneral(12, (2, 4), rngs=r),
        {"kernel": "1 x (8, 12)", "bias": ADAMW},
    ),
    "LinearGeneral from two axes": (
        lambda r: nnx.LinearGeneral((2, 4), 20, axis=(-2, -1), rngs=r),
        {"kernel": "1 x (20, 8)", "bias": ADAMW},
    ),
    "LayerNorm": (lambda r: nnx.LayerNorm(12, rngs=r), {"scale": ADAMW, "bias": ADAMW}),
    "RMSNorm": (lambda r: nnx.RMSNorm(12, rngs=r), {"scale": ADAMW}),
    "BatchNorm": (lambda r: nnx.BatchNorm(12, rngs=r), {"scale": ADAMW, "bias": ADAMW}),
    "LoRALinear": (
        lambda r: nnx.LoRALinear(12, 20, lora_rank=4, rngs=r),
        {
            "kernel": "1 x (20, 12)",
            "bias": ADAMW,
            "lora/lora_a": "1 x (4, 12)",
            "lora/lora_b": "1 x (20, 4)",
        },
    ),
}


@pytest.mark.parametrize(("make", "expected"), NNX.values(), ids=NNX.keys())
def test_an_nnx_layer_is_read_as_the_matrices_that_it_multiplies_by(make, expected):
    assert outcome(of_nnx(make)) == expected


def test_a_convolution_without_bias_is_known_by_its_name():
    class Convolutions(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(20, (3,), use_bias=False)(x)
            x = nn.Conv(12, (3,), use_bias=False, name="conv_out")(x)
            return nn.Conv(12, (3,), use_bias=False, feature_group_count=12)(x)

    params = linen(Convolutions(), SEQUENCE)
    assert outcome(params) == {
        "Conv_0/kernel": "1 x (20, 36)",
        "conv_out/kernel": "1 x (12, 60)",
        "Conv_1/kernel": ADAMW,
    }
    assert reasons(params)["Conv_0/kernel"] == "a 1-D convolution, 36 in, 20 out"
    assert "one input channel" in reasons(params)["Conv_1/kernel"]


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_attention_heads_are_merged_with_and_without_biases(api, use_bias):
    if api == "linen":
        attention = nn.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=use_bias)
        params = linen(attention, SEQUENCE)
    else:
        params = of_nnx(
            lambda r: nnx.MultiHeadAttention(
                2, 12, qkv_features=8, use_bias=use_bias, decode=False, rngs=r
            )
        )
    assert outcome(params) == {**ATTENTION, **(ATTENTION_BIASES if use_bias else {})}
    assert reasons(params)["query/kernel"] == "an attention kernel, 12 in, 2x4 out"
    assert reasons(params)["out/kernel"] == "an attention output kernel, 8 in, 12 out"


def test_a_layout_makes_each_head_a_matrix_of_its_own():
    params = linen(nn.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=False), SEQUENCE)
    per_head = layout_by_path({"out/*": MatrixLayout(1, 2), "*": MatrixLayout(0, 2)})
    assert outcome(params, per_head) == {
        "query/kernel": "2 x (4, 12)",
        "key/kernel": "2 x (4, 12)",
        "value/kernel": "2 x (4, 12)",
        "out/kernel": "2 x (12, 4)",
    }
