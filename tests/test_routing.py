"""Which leaves become matrices, read off the table that `describe` prints, for models of both Flax APIs.

Sizes differ from each other wherever they can, so that a swapped axis shows in the table: model width
12, 2 heads of 4, hidden width 20, vocabulary 30, 3 layers.
"""

import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers
from tables import leaf_rows, read_table, unfolded

import optax_normuon
from optax_normuon import MatrixLayout, describe, layout_by_path, normuon
from optax_normuon.leaves.layout import find_routes, resolve_layouts

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


def leaf(path, shape) -> Any:
    """One leaf at `a/b/c`."""
    tree = shape
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return shapes(tree)


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


# Single layers

TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)
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
def test_a_linen_layer(module, inputs, expected):
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
def test_an_nnx_layer(make, expected):
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


ATTENTION = {
    "query/kernel": "1 x (8, 12)",
    "key/kernel": "1 x (8, 12)",
    "value/kernel": "1 x (8, 12)",
    "out/kernel": "1 x (12, 8)",
}
ATTENTION_BIASES = {f"{name}/bias": ADAMW for name in ("query", "key", "value", "out")}


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


def test_heads_as_matrices_of_their_own_are_a_layout_away():
    params = linen(nn.MultiHeadDotProductAttention(2, qkv_features=8, use_bias=False), SEQUENCE)
    per_head = layout_by_path({"out/*": MatrixLayout(1, 2), "*": MatrixLayout(0, 2)})
    assert outcome(params, per_head) == {
        "query/kernel": "2 x (4, 12)",
        "key/kernel": "2 x (4, 12)",
        "value/kernel": "2 x (4, 12)",
        "out/kernel": "2 x (12, 4)",
    }


# Whole models


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
def test_a_linen_transformer(scanned, use_bias):
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
def test_an_nnx_transformer(layers, use_bias):
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


# Names seen in Flax models

NAMES = [
    # Projections, alone and stacked by scan.
    ("attn/q_proj/kernel", (12, 8), "1 x (8, 12)"),
    ("attn/c_attn/kernel", (12, 24), "1 x (24, 12)"),
    ("mlp/gate_proj/kernel", (12, 20), "1 x (20, 12)"),
    ("mlp/up/kernel", (12, 20), "1 x (20, 12)"),
    ("layers/mlp/gate_proj/kernel", (3, 12, 20), "3 x (20, 12)"),
    ("layers/mlp/down_proj/kernel", (3, 20, 12), "3 x (12, 20)"),
    ("layers/Dense_0/kernel", (3, 12, 20), "3 x (20, 12)"),
    ("layers/mlp/fc_1/kernel", (3, 12, 20), "3 x (20, 12)"),
    ("linear/weight", (20, 12), "1 x (20, 12)"),
    ("linear/w", (12, 20), "1 x (20, 12)"),
    ("lora_a", (12, 4), "1 x (4, 12)"),
    ("lora_b", (4, 20), "1 x (20, 4)"),
    # Embeddings and tokens.
    ("wte/embedding", (30, 12), ADAMW),
    ("wte/weight", (30, 12), ADAMW),
    ("tok_embeddings/weight", (30, 12), ADAMW),
    ("token_embedder/embedding", (30, 12), ADAMW),
    ("embedder/input_embedding", (30, 12), ADAMW),
    ("shared/embedding", (30, 12), ADAMW),
    ("embed_tokens/embedding", (30, 12), ADAMW),
    ("patch_embed/proj/kernel", (4, 4, 3, 12), ADAMW),
    ("pos_embedding", (1, 5, 12), ADAMW),
    ("posembed_input/pos_embedding", (1, 5, 12), ADAMW),
    ("position_ids_table", (5, 12), ADAMW),
    ("wpe", (5, 12), ADAMW),
    ("cls", (1, 12), ADAMW),
    ("cls_token", (1, 1, 12), ADAMW),
    ("tok_emb", (30, 12), ADAMW),
    ("tok_emb/weight", (30, 12), ADAMW),
    ("pos_emb/kernel", (5, 12), ADAMW),
    # Output heads.
    ("lm_head/kernel", (12, 30), ADAMW),
    ("head", (12, 30), ADAMW),
    ("mlp_head/kernel", (12, 30), ADAMW),
    ("classifier/kernel", (12, 30), ADAMW),
    ("to_logits/kernel", (12, 30), ADAMW),
    ("decoder/logits_dense/kernel", (12, 30), ADAMW),
    ("unembed/kernel", (12, 30), ADAMW),
    ("unembedding/kernel", (12, 30), ADAMW),
    # Norms and other vectors, stacked by scan.
    ("layers/input_layernorm/weight", (3, 12), ADAMW),
    ("layers/ln_1/scale", (3, 12), ADAMW),
    ("layers/pre_attention_norm/scale", (3, 12), ADAMW),
    ("layers/layer_scale/gamma", (3, 12), ADAMW),
    ("layers/attn/q_proj/bias", (3, 8), ADAMW),
    ("layers/attn/query/bias", (3, 2, 4), ADAMW),
    ("layers/ln1", (3, 12), ADAMW),
    ("layers/attn_norm", (3, 12), ADAMW),
    ("layers/attn/q_norm", (3, 4), ADAMW),
    # No matrices.
    ("temperature", (), ADAMW),
    ("value_head/kernel", (12, 1), ADAMW),
    ("critic/kernel", (12, 1), ADAMW),
    ("relative_attention_bias", (32, 2), ADAMW),
]


