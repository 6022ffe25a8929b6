"""The published coefficient sets, and the solver that derives the optimal ones."""

import chex
import numpy as np
import pytest

from normuon_core import POLYNOMIALS, optimal_quintic, polar_express, relaxed_cubic
from normuon_core.polynomials import evaluate, with_safety, with_steps


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


def test_cans_is_polar_express_without_cushion_and_safety():
    """To the four digits that are published."""
    derived = polar_express(1e-3, steps=5, cushion=0.0)
    chex.assert_trees_all_close(derived, POLYNOMIALS["cans"], rtol=0, atol=1e-4)
    other = np.abs(np.subtract(polar_express(1.2e-3, steps=5, cushion=0.0), POLYNOMIALS["cans"]))
    assert other.max() > 1e-2


def test_the_relaxed_cubics_are_derived_to_the_digits_that_are_published():
    derived = relaxed_cubic(7e-3, steps=5, peak=1.3)
    chex.assert_trees_all_close(derived, POLYNOMIALS["relaxed_cubic"], rtol=0, atol=5.1e-8)


@pytest.mark.parametrize("lower", [1e-3, 0.1, 0.9])
def test_a_relaxed_cubic_has_its_peak_inside_and_its_smallest_values_at_the_ends(lower):
    lifted = evaluate(relaxed_cubic(lower, steps=1, peak=1.1), np.linspace(lower, 1, 100_001))
    assert abs(lifted.max() - 1.1) < 1e-8
    assert abs(lifted[0] - lifted[-1]) < 1e-12
    assert lifted.argmin() in (0, len(lifted) - 1)


def test_aols_steps_are_near_one_where_their_first_is_positive():
    """The image of [0.05, 0.8] is [0.98737, 1.01165]; above 0.884 the first polynomial is negative."""
    aol = POLYNOMIALS["aol"]
    image = evaluate(aol, np.linspace(0.05, 0.8, 100_001))
    np.testing.assert_allclose((image.min(), image.max()), (0.98737, 1.01165), rtol=1e-5)
    assert evaluate(aol[:1], 0.883) > 0 > evaluate(aol[:1], 0.884)


def test_deepseeks_last_steps_leave_one_where_it_is():
    a, b, c = POLYNOMIALS["deepseek_v4"][-1]
    assert (a + b + c, a + 3 * b + 5 * c) == (1, 0)
    assert POLYNOMIALS["deepseek_v4"][:8] == POLYNOMIALS["newton_schulz"][:1] * 8
    assert len(POLYNOMIALS["deepseek_v4"]) == 10
    image = evaluate(POLYNOMIALS["deepseek_v4"], np.geomspace(1e-2, 1, 10_001))
    assert np.abs(image - 1).max() < 0.05


@pytest.mark.parametrize(
    "name",
    ["polar_express", "polar_express_unscaled", "polar_express_1_05", "cans", "relaxed_cubic"],
)
def test_a_derived_set_has_any_length(name):
    """A longer one continues the table: its first steps but the last are the published ones."""
    table = POLYNOMIALS[name]
    for steps in (2, 5, 9):
        found = with_steps(table, steps)
        assert len(found) == steps
        chex.assert_trees_all_close(
            found[: min(steps, 5) - 1], table[: min(steps, 5) - 1], rtol=1e-3
        )
    small = 1e-4
    assert evaluate(with_steps(table, 9), small) > 3 * evaluate(table, small)


@pytest.mark.parametrize("name", ["you", "aol", "deepseek_v4"])
def test_a_set_that_nothing_derives_gets_no_longer(name):
    with pytest.raises(ValueError, match="steps=11, but these coefficients are a table"):
        with_steps(POLYNOMIALS[name], 11)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lower_bound": 0.0}, "lower_bound=0.0: use a number in"),
        ({"steps": 0}, "steps=0: use a whole number"),
        ({"peak": 0.9}, "peak=0.9: use a finite number of at least 1"),
    ],
)
def test_relaxed_cubic_refuses_arguments_that_it_cannot_use(given, message):
    with pytest.raises(ValueError, match=message):
        relaxed_cubic(**{"lower_bound": 7e-3, "steps": 5, "peak": 1.3, **given})


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


def test_the_optimal_quintic_of_a_short_interval_is_the_taylor_quintic():
    """The middle of the interval is 5e-8 below 1, which changes the last coefficient by 2.5e-7."""
    chex.assert_trees_all_close(
        optimal_quintic(1 - 1e-7, 1.0), POLYNOMIALS["quintic_taylor"][0], rtol=1e-6
    )


def test_the_optimal_quintic_is_continuous_where_the_taylor_quintic_takes_over():
    """Measured: 5.8e-7."""
    below, above = optimal_quintic(1 - 1.0001e-3, 1.0), optimal_quintic(1 - 0.9999e-3, 1.0)
    chex.assert_trees_all_close(below, above, rtol=2.4e-6)


@pytest.mark.parametrize("safety", [1.0, 1.01, 2.0])
@pytest.mark.parametrize("steps", [1, 16])
def test_every_lower_bound_has_polynomials(steps, safety):
    for lower in np.geomspace(1e-8, 0.999, 50):
        found = np.array(polar_express(float(lower), steps=steps, safety=safety))
        assert found.shape == (steps, 3)
        assert np.isfinite(found).all()


def test_steps_after_convergence_are_the_taylor_quintic():
    """A lower bound of 0.003 needs eight steps; the ninth has nothing left to correct."""
    for lower in (0.0029, 0.003, 0.0031):
        last = polar_express(lower, steps=16)[-1]
        chex.assert_trees_all_close(last, POLYNOMIALS["quintic_taylor"][0], rtol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lower_bound": 0.0}, "lower_bound=0.0: use a number in"),
        ({"lower_bound": 1.0}, "lower_bound=1.0: use a number in"),
        ({"steps": 0}, "steps=0: use a whole number"),
        ({"safety": 0.9}, "safety=0.9: use a finite number of at least 1"),
        ({"cushion": 1.5}, "cushion=1.5: use a number in"),
    ],
)
def test_polar_express_refuses_arguments_that_it_cannot_use(given, message):
    with pytest.raises(ValueError, match=message):
        polar_express(**{"lower_bound": 1e-3, "steps": 5, **given})


@pytest.mark.parametrize(("lower", "upper"), [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0)])
def test_an_empty_interval_is_refused(lower, upper):
    with pytest.raises(ValueError, match="0 < lower <= upper"):
        optimal_quintic(lower, upper)


@pytest.mark.parametrize("name", ["polar_express", "polar_express_1_05", "you", "newton_schulz"])
def test_every_set_lifts_all_but_the_smallest_singular_values(name):
    """Five steps bring [0.01, 1/1.05] into [0.6, 1.3]; nothing is promised for smaller values."""
    lifted = evaluate(POLYNOMIALS[name], np.linspace(0.01, 1 / 1.05, 10_001))
    assert lifted.min() > 0.6
    assert lifted.max() < 1.3


@pytest.mark.parametrize("name", ["cubic", "quintic_taylor"])
def test_the_taylor_sets_never_overshoot(name):
    lifted = evaluate(POLYNOMIALS[name], np.linspace(0, 1, 1001))
    assert lifted.max() <= 1 + 1e-15
    assert lifted[500] > 0.99
