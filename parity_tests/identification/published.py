"""Every published value of a stage: what the search tries. New recipes, stages and sets come in by
themselves, for all is read off `RECIPES`, `POLYNOMIALS` and the types of the records' fields."""

import itertools
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from normuon_core import (
    POLYNOMIALS,
    RECIPES,
    Coefficients,
    Decay,
    Momentum,
    NeuronNorm,
    Polar,
    Recipe,
)
from normuon_core.neurons import NeuronAxis
from normuon_core.polynomials import with_steps
from normuon_core.recipes import MomentumRule, RatePower
from normuon_core.shape_rules import ShapeRule

MOMENTA = [
    Momentum(rule, nesterov=nesterov)
    for rule in get_args(MomentumRule)
    for nesterov in (True, False)
]
AXES = get_args(NeuronAxis)
SHAPE_RULES = get_args(ShapeRule)
DECAYS = [
    Decay(cautious, inside, power)
    for cautious, inside, power in itertools.product(
        (False, True), (False, True), get_args(RatePower)
    )
]
BETA2S = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999)
STEPS = range(1, 13)


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


EPSES = _distinct(
    [(r.polar.eps, r.polar.eps_rule) for r in RECIPES.values()]
    + [(eps, "add") for eps in (1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12)]
)
NORM_SCALES = _distinct([r.polar.norm_scale for r in RECIPES.values()] + [1.0, 1.01, 1.02, 1.05])
NEURON_NORMS: list[NeuronNorm | None] = _distinct(r.neuron_norm for r in RECIPES.values())

_NUMBERS = {"coefficients", "norm_scale", "eps", "eps_rule"}
_ALWAYS = {"momentum", "polar", "neuron_norm", "decay", "shape_scale", "source"}
FURTHER: dict[str, list[Any]] = {
    field.name: _distinct([None, *(getattr(recipe, field.name) for recipe in RECIPES.values())])
    for field in fields(Recipe)
    if field.name not in _ALWAYS
}
"""Stages that only some recipes have, with None first."""


def polynomials() -> dict[Coefficients, str]:
    """Every set at every length that it can be brought to, with its name; published lengths first."""
    found = {coefficients: name for name, coefficients in POLYNOMIALS.items()}
    for recipe in RECIPES.values():
        found.setdefault(recipe.polar.coefficients, "")
    for (name, coefficients), steps in itertools.product(POLYNOMIALS.items(), STEPS):
        try:
            found.setdefault(with_steps(coefficients, steps), f"{name}, {steps} steps")
        except ValueError:  # Longer than a table that no solver derives.
            continue
    return found


_FREE = [f.name for f in fields(Polar) if f.name not in _NUMBERS]
_OPTIONS = [get_args(get_type_hints(Polar)[name]) for name in _FREE]


def polar_variants(polar: Polar) -> list[Polar]:
    """The polar factor with every choice of its further options, those beside its numbers."""
    return [
        replace(polar, **dict(zip(_FREE, values, strict=True)))
        for values in itertools.product(*_OPTIONS)
    ]


def further_stages(recipe: Recipe) -> list[Recipe]:
    """The recipe with every combination of the stages that only some have."""
    return [
        replace(recipe, **dict(zip(FURTHER, values, strict=True)))
        for values in itertools.product(*FURTHER.values())
    ]
