"""A recipe and its records check themselves when they are made."""

from dataclasses import replace

import numpy as np
import pytest

from normuon_core import RECIPES
from normuon_core.recipes import Decay, Momentum, NeuronNorm, Polar

ADD_OR_MAX = "Known: add, max"


def test_numpys_numbers_become_pythons():
    """Kernels take Python's by value; a NumPy scalar has a dtype, and would pass for an array."""
    kept = [
        Polar(eps=np.float32(1e-9)).eps,
        Polar(norm_scale=np.float64(1.5)).norm_scale,
        NeuronNorm(eps=np.float32(1e-9)).eps,
        Polar(coefficients=np.array([[1.0, -0.5, 0.1]])).coefficients[0][0],
    ]
    assert [type(value) for value in kept] == [float] * 4


@pytest.mark.parametrize(
    ("record", "field", "value", "message"),
    [
        (Momentum, "rule", "lerpp", "unknown momentum rule 'lerpp'; did you mean 'lerp'"),
        (Momentum, "momentum", 1.0, r"momentum=1.0; use a number in \[0, 1\)"),
        (Momentum, "momentum", float("nan"), r"momentum=nan; use a number in \[0, 1\)"),
        (Polar, "eps_rule", "mx", f"unknown eps_rule 'mx'; did you mean 'max'.*{ADD_OR_MAX}"),
        (Polar, "eps", -1e-7, "eps=-1e-07; use a finite number of at least 0"),
        (Polar, "norm_scale", float("inf"), "norm_scale=inf; use a finite number"),
        (NeuronNorm, "axis", "outputs", "unknown axis 'outputs'; did you mean 'output'"),
        (NeuronNorm, "beta2", -0.5, r"beta2=-0.5; use a number in \[0, 1\)"),
        (NeuronNorm, "eps_rule", None, f"unknown eps_rule None.*{ADD_OR_MAX}"),
        (NeuronNorm, "rescale", "none", f"unknown rescale 'none'.*{ADD_OR_MAX}"),
        (NeuronNorm, "eps", np.float32(-1), "eps=-1.0; use a finite number"),
        (Decay, "rate_power", 3, "unknown rate_power 3.*Known: 1, 2"),
        (Decay, "rate_power", True, "unknown rate_power True.*Known: 1, 2"),
    ],
    ids=str,
)
def test_a_record_refuses_unknown_rules_and_numbers_out_of_range(record, field, value, message):
    with pytest.raises(ValueError, match=message):
        record(**{field: value})
    with pytest.raises(ValueError, match=message):
        replace(record(), **{field: value})


def test_a_recipe_refuses_an_unknown_shape_scale():
    with pytest.raises(
        ValueError, match="unknown shape scale 'spectrall'; did you mean 'spectral'"
    ):
        replace(RECIPES["normuon"], shape_scale="spectrall")


def test_a_record_does_not_check_schedules_and_arrays():
    """Their values are not known when the record is made."""
    recipe = RECIPES["normuon"].override(momentum=np.asarray(2.0), beta2=np.asarray([7.0]))
    assert recipe.momentum.momentum == 2.0
    assert callable(replace(recipe.momentum, momentum=lambda count: 0.9).momentum)
