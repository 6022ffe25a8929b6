"""The published coefficient sets, and the solver that derives the optimal ones."""

import chex
import numpy as np
import pytest

from normuon_core import POLYNOMIALS, optimal_quintic, polar_express
from normuon_core.polynomials import evaluate, with_safety


def test_the_solver_reproduces_the_modded_nanogpt_table():
    """Measured: 3.6e-15."""
    derived = polar_express(1e-3, steps=5, safety=1.02, cushion=0.02)
    chex.assert_trees_all_close(derived, POLYNOMIALS["polar_express"], rtol=2e-14)


def test_the_solver_reproduces_the_papers_table():
    """Measured: 2.2e-15."""
    derived = polar_express(1e-3, steps=8, cushion=0.02407327424182761)[:5]
    chex.assert_trees_all_close(derived, POLYNOMIALS["polar_express_unscaled"], rtol=2e-14)
    scaled = with_safety(derived, 1.05)
    chex.assert_trees_all_close(scaled, POLYNOMIALS["polar_express_1_05"], rtol=2e-14)


def test_another_cushion_gives_another_table():
    derived = polar_express(1e-3, steps=5, safety=1.02, cushion=0.1)
    difference = np.abs(np.subtract(derived, POLYNOMIALS["polar_express"]))
    assert difference.max() > 0.1


@pytest.mark.parametrize("lower", [1e-3, 0.05, 0.5, 0.99])
def test_the_optimal_quintic_equioscillates(lower):
    """Chebyshev: the largest error is reached four times, with alternating signs."""
    x = np.linspace(lower, 1, 200_001)
    error = 1 - evaluate((optimal_quintic(lower, 1.0),), x)
    worst = np.abs(error).max()
    signs = np.sign(error[np.abs(error) > worst * (1 - 1e-6)])
    assert np.count_nonzero(np.diff(signs)) == 3


def test_near_one_the_optimal_quintic_is_taylors():
    chex.assert_trees_all_close(
        optimal_quintic(1 - 1e-7, 1.0), POLYNOMIALS["quintic_taylor"][0], rtol=1e-12
    )


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0)])
def test_an_empty_interval_is_refused(lower, upper):
    with pytest.raises(ValueError, match="0 < lower <= upper"):
        optimal_quintic(lower, upper)


@pytest.mark.parametrize("name", ["polar_express", "polar_express_1_05", "you", "newton_schulz"])
def test_every_set_lifts_all_but_the_smallest_singular_values(name):
    """Five steps bring [0.01, 1/1.05] into [0.6, 1.3]; the smallest values are not promised."""
    lifted = evaluate(POLYNOMIALS[name], np.linspace(0.01, 1 / 1.05, 10_001))
    assert lifted.min() > 0.6
    assert lifted.max() < 1.3


@pytest.mark.parametrize("name", ["cubic", "quintic_taylor"])
def test_the_taylor_sets_never_overshoot(name):
    lifted = evaluate(POLYNOMIALS[name], np.linspace(0, 1, 1001))
    assert lifted.max() <= 1 + 1e-15
    assert lifted[500] > 0.99
