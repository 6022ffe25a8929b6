"""QK-clip: both frameworks against the oracle in float64, for every way in which heads can lie."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import optax_normuon
import torch_ref
from normuon_core import HeadLayout
from parity_tests import oracle
from parity_tests.compare import infinity_distance

BOUND = 1e-15
TAU = 2.0
LOGITS = np.array([1.0, 5.0, 2.0, -3.0, 40.0, 2.5])
"""Of six query heads: below tau, at it, negative, and above it."""

CASES = {
    "merged, (in, out)": (HeadLayout(heads=6), (5, 24)),
    "merged, (out, in)": (HeadLayout(heads=6, axis=0), (24, 5)),
    "an axis of heads": (HeadLayout(axis=-2), (5, 6, 4)),
    "heads first": (HeadLayout(axis=0), (6, 4, 5)),
    "keys of two heads each": (HeadLayout(heads=3), (5, 12)),
    "one key for all": (HeadLayout(heads=1, axis=0), (4, 5)),
    "latent queries": (HeadLayout(axis=-2, channels=((3, 0.5), (2, 1.0))), (4, 6, 5)),
    "latent keys and values": (HeadLayout(axis=-2, channels=((3, 0.5), (4, 0.0))), (4, 6, 7)),
    "latent queries, merged": (HeadLayout(6, 0, ((3, 0.5), (2, 1.0))), (30, 4)),
    "a bias": (HeadLayout(heads=6), (24,)),
}

STACKED = {
    "layers first": (HeadLayout(heads=6), (3, 5, 24), 0),
    "layers behind the inputs": (HeadLayout(axis=-2, layer_axis=1), (5, 3, 6, 4), 1),
    "layers last": (HeadLayout(axis=0, layer_axis=-1), (6, 4, 5, 3), 3),
    "layers last, merged": (HeadLayout(heads=3, axis=0, layer_axis=-1), (12, 5, 3), 2),
}


def in_jax(p, update, logits, layout) -> np.ndarray:
    tx = optax_normuon.qk_clip(TAU, {"attention/query": layout})
    params = {"attention": {"query": jnp.asarray(p)}, "other": jnp.ones(3)}
    updates = {"attention": {"query": jnp.asarray(update)}, "other": jnp.ones(3)}
    state = tx.init(params)
    updates, _ = tx.update(
        updates, state, params, largest_logits={"attention": jnp.asarray(logits)}
    )
    return np.asarray(optax.apply_updates(params, updates)["attention"]["query"])


def in_torch(p, update, logits, layout) -> np.ndarray:
    param = torch.tensor(p + update)
    named = [("attention.query", param), ("other", torch.ones(3))]
    logits = {"attention": torch.tensor(logits)}
    torch_ref.qk_clip(named, logits, tau=TAU, weights={"attention.query": layout})
    return param.numpy()


def draw(shape) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape), 0.1 * rng.standard_normal(shape)


@pytest.mark.parametrize("run", [in_jax, in_torch])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("x64")
def test_heads_are_scaled_as_the_oracle_says(case, run):
    """Largest distance: 2.2e-16."""
    layout, shape = CASES[case]
    p, update = draw(shape)
    wanted = oracle.qk_clip(p + update, LOGITS, TAU, layout)
    found = run(p, update, LOGITS, layout)
    assert infinity_distance(found, wanted) <= BOUND
    assert infinity_distance(found, p + update) > 0.1


@pytest.mark.parametrize("run", [in_jax, in_torch])
@pytest.mark.parametrize("case", STACKED)
@pytest.mark.usefixtures("x64")
def test_stacked_layers_have_logits_of_their_own(case, run):
    layout, shape, layer_axis = STACKED[case]
    p, update = draw(shape)
    logits = np.stack([LOGITS, LOGITS[::-1], 0.1 * LOGITS])
    one = HeadLayout(layout.heads, layout.axis if layout.axis < 0 else 0)
    layers = [
        oracle.qk_clip(np.take(p + update, i, layer_axis), own, TAU, one)
        for i, own in enumerate(logits)
    ]
    wanted = np.stack(layers, layer_axis)
    assert infinity_distance(run(p, update, logits, layout), wanted) <= BOUND


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rotary", [0, 2])
def test_no_logit_stays_above_tau(rotary):
    """By the definition: with 2 queries a key, and in latent attention a rotary key that all share."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((20, 8))
    query, key = rng.standard_normal((8, 4, 3 + rotary)), rng.standard_normal((8, 2, 3))
    shared = rng.standard_normal((8, rotary))

    def largest(query, key):
        q = np.einsum("ti,ihc->thc", x, query)
        k = np.repeat(np.einsum("ti,ihc->thc", x, key), 4 // key.shape[1], axis=1)
        turned = np.broadcast_to((x @ shared)[:, None], (20, 4, rotary))
        s = np.einsum("thc,shc->hts", q, np.concatenate([k, turned], -1))
        return s.max(axis=(1, 2))

    # The rotary part is as in latent attention: every head has its own key beside the shared one.
    key = np.repeat(key, 2, axis=1) if rotary else key
    before = largest(query, key)
    tau = float(np.median(before))
    channels = ((3, 0.5), (2, 1.0)) if rotary else None
    weights = {"q": HeadLayout(axis=-2, channels=channels), "k": HeadLayout(axis=-2)}
    params = {"q": jnp.asarray(query), "k": jnp.asarray(key)}
    tx = optax_normuon.qk_clip(tau, weights)
    zeros = {name: jnp.zeros_like(p) for name, p in params.items()}
    updates, _ = tx.update(zeros, tx.init(params), params, largest_logits=before)
    after = largest(*(np.asarray(params[name] + updates[name]) for name in ("q", "k")))
    assert (before > tau).any()
    assert (after <= tau * (1 + 1e-12)).all()
    if rotary:
        np.testing.assert_allclose(after, np.minimum(before, tau), rtol=1e-12)