@pytest.mark.parametrize(("path", "shape", "expected"), NAMES, ids=[name for name, *_ in NAMES])
def test_a_name_seen_in_flax_models(path, shape, expected):
    assert outcome(leaf(path, shape)) == {path: expected}


@pytest.mark.parametrize("layers", [(), (3,)], ids=["one layer", "scanned"])
def test_grouped_query_projections_are_told_apart_from_heads(layers):
    kernels = {"q_proj": (12, 8), "k_proj": (12, 4), "v_proj": (12, 4), "o_proj": (8, 12)}
    params = shapes({name: {"kernel": (*layers, *shape)} for name, shape in kernels.items()})
    count = 3 if layers else 1
    assert outcome(params) == {
        f"{name}/kernel": f"{count} x ({shape[1]}, {shape[0]})" for name, shape in kernels.items()
    }


def test_grouped_query_heads_are_merged():
    params = shapes(
        {
            "query": {"kernel": (3, 12, 4, 5)},
            "key": {"kernel": (3, 12, 2, 5)},
            "value": {"kernel": (3, 12, 2, 5)},
            "out": {"kernel": (3, 4, 5, 12)},
        }
    )
    assert outcome(params) == {
        "query/kernel": "3 x (20, 12)",
        "key/kernel": "3 x (10, 12)",
        "value/kernel": "3 x (10, 12)",
        "out/kernel": "3 x (12, 20)",
    }


def test_stacked_convolutions_are_known_by_their_stacked_bias():
    one = shapes({"conv": {"kernel": (3, 4, 6, 20), "bias": (20,)}})
    stacked = shapes({"conv": {"kernel": (3, 4, 6, 20), "bias": (3, 20)}})
    assert outcome(one)["conv/kernel"] == "1 x (20, 72)"
    assert outcome(stacked)["conv/kernel"] == "3 x (20, 24)"


# Two readings


def ask(params, layout=None):
    """What the error says below its table, and the layout that it says to paste."""
    with pytest.raises(ValueError, match="in more than one way") as raised:
        normuon(0.1, layout=layout).init(params)
    _, table, question = str(raised.value).split("\n\n")
    # The table that is printed says the same, and asks the same.
    printed = describe(params, layout)
    assert question in printed
    columns, asked = read_table(table)
    doubts = {row[0] for row in asked if row[columns.index("optimizer")] == "?"}
    assert doubts
    doubts = {path for folded in doubts for path in unfolded(folded)}
    assert doubts == {p for p, row in leaf_rows(printed).items() if row["optimizer"] == "?"}
    (written,) = re.findall(r"layout=(.*?\}\))$", question, flags=re.MULTILINE | re.DOTALL)
    return question, eval(written, {"optax_normuon": optax_normuon})


