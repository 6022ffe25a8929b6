"""Routing of names seen in Flax models, right or misleading."""

from typing import Any

import pytest

from tests.in_jax.routing import ADAMW, outcome, shapes


def leaf(path, shape) -> Any:
    """One leaf at `a/b/c`."""
    tree = shape
    for name in reversed(path.split("/")):
        tree = {name: tree}
    return shapes(tree)


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
def test_names_seen_in_flax_models_are_routed_by_their_role(path, shape, expected):
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
