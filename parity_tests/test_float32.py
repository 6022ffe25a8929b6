"""Tier T1: JAX against torch in float32 on the CPU, the first step and fifty of them."""

import numpy as np
import pytest
import torch

from parity_tests.cases import SHAPES, make_trace
from parity_tests.compare import infinity_distance
from parity_tests.covering import covering
from parity_tests.jax_driver import run_jax
from parity_tests.torch_driver import run_torch

STEPS = 50

BOUNDS = {
    "first increment": 4.8e-4,  # 4 x 1.2e-4, a rank-one gradient under the modded-nanogpt recipes
    "weights": 1.2e-5,  # 4 x 2.8e-6, `muon`
    "momentum": 5e-7,  # equal to the bit here; four ulps where a compiler fuses otherwise
    "second moment": 3.4e-4,  # 4 x 8.4e-5, the modded-nanogpt recipes
}
"""Relative infinity norms, the largest measured one beside each."""


def trajectories(recipe):
    shapes = {name: SHAPES[name] for name in ("tall", "split")}
    trace = make_trace(recipe, steps=STEPS, shapes=shapes)
    return run_jax(trace, dtype=np.float32), run_torch(trace, dtype=torch.float32)


def distances(ours, theirs) -> dict[str, float]:
    pairs = [(ours[name], theirs[name]) for name in theirs]
    first = [[t.params[1] - t.params[0] for t in pair] for pair in pairs]
    moments = [
        [t.second_moment[step] for t in pair] for pair in pairs for step in pair[1].second_moment
    ]
    compared = {
        "first increment": first,
        "weights": [[t.params for t in pair] for pair in pairs],
        "momentum": [[t.momentum for t in pair] for pair in pairs],
        "second moment": moments,
    }
    return {
        what: max((infinity_distance(*pair) for pair in cells), default=0.0)
        for what, cells in compared.items()
    }


@pytest.mark.parametrize("recipe", covering())
def test_fifty_steps_of_both_frameworks_stay_within_the_bounds(recipe):
    found = distances(*trajectories(recipe))
    assert all(found[what] <= bound for what, bound in BOUNDS.items()), found


def test_another_recipe_leaves_the_bounds():
    ours, _ = trajectories("normuon")
    _, theirs = trajectories("normuon_official")
    found = distances(ours, theirs)
    assert found["weights"] > 1000 * BOUNDS["weights"]
    assert found["momentum"] <= BOUNDS["momentum"]