def test_a_kernel_with_two_readings_is_refused_with_a_line_to_paste():
    params = shapes({"mixer": {"kernel": (3, 12, 20)}, "up": {"kernel": (12, 20)}})
    message, layout = ask(params)
    assert "mixer/kernel: shape (3, 12, 20)" in message
    assert (
        "3 linear layers, 12 in, 20 out: MatrixLayout(reduction_axis=-2, output_axis=-1)" in message
    )
    assert "a 1-D convolution, 36 in, 20 out: MatrixLayout(reduction_axis=(-3, -2)" in message
    assert outcome(params, layout) == {"mixer/kernel": "3 x (20, 12)", "up/kernel": "1 x (20, 12)"}
    # Each reading that is printed is one that can be pasted.
    for reading, expected in [
        (MatrixLayout((-3, -2), -1), "1 x (20, 36)"),
        (MatrixLayout(-3, (-2, -1)), "1 x (240, 3)"),
        (None, ADAMW),
    ]:
        assert (
            outcome(params, layout_by_path({"mixer/kernel": reading}))["mixer/kernel"] == expected
        )


@pytest.mark.parametrize("name", ["mixer[0]", "mixer*", "Mixer"])
def test_the_line_to_paste_means_its_own_leaf_alone(name):
    params = shapes({name: {"kernel": (3, 12, 20)}, "mixer0": {"conv": {"kernel": (3, 12, 20)}}})
    _, layout = ask(params)
    assert outcome(params, layout) == {
        f"{name}/kernel": "3 x (20, 12)",
        "mixer0/conv/kernel": "1 x (20, 36)",
    }


AMBIGUOUS = {
    "an unnamed stack": {"layers": {"wq": {"kernel": (3, 12, 8)}}},
    "square heads": {"q_proj": {"kernel": (8, 8, 8)}, "o_proj": {"kernel": (8, 8, 8)}},
    "an attention kernel alone": {"query": {"kernel": (12, 2, 4)}},
    "a DenseGeneral without bias": {"DenseGeneral_0": {"kernel": (12, 2, 4)}},
    "a stacked convolution without bias": {"ScanBlock_0": {"conv": {"kernel": (3, 4, 6, 20)}}},
}


@pytest.mark.parametrize("tree", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
def test_what_path_and_shape_do_not_settle_is_asked(tree):
    params = shapes(tree)
    _, layout = ask(params)
    assert "?" not in outcome(params, layout).values()


# What the first name suggests is not what the leaf is; the right outcome, which may also be asked for.
CONTRADICTIONS = {
    # The bias beside the kernel is no stack, so the kernel is not one either.
    "a ConvTranspose named up": ({"up": {"kernel": (2, 2, 6, 20), "bias": (20,)}}, "1 x (20, 24)"),
    "a 1x1 Conv named query": ({"query": {"kernel": (1, 1, 6, 20), "bias": (20,)}}, "1 x (20, 6)"),
    "a Conv named gate": ({"gate": {"kernel": (3, 12, 20), "bias": (20,)}}, "1 x (20, 36)"),
    # The scanned axis is the second, as in MaxText.
    "a scan over axis 1": ({"Dense_0": {"kernel": (12, 3, 20), "bias": (20, 3)}}, "3 x (20, 12)"),
    # Stored (out, in, ...), as the rule for a single `weight` knows.
    "a stack of weights": ({"layers": {"fc1": {"weight": (3, 20, 12)}}}, "3 x (20, 12)"),
    "a convolution weight": ({"conv": {"weight": (20, 6, 3, 3)}}, "1 x (20, 54)"),
}


@pytest.mark.parametrize(("tree", "right"), CONTRADICTIONS.values(), ids=CONTRADICTIONS.keys())
def test_a_name_does_not_overrule_what_the_shapes_say(tree, right):
    params = shapes(tree)
    table = outcome(params)
    if "?" in table.values():
        ask(params)
        return
    assert {cell for path, cell in table.items() if "bias" not in path} == {right}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["mixer", "query", "o_proj", "Conv_0", "Dense_0", "w", "proj", "blocks"]),
    shape=st.lists(st.integers(2, 5), min_size=2, max_size=5).map(tuple),
    bias=st.one_of(st.none(), st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple)),
)
def test_every_kernel_is_routed_or_asked_about_and_the_answer_is_taken(name, shape, bias):
    params = shapes({name: {"kernel": shape} | ({} if bias is None else {"bias": bias})})
    routes = find_routes(None, params)
    doubts = [found for found in routes.values() if found.in_doubt]
    if doubts:
        with pytest.raises(ValueError, match="more than one way") as raised:
            resolve_layouts(None, params)
        for reading in doubts[0].readings:
            assert f"{reading.meaning}: {reading.layout}" in str(raised.value)
        routes = find_routes(
            layout_by_path({f"{name}/kernel": doubts[0].readings[0].layout}), params
        )
    (kernel,) = (found for path, found in routes.items() if path[-1].key == "kernel")
    assert not kernel.in_doubt
    if kernel.layout is None:
        assert name == "Conv_0" or "vectors" in kernel.why or "embedding" in kernel.why
    else:
        assert np.prod(kernel.layout.on(shape).stack_shape) == np.prod(shape)


