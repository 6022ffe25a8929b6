"""What a leaf is, told by its neighbours, and what is asked where they do not tell."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

import optax_normuon
from optax_normuon import RECIPES, MatrixLayout, describe, muon, normuon
from tests.in_jax.tables import leaf_rows, totals


def tree_of(leaves):
    """Abstract parameters from {tuple of keys or "a/b": shape}."""
    tree = {}
    for path, shape in leaves.items():
        *outer, last = path.split("/") if isinstance(path, str) else path
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def outcome(leaves):
    rows = leaf_rows(describe(tree_of(leaves)))
    return {p: row["matrices x (out, in)"] or row["optimizer"] for p, row in rows.items()}


UP = {("layers", "up_proj", "kernel"): (3, 8, 12)}
SETTLED = {
    "norms say that axis 1 counts layers": (
        {"layers/norm/scale": (32, 4), "layers/up/kernel": (32, 4, 128)},
        {"layers/up/kernel": "4 x (128, 32)"},
    ),
    "norms say that axis 0 counts layers": (
        {"layers/norm/scale": (4, 32), "layers/up/kernel": (4, 32, 128)},
        {"layers/up/kernel": "4 x (128, 32)"},
    ),
    "heads beside a layer axis in the middle": (
        {
            "layers/norm/scale": (32, 4),
            "layers/query/kernel": (32, 4, 2, 6),
            "layers/out/kernel": (2, 4, 6, 32),
        },
        {"layers/query/kernel": "4 x (12, 32)", "layers/out/kernel": "4 x (32, 12)"},
    ),
    "a head is as wide as the vocabulary": (
        {"tok/weight": (30, 12), "up/weight": (48, 12), "words/weight": (30, 12)},
        {"tok/weight": "AdamW", "words/weight": "AdamW", "up/weight": "1 x (48, 12)"},
    ),
    "a classifier is the last layer": (
        {"Dense_0/kernel": (20, 12), "Dense_1/kernel": (12, 5)},
        {"Dense_0/kernel": "1 x (12, 20)", "Dense_1/kernel": "AdamW"},
    ),
    "biases say how kernels are stored": (
        {"c_fc/kernel": (48, 12), "c_fc/bias": (48,), "c_proj/kernel": (12, 48)},
        {"c_fc/kernel": "1 x (48, 12)"},
    ),
    "an outer name does not decide": (
        {"text_embedder/layers_0/mlp/up/kernel": (12, 20)},
        {"text_embedder/layers_0/mlp/up/kernel": "1 x (20, 12)"},
    ),
    "keys with dots": (
        {("lm_head.weight",): (30, 8), ("model.layers.0.mlp.up_proj.weight",): (16, 8)},
        {"lm_head.weight": "AdamW", "model.layers.0.mlp.up_proj.weight": "1 x (16, 8)"},
    ),
    "tuple keys": ({("layers", ("norm", "weight")): (3, 8)}, {"layers/norm/weight": "AdamW"}),
    "recurrent weights are stored (out, in)": (
        {"cell/weight_hh": (36, 12), "cell/weight_ih": (36, 8)},
        {"cell/weight_hh": "1 x (36, 12)", "cell/weight_ih": "1 x (36, 8)"},
    ),
    "depthwise convolutions": (
        {"dw_conv/kernel": (3, 3, 1, 8), "conv_dw/weight": (8, 1, 3, 3)},
        {"dw_conv/kernel": "AdamW", "conv_dw/weight": "AdamW"},
    ),
    "stacked vectors": (
        {
            **UP,
            **{f"layers/{n}": (3, 12) for n in ("b_up", "bias_q", "norm_weight", "ls1", "A_log")},
        },
        {f"layers/{n}": "AdamW" for n in ("b_up", "bias_q", "norm_weight", "ls1", "A_log")},
    ),
    "a boxed bias": (
        {**UP, "layers/q_proj/bias/array": (3, 12)},
        {"layers/q_proj/bias/array": "AdamW"},
    ),
    "heads in a list": ({"heads/0/kernel": (12, 30)}, {"heads/0/kernel": "AdamW"}),
    "Llama's head": ({"output/weight": (30, 12)}, {"output/weight": "AdamW"}),
}


@pytest.mark.parametrize(("leaves", "expected"), SETTLED.values(), ids=SETTLED.keys())
def test_neighbours_and_parts_of_names_decide_how_a_leaf_is_read(leaves, expected):
    found = outcome(leaves)
    assert {path: found[path] for path in expected} == expected


def test_a_transposed_convolution_is_known_by_its_bias_or_asked_about():
    kernel = {"ConvTranspose_0/kernel": (2, 2, 6, 20)}
    assert outcome(kernel) == {"ConvTranspose_0/kernel": "?"}
    for size, matrices in ((20, "1 x (20, 24)"), (6, "1 x (6, 80)")):
        biased = outcome({**kernel, "ConvTranspose_0/bias": (size,)})
        assert biased["ConvTranspose_0/kernel"] == matrices


def test_one_error_asks_about_every_leaf_and_its_dictionary_answers_for_all():
    params = tree_of(
        {
            "up/kernel": (12, 20),
            **{f"layers/{i}/mixer/kernel": (3, 12, 20) for i in range(3)},
            "decoder/wi_0/kernel": (12, 3, 20),
        }
    )
    with pytest.raises(ValueError, match="4 leaves can be read in more than one way") as raised:
        normuon(0.1).init(params)
    message = str(raised.value)
    assert "layers/{0..2}/mixer/kernel" in message
    assert "MatrixLayout(reduction_axis=0, output_axis=2)" in message
    (written,) = re.findall(r"layout=(.*?\}\))$", message, flags=re.MULTILINE | re.DOTALL)
    assert written.count("'layers/*/mixer/kernel'") == 1
    layout = eval(written, {"optax_normuon": optax_normuon})
    rows = leaf_rows(describe(params, layout))
    assert "?" not in {row["optimizer"] for row in rows.values()}
    assert rows["decoder/wi_0/kernel"]["matrices x (out, in)"] == "3 x (20, 12)"
    # Half an answer is kept in what is asked next.
    half = optax_normuon.layout_by_path({"decoder/*": MatrixLayout(0, 2)})
    with pytest.raises(ValueError, match=r"3 leaves can be read") as raised:
        normuon(0.1, layout=half).init(params)
    assert "'decoder/*': optax_normuon.MatrixLayout" in str(raised.value)


def test_describe_takes_what_normuon_takes_and_names_its_optimizer():
    params = tree_of({"up/kernel": (12, 48), "norm/scale": (12,)})
    given = dict(recipe="muon", shape_scale="spectral", adam_b1=0.8, backend="auto")
    text = describe(params, learning_rate=0.1, weight_decay=0.1, **given)
    assert leaf_rows(text)["up/kernel"]["optimizer"] == "Muon"
    assert leaf_rows(text)["up/kernel"]["scale"] == "2"
    variant = dataclasses.replace(RECIPES["normuon"], shape_scale="none")
    assert leaf_rows(describe(params, recipe=variant))["up/kernel"]["scale"] == "1"
    with pytest.raises(TypeError, match="weight_decai"):
        describe(params, weight_decai=0.1)


def test_totals_are_the_bytes_of_the_state_that_init_makes():
    params = {"up": {"kernel": jnp.ones((12, 48))}, "norm": {"scale": jnp.ones(12)}}
    for make, recipe, name in ((normuon, "normuon", "NorMuon"), (muon, "muon", "Muon")):
        for dtype, size in ((None, 4), (jnp.bfloat16, 2)):
            found = totals(describe(params, recipe=recipe, momentum_dtype=dtype))
            arrays = jax.tree.leaves(make(0.1, momentum_dtype=dtype).init(params))
            kept = sum(leaf.nbytes for leaf in arrays if leaf.ndim)
            printed = [int(row["state bytes"].replace(",", "")) for row in found.values()]
            assert sum(printed) == kept
            assert f"momentum {12 * 48 * size:,}" in found[name]["of which"]
            assert found[name]["parameters"] == "576"
            assert found["AdamW"]["share"] == "2.0%"
