"""The losses of the phases: what they are of, and that parts of a batch make the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.gpt import GPTConfig, apply_model, first_parameters
from examples.losses import next_token, preference
from examples.optimizers import OptimizerConfig
from examples.step import Setup, compiled_step, first_state, means, shapes_of

MODEL = GPTConfig(width=16, depth=1, heads=2, context=12, vocabulary=32)
BETA = 0.3


@jax.jit
def forward(params, tokens, segments=None):
    return apply_model(MODEL, params, tokens, segments)


@pytest.fixture(scope="module")
def params():
    return first_parameters(MODEL, 0)


@pytest.fixture(scope="module")
def reference():
    return first_parameters(MODEL, 1)


def drawn(*shape, seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 32, shape)
    weights = np.zeros(shape, np.uint8)
    weights[..., 5 : 5 + shape[-1] // 2] = 1
    return {"tokens": jnp.asarray(tokens), "weights": jnp.asarray(weights)}


def log_probabilities(params, batch):
    """Summed over the tokens of weight, one window after the other in NumPy."""
    found = []
    width = batch["tokens"].shape[-1]
    for tokens, weights in zip(
        np.asarray(batch["tokens"]).reshape(-1, width),
        np.asarray(batch["weights"]).reshape(-1, width),
        strict=True,
    ):
        logits = np.asarray(forward(params, tokens[None, :-1]), np.float64)[0]
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        own = log[np.arange(len(log)), tokens[1:]]
        found.append((own * weights[1:]).sum())
    return np.array(found).reshape(batch["tokens"].shape[:-1])


def test_only_tokens_of_weight_are_in_the_loss(params):
    batch = drawn(4, 13)
    sums = next_token(forward, params, None, batch)
    expected = -log_probabilities(params, batch).sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    assert float(sums["weight"]) == np.asarray(batch["weights"])[:, 1:].sum()
    other = dict(batch, tokens=batch["tokens"].at[:, -1].set(3))  # behind all weight
    assert next_token(forward, params, None, other)["loss"] == sums["loss"]


def test_a_packed_window_has_the_losses_of_its_texts_alone(params):
    one, other = drawn(2, 6, seed=1), drawn(2, 7, seed=2)
    packed = {
        name: jnp.concatenate([one[name], other[name]], axis=1) for name in ("tokens", "weights")
    }
    packed["segments"] = jnp.asarray([[1] * 6 + [2] * 7] * 2)
    alone = [next_token(forward, params, None, each)["loss"] for each in (one, other)]
    together = next_token(forward, params, None, packed)["loss"]
    np.testing.assert_allclose(together, sum(alone), rtol=1e-5)


def test_the_preference_loss_is_the_one_of_the_paper(params, reference):
    batch = drawn(3, 2, 13)
    policy, frozen = (log_probabilities(each, batch) for each in (params, reference))
    margins = BETA * ((policy - frozen)[:, 0] - (policy - frozen)[:, 1])
    sums = preference(BETA)(forward, params, reference, batch)
    np.testing.assert_allclose(sums["loss"], np.log1p(np.exp(-margins)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["margin"], margins.sum(), rtol=1e-4)
    assert float(sums["preferred"]) == (margins > 0).sum()
    assert float(sums["weight"]) == 3


def test_it_begins_at_the_logarithm_of_two_and_fillers_do_not_count(params):
    batch = drawn(3, 2, 13)
    batch["weights"] = batch["weights"].at[2].set(0)
    sums = preference(BETA)(forward, params, params, batch)
    assert float(sums["weight"]) == 2
    np.testing.assert_allclose(means(sums)["loss"], np.log(2), rtol=1e-6)


def test_a_batch_in_parts_makes_the_update_of_the_whole():
    """Also where the parts have unequal weights, of which a mean of means would be another number."""
    batch = drawn(4, 13)
    batch["weights"] = batch["weights"].at[1].set(0).at[3, 7:].set(0)
    config = OptimizerConfig("muon", learning_rate=0.02, adam_learning_rate=0.01)

    def stepped(parts):
        optimizer = dataclasses.replace(config, accumulation=parts)
        setup = Setup(MODEL, optimizer, 10, next_token)
        with jax.numpy_dtype_promotion("standard"):
            step = compiled_step(setup, shapes_of(batch), frozen=False, diagnostics=False)
            state, logged = step(first_state(setup, 0), None, batch)
            return state, logged.as_tree()

    (whole, logged), (parts, logged_in_parts) = stepped(1), stepped(2)
    np.testing.assert_allclose(logged_in_parts["loss"], logged["loss"], rtol=1e-6)
    norms = logged["gradient_norm"], logged_in_parts["gradient_norm"]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