# Layouts given


PARAMS = {"blocks": {"up": {"kernel": (3, 4, 8)}}, "dense": {"bias": (4,), "kernel": (8, 4)}}


def draw(seed) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
        PARAMS,
        is_leaf=lambda node: isinstance(node, tuple),
    )


LAYOUTS = {
    "tree": {
        "blocks": {"up": {"kernel": MatrixLayout(1, 2)}},
        "dense": {"bias": None, "kernel": MatrixLayout(0, 1)},
    },
    "negative axes": {
        "blocks": {"up": {"kernel": MatrixLayout(-2, -1)}},
        "dense": {"bias": None, "kernel": MatrixLayout(-2, -1)},
    },
    "prefix": {"blocks": MatrixLayout(1, 2), "dense": {"bias": None, "kernel": MatrixLayout(0, 1)}},
    "callable": lambda params: jax.tree.map(
        lambda p: MatrixLayout(-2, -1) if p.ndim > 1 else None, params
    ),
    "callable to a prefix": lambda params: {
        "blocks": MatrixLayout(-2, -1),
        "dense": {"bias": None, "kernel": MatrixLayout((0,), (1,))},
    },
    "optax": {
        "blocks": MuonDimensionNumbers(1, 2),
        "dense": {"bias": None, "kernel": MuonDimensionNumbers()},
    },
    "optax, tuples of axes": {
        "blocks": MuonDimensionNumbers((1,), (2,)),
        "dense": {"bias": None, "kernel": MuonDimensionNumbers((0,), (1,))},
    },
    "by path": layout_by_path({"blocks/*": MatrixLayout(1, 2)}),
    "by path, optax": layout_by_path({"*/kernel": MuonDimensionNumbers(-2, -1)}),
    "one split": {
        "blocks": MatrixLayout(1, 2, output_splits=(8,)),
        "dense": {"bias": None, "kernel": MatrixLayout(0, 1)},
    },
}


def one_step(tx, gradients, params) -> Any:
    """Updates and state after the first step."""
    return tx.update(gradients, tx.init(params), params)


def step(layout) -> Any:
    params = draw(0)
    tx = normuon(0.1, weight_decay=0.1, layout=layout)
    return one_step(tx, draw(1), params)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_way_to_write_a_layout_makes_the_same_update(layout):
    chex.assert_trees_all_equal(step(layout), step(None))
    assert outcome(draw(0), layout) == outcome(draw(0))
    turned, _ = step({"blocks": MatrixLayout(2, 1), "dense": None})
    same, _ = step(None)
    for path in (("blocks", "up", "kernel"), ("dense", "kernel")):
        a, b = turned, same
        for key in path:
            a, b = a[key], b[key]
        assert not jnp.array_equal(a, b)
    chex.assert_trees_all_close(turned["dense"]["bias"], same["dense"]["bias"], rtol=1e-6)


def test_none_inside_a_layout_is_adamw_and_none_at_the_root_routes():
    everywhere = jax.tree.map(lambda _: None, draw(0))
    assert set(outcome(draw(0), everywhere).values()) == {ADAMW}
    assert set(outcome(draw(0), None).values()) == {ADAMW, "3 x (8, 4)", "1 x (4, 8)"}
    updates, _ = step(everywhere)
    # Adam's first step is the sign of the gradient.
    want = jax.tree.map(lambda g: -0.1 * jnp.sign(g), draw(1))
    chex.assert_trees_all_close(updates, want, rtol=1e-4)


