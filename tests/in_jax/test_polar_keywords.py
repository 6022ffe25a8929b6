"""Plain keywords change the polar factor's polynomial, its number of steps and its epsilon."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from normuon_core import POLYNOMIALS, RECIPES, find_recipe, polar_express
from normuon_core.polynomials import POLAR_EXPRESS, find_coefficients, with_steps
from optax_normuon import (
    STATIC_ARGS,
    MatrixLayout,
    inject_hyperparams,
    muon,
    normuon,
    orthogonalize,
    polar_factor,
    scale_by_normuon,
)

X = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((4, 8)), jnp.float32)}
LAYOUT = MatrixLayout(0, 1)
TRIPLES = ((3.0, -3.2, 1.2), (2.0, -1.5, 0.5))


def update(make, **keywords):
    tx = make(layout=LAYOUT, compute_dtype=jnp.float32, **keywords)
    return tx.update(X, tx.init(X), X)[0]["w"]


MAKERS = {
    "normuon": lambda **keywords: normuon(0.1, **keywords),
    "muon": lambda **keywords: muon(0.1, **keywords),
    "scale_by_normuon": scale_by_normuon,
}
# Keywords, and the fields of the recipe's polar record that they stand for.
KEYWORDS = {
    "name": (dict(coefficients="newton_schulz"), dict(coefficients=POLYNOMIALS["newton_schulz"])),
    "triples": (dict(coefficients=TRIPLES), dict(coefficients=TRIPLES)),
    "lists": (dict(coefficients=[list(t) for t in TRIPLES]), dict(coefficients=TRIPLES)),
    "steps": (
        dict(steps=3),
        dict(coefficients=polar_express(1e-3, steps=3, safety=1.02, cushion=0.02)),
    ),
    "more steps": (
        dict(coefficients="newton_schulz", steps=6),
        dict(coefficients=POLYNOMIALS["newton_schulz"][:1] * 6),
    ),
    "eps": (dict(eps=30.0), dict(eps=30.0)),
}


@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.parametrize("maker", MAKERS)
def test_a_keyword_makes_the_update_of_a_recipe_with_that_field(maker, name):
    keywords, fields = KEYWORDS[name]
    recipe = RECIPES["muon" if maker == "muon" else "normuon"]
    recipe = dataclasses.replace(recipe, polar=dataclasses.replace(recipe.polar, **fields))
    found = update(MAKERS[maker], **keywords)
    chex.assert_trees_all_equal(found, update(MAKERS[maker], recipe=recipe))
    assert not np.allclose(found, update(MAKERS[maker]), rtol=1e-3)


@pytest.mark.parametrize("name", KEYWORDS)
def test_orthogonalize_and_polar_factor_take_the_same_keywords(name):
    keywords, fields = KEYWORDS[name]
    found = polar_factor(X["w"], compute_dtype=jnp.float32, **keywords)
    chex.assert_trees_all_equal(found, polar_factor(X["w"], compute_dtype=jnp.float32, **fields))
    chex.assert_trees_all_equal(found, update(orthogonalize, **keywords))
    assert not np.allclose(found, polar_factor(X["w"], compute_dtype=jnp.float32), rtol=1e-3)


def test_polar_express_of_five_steps_is_the_published_table():
    assert with_steps(POLAR_EXPRESS, 5) is POLAR_EXPRESS
    derived = polar_express(1e-3, steps=5, safety=1.02, cushion=0.02)
    np.testing.assert_allclose(derived, POLAR_EXPRESS, rtol=2e-14)
    for steps in (1, 2, 7, 10):
        assert len(with_steps(POLAR_EXPRESS, steps)) == steps


def test_a_table_of_different_steps_can_be_shortened_and_not_lengthened():
    you = find_coefficients("you")
    assert with_steps(you, 3) == you[:3]
    with pytest.raises(ValueError, match=r"steps=6.*a table of 5 .*polar_express\(1e-3, steps=6\)"):
        normuon(0.1, coefficients="you", steps=6)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(coefficients="newton_shulz"), "did you mean 'newton_schulz'"),
        (dict(coefficients=()), "coefficients is empty"),
        (dict(coefficients=((1.0, 2.0),)), r"\(1.0, 2.0\), which is no \(a, b, c\)"),
        (dict(coefficients=((1.0, 2.0, float("nan")),)), "finite numbers"),
        (dict(steps=0), "steps=0; use a whole number"),
        (dict(steps=2.5), "steps=2.5; use a whole number"),
        (dict(eps=-1.0), "eps=-1.0; use a finite number of at least 0"),
    ],
)
def test_an_impossible_value_is_refused_when_it_is_given(keywords, message):
    for make in MAKERS.values():
        with pytest.raises(ValueError, match=message):
            make(**keywords)
    with pytest.raises(ValueError, match=message):
        find_recipe("normuon").override(**keywords)


def test_the_keywords_are_static_where_hyperparameters_are_injected():
    keywords = dict(coefficients="newton_schulz", steps=2, eps=3.0, weight_decay=0.1)
    assert {"coefficients", "steps", "eps"} <= set(STATIC_ARGS)

    def injected(**keywords):
        return inject_hyperparams(normuon)(0.1, **keywords)

    with jax.numpy_dtype_promotion("standard"):  # Optax's Adam computes 1 - b1 from an array
        found = update(injected, **keywords)
    chex.assert_trees_all_close(found, update(MAKERS["normuon"], **keywords), rtol=1e-6)


def test_an_array_where_a_program_wants_a_number_is_refused():
    """The launch of a kernel would take the array for a pointer."""
    for make in (MAKERS["normuon"], orthogonalize):
        with pytest.raises(TypeError, match="eps is no schedule"):
            make(eps=jnp.float32(1e-7))
    for array in ({"eps": jnp.float32(1e-7)}, {"norm_scale": jnp.float32(1.02)}):
        with pytest.raises(TypeError, match=r"use a number"):
            polar_factor(X["w"], **array)
