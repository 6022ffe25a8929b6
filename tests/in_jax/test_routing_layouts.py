"""Layouts that the user gives in place of the routing."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from optax_normuon import MatrixLayout, describe, layout_by_path, normuon
from tests.in_jax.routing import ADAMW, TOKENS, Transformer, linen, outcome, shapes
from tests.in_jax.tables import leaf_rows
from tests.in_jax.trees import random_tree

PARAMS = {"blocks": {"up": {"kernel": (3, 4, 8)}}, "dense": {"bias": (4,), "kernel": (8, 4)}}


def draw(seed) -> Any:
    return random_tree(PARAMS, seed)


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
