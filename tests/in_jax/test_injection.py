"""`inject_hyperparams` around our optimizers: the right one, or an error that says what to write."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_normuon
from optax_normuon import (
    STATIC_ARGS,
    MatrixLayout,
    inject_hyperparams,
    layout_by_path,
    muon,
    normuon,
    orthogonalize,
    scale_by_normuon,
    scale_by_shape,
)


def draw(seed) -> Any:
    random = np.random.default_rng(seed)
    shapes = {"bias": (8,), "kernel": (4, 8)}
    return {n: jnp.asarray(random.standard_normal(s), jnp.float32) for n, s in shapes.items()}


def layout(params):
    """A layout that is a function. Called with a step count in place of parameters it returns None."""
    return jax.tree.map(lambda leaf: MatrixLayout(0, 1) if leaf.ndim == 2 else None, params)


def update(tx) -> Any:
    return tx.update(draw(1), tx.init(draw(0)), draw(0))[0]


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam computes 1 - b1 from whatever it is given."""
    with jax.numpy_dtype_promotion("standard"):
        yield


INJECTIONS = {
    "ours": inject_hyperparams,
    "optax": lambda factory: optax.inject_hyperparams(factory, static_args=STATIC_ARGS),
    "optax without static_args": optax.inject_hyperparams,
}


@pytest.mark.parametrize("injection", INJECTIONS)
def test_injected_muon_is_muon_and_injected_normuon_is_normuon(injection):
    inject = INJECTIONS[injection]
    chex.assert_trees_all_close(update(inject(muon)(0.1)), update(muon(0.1)), rtol=1e-6)
    chex.assert_trees_all_close(update(inject(normuon)(0.1)), update(normuon(0.1)), rtol=1e-6)
    kernels = [update(inject(factory)(0.1))["kernel"] for factory in (muon, normuon)]
    assert not jnp.allclose(*kernels, rtol=1e-2)
    state = inject(muon)(0.1).init(draw(0))
    assert optax.tree.get(state, "second_moment") is None


def test_muon_shows_its_own_recipe_and_the_keywords_of_normuon():
    ours, theirs = (inspect.signature(f).parameters for f in (muon, normuon))
    assert list(ours) == list(theirs)
    assert ours["recipe"].default == "muon"
    assert {n for n in ours if ours[n].default != theirs[n].default} == {"recipe"}


STATIC = {
    "layout": layout,
    "layout by path": layout_by_path({"kernel": MatrixLayout(0, 1)}),
    "lr_mul": lambda params: jax.tree.map(lambda leaf: float(leaf.ndim), params),
    "wd_mul": lambda params: jax.tree.map(lambda leaf: float(leaf.ndim), params),
    "param_specs": lambda params: jax.tree.map(lambda leaf: jax.P(), params),
    "orthogonalizer": lambda stack: stack / 2,
    "compute_dtype": jnp.float32,
    "momentum_dtype": jnp.float32,
    "max_stack_bytes": 1000,
    "steps": 3,
    "eps": 3.0,
}


@pytest.mark.parametrize("name", STATIC)
def test_a_static_argument_that_optax_would_call_is_an_error_that_names_static_args(name):
    keywords: dict[str, Any] = {name.split()[0]: STATIC[name], "weight_decay": 0.1}
    with pytest.raises(TypeError, match=f"{name.split()[0]} is no schedule.*STATIC_ARGS"):
        update(optax.inject_hyperparams(normuon)(0.1, **keywords))
    plain = update(normuon(0.1, **keywords))
    for injection in ("ours", "optax"):
        found = update(INJECTIONS[injection](normuon)(0.1, **keywords))
        chex.assert_trees_all_close(found, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factory", [orthogonalize, scale_by_normuon, scale_by_shape])
def test_a_stage_can_be_injected_and_refuses_a_callable_layout_as_well(factory):
    found = update(inject_hyperparams(factory)(layout=layout))
    chex.assert_trees_all_close(found, update(factory(layout=layout)), rtol=1e-6)
    with pytest.raises(TypeError, match="layout is no schedule.*STATIC_ARGS"):
        update(optax.inject_hyperparams(factory)(layout=layout))


def test_the_ready_made_form_spares_bfloat16_parameters_a_rounding():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw(0))
    state: Any = inject_hyperparams(normuon)(0.1, beta2=0.95).init(params)
    assert float(state.hyperparams["beta2"]) == np.float32(0.95)
    own: Any = inject_hyperparams(normuon, hyperparam_dtype=None)(0.1, beta2=0.95).init(params)
    assert float(own.hyperparams["beta2"]) == 0.94921875


def test_a_value_set_in_the_state_takes_effect_without_another_compilation():
    tx = inject_hyperparams(muon)(0.1, momentum=0.9)
    state: Any = tx.init(draw(0))
    compiled: Any = jax.jit(tx.update)
    first, _ = compiled(draw(1), state, draw(0))
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    second, _ = compiled(draw(1), state, draw(0))
    chex.assert_trees_all_close(second, jax.tree.map(lambda u: 2 * u, first), rtol=1e-6)
    assert compiled._cache_size() == 1


def test_every_static_argument_is_one_of_normuon_and_none_of_them_is_a_rate():
    parameters = inspect.signature(normuon).parameters
    assert set(STATIC_ARGS) <= set(parameters)
    assert not [n for n in STATIC_ARGS if "rate" in n or "decay" in n]
    assert optax_normuon.STATIC_ARGS is STATIC_ARGS
