"""The example's model: causal, rotary, and routed as intended."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_normuon
from examples.gpt import GPT, GPTConfig, parameter_count, rotate

TINY = GPTConfig(width=32, depth=2, heads=2, context=16)


@pytest.fixture(scope="module")
def model():
    return GPT(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (2, 16), dtype=np.uint8)


def test_a_future_byte_changes_no_earlier_logits(model, tokens):
    changed = tokens.copy()
    changed[:, 9] ^= 1
    before, after = np.asarray(model(jnp.asarray(tokens))), np.asarray(model(jnp.asarray(changed)))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[:, 9:].max(axis=(0, 2)) > 1e-4).all()


def test_logits_are_float32_also_with_half_precision_activations(tokens):
    config = GPTConfig(width=32, depth=1, heads=2, context=16, dtype="bfloat16")
    logits = GPT(config, rngs=nnx.Rngs(0))(jnp.asarray(tokens))
    assert logits.shape == (2, 16, 256)
    assert logits.dtype == jnp.float32


def test_rotary_products_depend_on_the_distance_alone():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8), jnp.float32)
    everywhere = jnp.broadcast_to(query, (1, 12, 1, 8)), jnp.broadcast_to(key, (1, 12, 1, 8))
    scores = jnp.einsum("bqhd,bkhd->qk", *map(rotate, everywhere))
    for distance in range(12):
        diagonal = jnp.diagonal(scores, -distance)
        np.testing.assert_allclose(diagonal, jnp.full_like(diagonal, diagonal[0]), atol=1e-5)
    assert abs(scores[1, 0] - scores[2, 0]) > 1e-2
    np.testing.assert_allclose(scores[0, 0], jnp.vdot(query, key), rtol=1e-5)


def test_every_width_that_heads_do_not_split_is_refused():
    with pytest.raises(ValueError, match="width=36"):
        GPTConfig(width=36, heads=4)


def test_only_the_matrices_of_the_blocks_go_to_normuon(model):
    table = optax_normuon.describe(nnx.state(model, nnx.Param)).splitlines()[2:]
    matrices = {line.split()[0] for line in table if "NorMuon" in line}
    layers = ("attention/query", "attention/key", "attention/value", "attention/out")
    layers = (*layers, "mlp/up", "mlp/down")
    assert matrices == {f"blocks/{i}/{layer}/kernel" for i in range(2) for layer in layers}
    others = {line.split()[0] for line in table if "AdamW" in line}
    assert {"embed/embedding", "lm_head/kernel"} < others


def test_parameter_count(model):
    width, depth, head_size = 32, 2, 16
    norms = width * (2 * depth + 2) + 2 * depth * head_size
    assert parameter_count(TINY) == 2 * 256 * width + depth * 12 * width**2 + norms
