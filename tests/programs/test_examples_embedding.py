"""The GPT's lookup against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.embedding import lookup
from examples.gpt import GPTConfig, apply_model, first_parameters


def gradient_of(function, table, tokens, weights):
    return jax.grad(lambda table: jnp.sum(function(table, tokens) * weights))(table)


def indexed(table, tokens):
    return table[tokens]


@pytest.mark.parametrize("shape", [(7,), (3, 5)])
def test_values_and_gradients_are_those_of_indexing(shape):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(11, 4)), jnp.float32)
    tokens = jnp.asarray(rng.integers(0, 6, shape))
    weights = jnp.asarray(rng.normal(size=(*shape, 4)), jnp.float32)
    np.testing.assert_array_equal(lookup(table, tokens), table[tokens])
    expected = gradient_of(indexed, table, tokens, weights)
    # Measured: 0. Rows of tokens that are not there are zeros.
    np.testing.assert_allclose(
        gradient_of(lookup, table, tokens, weights), expected, rtol=0, atol=5e-7
    )
    assert not np.any(gradient_of(lookup, table, tokens, weights)[6:])


def test_a_frequent_token_keeps_its_gradient_in_bfloat16():
    tokens = jnp.zeros(4096, jnp.int32)
    ones = jnp.ones((4096, 2), jnp.bfloat16)
    gradient = gradient_of(lookup, jnp.zeros((3, 2), jnp.bfloat16), tokens, ones)
    # Added one by one in bfloat16 they stop at 256.
    np.testing.assert_array_equal(np.asarray(gradient[0], np.float32), 4096.0)


def test_the_gpt_uses_it():
    config = GPTConfig(width=16, depth=1, heads=2, context=8, vocabulary=32)
    params = first_parameters(config, 0)
    step = jax.jit(jax.grad(lambda params, tokens: apply_model(config, params, tokens).sum()))
    text = step.lower(params, jnp.zeros((2, 8), jnp.int32)).as_text()
    assert "stablehlo.scatter" not in text
