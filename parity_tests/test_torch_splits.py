"""Fused projections in `torch_ref`: JAX's numbers, with and without kernels."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from normuon_core import MatrixLayout
from optax_normuon import normuon
from parity_tests.interpreted import interpreted_kernels
from torch_ref import NorMuon
from torch_ref.matrices.state import second_moments

HEADS, SIZE, D = 2, 4, 6
G = np.random.default_rng(0).standard_normal((2, 3 * HEADS * SIZE, D)).astype(np.float32)
W = np.random.default_rng(1).standard_normal(G.shape[1:]).astype(np.float32)

LAYOUTS = {
    "three blocks": MatrixLayout(1, 0, output_splits=3),
    "one a head": MatrixLayout(1, 0, output_splits=3 * HEADS),
    "unequal blocks": MatrixLayout(1, 0, output_splits=(16, 4, 4)),
    "each head in turn": MatrixLayout(3, (0, 2), unfold=(0, (HEADS, 3, SIZE))),
    "each head in turn, one a head": MatrixLayout(3, 2, unfold=(0, (HEADS, 3, SIZE))),
}


def run(layout, backend="eager", count=2):
    weight = torch.nn.Parameter(torch.from_numpy(W.copy()))
    keywords = dict(layout=layout, steps=1, compute_dtype=torch.float32, backend=backend)
    optimizer = NorMuon([weight], lr=0.1, weight_decay=0.1, algorithm="standard", **keywords)
    for gradient in G[:count]:
        weight.grad = torch.from_numpy(gradient)
        optimizer.step()
    return weight.detach().numpy(), second_moments(optimizer.state[weight])


def run_jax(layout, backend, count=2):
    keywords = dict(layout=layout, steps=1, compute_dtype=jnp.float32, backend=backend)
    tx = normuon(0.1, weight_decay=0.1, algorithm="standard", **keywords)
    weight = jnp.asarray(W)
    state = tx.init(weight)
    for gradient in G[:count]:
        updates, state = tx.update(jnp.asarray(gradient), state, weight)
        weight = weight + updates
    return np.asarray(weight)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_fused_projection_steps_as_in_jax(name):
    layout = LAYOUTS[name]
    found, (moment,) = run(layout)
    # 2.4e-7 at most.
    np.testing.assert_allclose(found, run_jax(layout, "xla"), rtol=0, atol=1e-6)
    # One array for all blocks.
    assert moment.shape == (len(W), 1)
    whole, _ = run(MatrixLayout(1, 0))
    assert not np.allclose(whole, found, atol=1e-3)


@pytest.mark.parametrize("name", ["unequal blocks", "each head in turn"])
def test_the_kernels_step_a_fused_projection_alike_in_both_frameworks(name, interpreted):
    del interpreted
    layout = LAYOUTS[name]
    by_kernels, _ = run(layout, "triton", count=1)
    found, _ = run(layout, count=1)
    # 2.4e-7 at most.
    np.testing.assert_allclose(by_kernels, found, rtol=0, atol=1e-6)
    with interpreted_kernels():
        np.testing.assert_array_equal(by_kernels, run_jax(layout, "triton", count=1))
