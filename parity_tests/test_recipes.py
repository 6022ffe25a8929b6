"""Every recipe in float64 against the oracle, on gradients and weights that no golden trace has."""

import dataclasses

import numpy as np
import pytest

from normuon_core import RECIPES, NormSetting, RowEquilibration
from parity_tests.cases import SHAPES, make_trace
from parity_tests.compare import infinity_distance
from parity_tests.covering import covering, rules_of
from parity_tests.jax_driver import run_jax
from parity_tests.oracle_driver import run_oracle
from parity_tests.torch_driver import run_torch

BOUND = 1e-11
FEWER_SHAPES = ("tall", "wide", "split stack")

pytestmark = pytest.mark.usefixtures("x64")


def distances(actual, expected) -> dict[str, float]:
    result = {}
    for name, (params, momentum, second_moment) in expected.items():
        result[name, "weights"] = infinity_distance(actual[name].params, params)
        result[name, "momentum"] = infinity_distance(actual[name].momentum, momentum)
        for t, moment in second_moment.items():
            result[name, f"second moment {t}"] = infinity_distance(
                actual[name].second_moment[t], moment
            )
    return result


def test_the_recipes_that_cover_the_others_leave_no_rule_out():
    few = covering()
    assert set().union(*map(rules_of, few)) == set().union(*map(rules_of, RECIPES))
    assert len(few) < len(RECIPES)


@pytest.mark.parametrize("run", [run_jax, run_torch], ids=["jax", "torch"])
@pytest.mark.parametrize("recipe", ["normuon", *covering()])
def test_hard_gradients_agree_with_the_oracle(recipe, run):
    """Largest distance: JAX 1.8e-13, torch 7.9e-14."""
    shapes = SHAPES if recipe == "normuon" else {name: SHAPES[name] for name in FEWER_SHAPES}
    trace = make_trace(recipe, shapes=shapes)
    found = distances(run(trace), run_oracle(trace))
    broken = {what: value for what, value in found.items() if not value <= BOUND}
    assert not broken


NORMUON = dataclasses.replace(
    RECIPES["normuon"],
    polar=dataclasses.replace(RECIPES["normuon"].polar, eps=1e-3, eps_rule="add"),
    neuron_norm=dataclasses.replace(RECIPES["normuon"].neuron_norm, eps=1e-3),
    row_equilibration=RowEquilibration(eps=1.0),
    norm_setting=NormSetting(eps=2.0),
)
"""With epsilons that are felt."""

VARIANTS = {
    "momentum.rule": "heavy_ball",
    "momentum.nesterov": False,
    "polar.coefficients": NORMUON.polar.coefficients[:-1],
    "polar.norm_scale": 1.1,
    "polar.eps": 1e-2,
    "polar.eps_rule": "max",
    "polar.preconditioning": "aol",
    "row_equilibration.eps": 2.0,
    "norm_setting.eps": 3.0,
    "neuron_norm.beta2": 0.9,
    "neuron_norm.axis": "input",
    "neuron_norm.eps": 1e-2,
    "neuron_norm.eps_rule": "add",
    "neuron_norm.rescale": None,
    "decay.cautious": False,
    "decay.inside_scale": False,
    "decay.rate_power": 2,
}
"""Every field but `momentum.momentum`, which a trace's schedule replaces."""


def test_there_is_a_variant_for_every_field_of_a_recipe():
    stages = (
        "momentum",
        "row_equilibration",
        "polar",
        "norm_setting",
        "neuron_norm",
        "decay",
    )
    fields = {
        f"{stage}.{field.name}"
        for stage in stages
        for field in dataclasses.fields(getattr(NORMUON, stage))
    }
    assert set(VARIANTS) == fields - {"momentum.momentum"}


@pytest.mark.parametrize("run", [run_jax, run_torch], ids=["jax", "torch"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_field_of_a_recipe_counts(variant, run):
    """An implementation that did not read a field would make the same steps with another value."""
    stage, field = variant.split(".")
    record = dataclasses.replace(getattr(NORMUON, stage), **{field: VARIANTS[variant]})
    changed = dataclasses.replace(NORMUON, **{stage: record})
    shapes = {"split": SHAPES["split"]}
    before = run_oracle(make_trace(NORMUON, shapes=shapes))
    trace = make_trace(changed, shapes=shapes)
    after = run_oracle(trace)
    assert max(infinity_distance(after[n].params, before[n].params) for n in shapes) > 100 * BOUND
    assert max(distances(run(trace), after).values()) <= BOUND


@pytest.mark.parametrize("run", [run_jax, run_torch], ids=["jax", "torch"])
@pytest.mark.parametrize("inside_scale", [True, False])
@pytest.mark.parametrize("rule", ["rms", "spectral"])
def test_the_mask_and_the_rms_scale_look_at_the_update_before_decay_and_scale(
    rule, inside_scale, run
):
    """A rate multiplier of 0 or -1 therefore leaves the mask as it is."""
    decay = dataclasses.replace(NORMUON.decay, inside_scale=inside_scale)
    recipe = dataclasses.replace(NORMUON, decay=decay, shape_scale=rule)
    made = make_trace(recipe, shapes={name: SHAPES[name] for name in ("split", "stack")}, steps=3)
    split, stack = made.weights
    weights = (
        dataclasses.replace(split, lr_mul=0.0),
        dataclasses.replace(stack, lr_mul=np.array([1.0, 0.0, -1.0])),
    )
    trace = dataclasses.replace(made, weights=weights)
    assert max(distances(run(trace), run_oracle(trace)).values()) <= BOUND
