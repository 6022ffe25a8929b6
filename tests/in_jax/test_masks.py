"""Trees of settings where `optax.masked`, `optax.partition` or a model have taken leaves away."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from optax_normuon import MatrixLayout, layout_by_path, normuon
from tests.in_jax.trees import random_tree

SHAPES = {"up": {"kernel": (4, 6)}, "frozen": {"kernel": (4, 8), "bias": (8,)}}
BY_LEAF = {"up": {"kernel": True}, "frozen": {"kernel": False, "bias": False}}
BY_SUBTREE = {"up": True, "frozen": False}
SETTINGS = {
    "layout": {"up": {"kernel": MatrixLayout(1, 0)}, "frozen": {"kernel": None, "bias": None}},
    "lr_mul": {"up": {"kernel": 2.0}, "frozen": {"kernel": 1.0, "bias": 1.0}},
    "wd_mul": {"up": {"kernel": 2.0}, "frozen": {"kernel": 1.0, "bias": 1.0}},
    "param_specs": {"up": jax.P(), "frozen": {"kernel": jax.P(), "bias": jax.P()}},
    "layout by path": layout_by_path({"up/*": MatrixLayout(1, 0), "frozen/kernel": None}),
    "layout by pattern": layout_by_path({"*kernel": MatrixLayout(1, 0), "fro*": None}),
}


def draw(seed) -> Any:
    return random_tree(SHAPES, seed)


def partitioned(tx, labels):
    return optax.partition({True: tx, False: optax.set_to_zero()}, labels)


WRAPPERS = {
    "masked by leaf": lambda tx: optax.masked(tx, BY_LEAF),
    "masked by subtree": lambda tx: optax.masked(tx, BY_SUBTREE),
    "masked by a callable": lambda tx: optax.masked(tx, lambda params: BY_SUBTREE),
    "partition by leaf": lambda tx: partitioned(tx, BY_LEAF),
    "partition by subtree": lambda tx: partitioned(tx, BY_SUBTREE),
    "partition in a mask": lambda tx: optax.masked(
        partitioned(tx, {"up": True, "frozen": True}), BY_SUBTREE
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_entries_for_masked_leaves_are_not_asked_for(wrapper, name):
    keywords: dict[str, Any] = {name.split()[0]: SETTINGS[name], "weight_decay": 0.1}
    tx = WRAPPERS[wrapper](normuon(0.1, **keywords))
    params, gradients = draw(0), draw(1)
    updates, _ = tx.update(gradients, tx.init(params), params)
    alone = {key: value for key, value in keywords.items() if not isinstance(value, dict)}
    alone |= {key: {"up": v["up"]} for key, v in keywords.items() if isinstance(v, dict)}
    if "layout by" in name:
        alone["layout"] = MatrixLayout(1, 0)
    rest = {"up": params["up"]}
    wanted = normuon(0.1, **alone)
    expected, _ = wanted.update({"up": gradients["up"]}, wanted.init(rest), rest)
    chex.assert_trees_all_equal(updates["up"], expected["up"])


@pytest.mark.parametrize("name", SETTINGS)
def test_a_subtree_that_is_none_is_not_asked_about(name):
    params, gradients = ({**draw(seed), "frozen": None} for seed in (0, 1))
    tx = normuon(0.1, **{name.split()[0]: SETTINGS[name]})
    updates, _ = tx.update(gradients, tx.init(params), params)
    assert updates["frozen"] is None
    assert jnp.all(jnp.isfinite(updates["up"]["kernel"]))


def test_a_pattern_that_meets_neither_a_leaf_nor_a_masked_subtree_is_refused():
    tx = optax.masked(normuon(0.1, layout=layout_by_path({"forzen/*": None})), BY_SUBTREE)
    with pytest.raises(ValueError, match="'forzen/\\*' meets no leaf"):
        tx.init(draw(0))
    with pytest.raises(ValueError, match="'frozen/kernle' meets no leaf"):
        normuon(0.1, layout=layout_by_path({"frozen/kernle": None})).init(draw(0))


def test_a_setting_of_the_wrong_kind_names_the_leaf():
    for name in ("lr_mul", "param_specs"):
        with pytest.raises(ValueError, match="up/kernel: .* got 'twice'"):
            normuon(0.1, **{name: {"up": "twice", "frozen": None}}).init(draw(0))