def test_layout_by_path_overrides_only_what_its_patterns_meet():
    params = linen(Transformer(scanned=True), TOKENS)
    routed = outcome(params)
    layout = layout_by_path(
        {
            "blocks/Dense_0/kernel": MatrixLayout(-2, -1, output_splits=(12, 8)),
            "*/query/kernel": MatrixLayout(1, 3),
            "*/query/*": MatrixLayout(0, 1),  # the bias alone: the kernel met an earlier pattern
            "lm_head/*": MuonDimensionNumbers(0, 1),
            "blocks/Dense_1/kernel": None,
        }
    )
    attention = "blocks/MultiHeadDotProductAttention_0"
    changed = {
        "blocks/Dense_0/kernel": "3 x (12, 12) + 3 x (8, 12)",
        f"{attention}/query/kernel": "6 x (4, 12)",
        f"{attention}/query/bias": "4 x (2, 3)",
        "lm_head/kernel": "1 x (30, 12)",
        "blocks/Dense_1/kernel": ADAMW,
    }
    assert outcome(params, layout) == {**routed, **changed}
    assert all(routed[path] != cell for path, cell in changed.items())


def test_describe_says_which_leaves_a_pattern_has_decided():
    params = shapes({"up": {"kernel": (12, 20)}, "lm_head": {"kernel": (12, 30)}, "wpe": (5, 12)})
    layout = layout_by_path({"lm_head/*": MatrixLayout(0, 1)})
    table = leaf_rows(describe(params, layout))
    assert {path: row["why"] for path, row in table.items()} == {
        "lm_head/kernel": "layout given for lm_head/*",
        "up/kernel": "a linear layer, 12 in, 20 out",
        "wpe": "embedding",
    }


def test_a_pattern_that_meets_no_leaf_is_refused():
    with pytest.raises(ValueError, match=r"'\*/querry/kernel' meets no leaf.*dense/kernel"):
        normuon(0.1, layout=layout_by_path({"*/querry/kernel": None})).init(draw(0))


ROWS: Any = {"blocks/*": "rows"}


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        ({"blocks": MatrixLayout(1, 2)}, "layout does not match the parameters"),
        (
            {"blocks": MatrixLayout(1, 2), "dense": MatrixLayout(0, 1)},
            "dense/bias: .*past the rank",
        ),
        ({"blocks": MatrixLayout(1, 1), "dense": None}, "blocks/up/kernel: .*overlap"),
        ({"blocks": MatrixLayout(1, 2, (4, 3)), "dense": None}, "blocks/up/kernel: .*sum to 7"),
        ({"blocks": "rows", "dense": None}, "layout"),
        (layout_by_path(ROWS), "blocks/up/kernel: a layout must be"),
    ],
    ids=["no prefix", "past the rank", "overlap", "splits", "no layout", "no layout by path"],
)
def test_a_layout_that_does_not_fit_is_refused_by_name(layout, complaint):
    with pytest.raises(ValueError, match=complaint):
        normuon(0.1, layout=layout).init(draw(0))


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64])
def test_a_leaf_without_a_real_floating_dtype_is_refused_by_name(dtype):
    params = {"dense": {"kernel": jnp.zeros((8, 4)), "steps": jnp.zeros((8, 4), dtype)}}
    for refuse in (normuon(0.1).init, describe):
        with pytest.raises(TypeError, match=f"dense/steps: dtype {jnp.dtype(dtype).name}"):
            refuse(params)
    masked = optax.masked(normuon(0.1), {"dense": {"kernel": True, "steps": False}})
    masked.init(params)


def test_describe_prints_the_scale_of_each_matrix():
    params = shapes(
        {"up": {"kernel": (12, 48)}, "down": {"kernel": (48, 12)}, "norm": {"scale": (12,)}}
    )
    for rule, scales in [
        ("original", {"up/kernel": "2", "down/kernel": "1", "norm/scale": ""}),
        ("spectral", {"up/kernel": "2", "down/kernel": "0.5", "norm/scale": ""}),
        ("none", {"up/kernel": "1", "down/kernel": "1", "norm/scale": ""}),
        ("rms", {"up/kernel": "rms", "down/kernel": "rms", "norm/scale": ""}),
    ]:
        table = leaf_rows(describe(params, shape_scale=rule))
        assert {path: row["scale"] for path, row in table.items()} == scales
    split = layout_by_path({"up/kernel": MatrixLayout(0, 1, output_splits=(36, 12))})
    assert (
        leaf_rows(describe(params, split, shape_scale="spectral"))["up/kernel"]["scale"]
        == "1.732, 1"
    )
