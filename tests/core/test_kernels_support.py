"""The kernels can run all recipes of flat space, and none with a rule that they do not know."""

import dataclasses
from typing import Literal

import pytest

from normuon_core import RECIPES, recipes
from normuon_core.kernels_support import kernels_support


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].hyperball is None])
def test_the_kernels_can_run_every_recipe_of_flat_space(name):
    support = kernels_support(RECIPES[name])
    assert support
    assert support.lacking == ()


@pytest.mark.parametrize("name", ["muon_h", "normuon_h"])
def test_the_kernels_know_no_hyperball(name):
    support = kernels_support(RECIPES[name])
    assert not support
    assert str(support) == "the kernels cannot run hyperball=Hyperball(radius=None)"


@pytest.mark.parametrize(
    ("stage", "field", "literal"),
    [
        ("momentum", "rule", "MomentumRule"),
        ("polar", "eps_rule", "EpsRule"),
        ("neuron_norm", "eps_rule", "EpsRule"),
        ("neuron_norm", "rescale", "EpsRule"),
        ("neuron_norm", "axis", "NeuronAxis"),
    ],
)
def test_a_rule_that_the_recipes_have_learnt_is_none_of_the_kernels(
    monkeypatch, stage, field, literal
):
    monkeypatch.setattr(recipes, literal, Literal["max", "output", "lerp", "new"])
    record = dataclasses.replace(getattr(RECIPES["normuon"], stage), **{field: "new"})
    support = kernels_support(dataclasses.replace(RECIPES["normuon"], **{stage: record}))
    assert not support
    assert support.lacking == (f"{stage}.{field}='new'",)
    assert f"{stage}.{field}='new'" in str(support)


def test_numbers_are_no_obstacle():
    recipe = RECIPES["normuon"].override(momentum=0.5, beta2=0.5, eps=0.5, steps=3)
    assert kernels_support(recipe)


@dataclasses.dataclass(frozen=True)
class WithOneMoreStage(recipes.Recipe):
    """A recipe of the future."""

    after_norm: str | None = None


def test_a_new_field_is_an_obstacle_unless_it_has_its_default():
    own = vars(RECIPES["normuon"])
    assert kernels_support(WithOneMoreStage(**own))
    support = kernels_support(WithOneMoreStage(**own, after_norm="rows"))
    assert support.lacking == ("after_norm='rows'",)


@dataclasses.dataclass(frozen=True)
class AnotherNorm:
    """In the place of a record that the kernels know."""

    beta2: float = 0.9


def test_a_record_of_another_class_is_an_obstacle():
    recipe = dataclasses.replace(RECIPES["normuon"], neuron_norm=AnotherNorm())
    assert kernels_support(recipe).lacking == ("neuron_norm=AnotherNorm(beta2=0.9)",)


def test_the_polar_factor_can_be_asked_about_alone(monkeypatch):
    monkeypatch.setattr(recipes, "EpsRule", Literal["max", "new"])
    assert kernels_support(recipes.Polar())
    aol = kernels_support(recipes.Polar(preconditioning="aol"))
    assert aol.lacking == ("preconditioning='aol'",)
    assert kernels_support(recipes.Polar(eps_rule="new")).lacking == ("eps_rule='new'",)
