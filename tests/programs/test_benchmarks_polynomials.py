"""The benchmark of sets of polynomials: what it calls an error, and that it runs without a GPU."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import polar_errors, polynomials
from benchmarks.polar_errors import CONTESTANTS, errors, in_jax, over, problems
from benchmarks.race import Pace
from normuon_core.polynomials import evaluate


def test_the_exact_factor_has_no_error_and_its_negative_two():
    for name, problem in problems(24, 40).items():
        assert problem.error(problem.factor) < 1e-14, name
        assert problem.error(-problem.factor) == pytest.approx(2.0), name
        assert problem.error(torch.zeros_like(problem.factor)) == pytest.approx(1.0), name


@pytest.mark.parametrize("name", ["newton_schulz", "relaxed cubics, 7 steps"])
@pytest.mark.parametrize("sides", [(24, 40), (40, 24)])
def test_an_error_is_the_polynomials_own_at_the_singular_values(name, sides):
    """In float32, where rounding is small beside it; 1.02 is how far the norm is kept below 1."""
    contestant = CONTESTANTS[name]
    found = errors(in_jax(contestant, compute_dtype=jnp.float32), problems(*sides))
    for spectrum, values in polar_errors.SPECTRA.items():
        s = values(24, 40, "cpu").double().numpy()
        wanted = evaluate(contestant.coefficients, s / np.linalg.norm(s) / 1.02) - 1
        rms = np.sqrt(np.mean(wanted**2))
        assert found[spectrum] == pytest.approx(rms, rel=1e-3), spectrum


def test_a_set_that_is_worse_on_one_spectrum_is_not_as_accurate():
    assert over({"a": 0.1, "b": 0.6}, {"a": 0.2, "b": 0.5}) == pytest.approx(1.2)


def test_without_a_gpu_xla_is_timed_and_the_kernels_say_what_they_need(monkeypatch):
    some = {name: CONTESTANTS[name] for name in ("newton_schulz", "aol", "relaxed_cubic")}
    monkeypatch.setattr(polynomials, "CONTESTANTS", some)
    shapes = (2, 32, 64), (1, 16, 16)
    found = {each.name: each for each in polynomials.races(shapes, Pace(rounds=1, turn=0))}
    assert list(found) == [
        *(f"2x32x64, {name}" for name in polynomials.ENGINES),
        # The kernels' own choice is the standard form already.
        *(f"1x16x16, {name}" for name in ("Triton", "XLA, standard")),
    ]
    rows = {row.who: row for row in found["2x32x64, XLA, standard"].rows}
    assert list(rows) == list(some)
    assert all(row.milliseconds for row in rows.values())
    assert rows["newton_schulz"].more["error"] == 1.0
    # A gradient of rank one is stepped the wrong way by the set `aol`.
    assert rows["aol"].more["rank one"] == pytest.approx(1.96, abs=0.1)
    # 5 steps of 15 + 5 n^3 (symmetric products half) at ratio 2 with A^2, of 15 without.
    work = {who: row.operations / 2 / 32**3 for who, row in rows.items()}
    assert (work["newton_schulz"], work["relaxed_cubic"]) == (15 * 2 + 5, 15 * 2)
    if not torch.cuda.is_available():
        for row in found["2x32x64, Triton"].rows:
            assert "CUDA" in row.failure
