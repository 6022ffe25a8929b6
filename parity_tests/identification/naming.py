"""The published recipe that is nearest to one that was found, and the stages in which they differ.

What was found may differ from a recipe in ways that the trace does not show: an eps below rounding, the
decay's power where the rate is constant. So every stage of the recipe is put in the place of the found
one, and stays there if the trace is reproduced as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from normuon_core import POLYNOMIALS, RECIPES, Polar, Recipe
from normuon_core.polynomials import with_steps
from parity_tests.identification import published
from parity_tests.identification.observed import ROUNDING, Fit, Observed, direction_gap, fit


@dataclass(frozen=True)
class Part:
    """What may change alone: a name, how to take it over from another recipe, and what a change costs.

    What the published optimizers offer as keywords costs 2, another formula 4; an eps, which few of
    them offer and nobody moves, 3; a second moment or a hyperball, after which an optimizer is named, 6.
    """

    name: str
    cost: int
    of: Callable[[Recipe], Any]
    put: Callable[[Recipe, Any], Recipe]


def _part(name: str, cost: int, stage: str, *names: str) -> Part:
    def of(recipe: Recipe):
        record = getattr(recipe, stage)
        return None if record is None else tuple(getattr(record, field) for field in names)

    def put(recipe: Recipe, values):
        record = getattr(recipe, stage)
        if record is None or values is None:
            return recipe
        changed = replace(record, **dict(zip(names, values, strict=True)))
        return replace(recipe, **{stage: changed})

    return Part(name, cost, of, put)


def _whole(name: str, cost: int, stage: str) -> Part:
    return Part(
        name, cost, lambda r: getattr(r, stage), lambda r, value: replace(r, **{stage: value})
    )


_OPTIONS = tuple(field.name for field in fields(Polar) if field.name not in ("eps", "eps_rule"))

PARTS: tuple[Part, ...] = (
    _part("momentum rule", 4, "momentum", "rule"),
    _part("Nesterov", 2, "momentum", "nesterov"),
    *(
        _whole(stage.replace("_", " "), 6 if stage == "hyperball" else 4, stage)
        for stage in published.FURTHER
    ),
    _part("polynomial", 4, "polar", *_OPTIONS),
    _part("eps", 3, "polar", "eps", "eps_rule"),
    _part("statistic's axis", 4, "neuron_norm", "axis"),
    _part("beta2", 2, "neuron_norm", "beta2"),
    _part("second moment's eps", 4, "neuron_norm", "eps", "eps_rule", "rescale"),
    _part("cautious decay", 2, "decay", "cautious"),
    _part("decay's place", 4, "decay", "inside_scale"),
    _part("decay's power", 4, "decay", "rate_power"),
    _whole("scale", 2, "shape_scale"),
)
"""In the order of a step."""


@dataclass(frozen=True)
class Change:
    """A stage in which the found recipe differs from the published one."""

    stage: str
    published: Any
    found: Any
    cost: int

    def __str__(self) -> str:
        return f"{self.stage}: {shown(self.published)} -> {shown(self.found)}"


def shown(value: Any) -> str:
    """A part's values as text, polynomials by their names."""
    if not isinstance(value, tuple):
        return repr(value)
    known = published.polynomials()
    return ", ".join(known.get(v) or repr(v) if isinstance(v, tuple) else repr(v) for v in value)


@dataclass(frozen=True)
class Nearest:
    """A published recipe's name, what the found one changes of it, and how well that fits."""

    name: str
    changes: tuple[Change, ...]
    fit: Fit

    @property
    def cost(self) -> int:
        return sum(change.cost for change in self.changes)


def changes_of(recipe: Recipe, name: str) -> tuple[Change, ...]:
    """The parts in which a recipe's records differ from a published one's."""
    known, result = RECIPES[name], []
    if (recipe.neuron_norm is None) != (known.neuron_norm is None):
        result.append(Change("second moment", known.neuron_norm, recipe.neuron_norm, 6))
    for part in PARTS:
        was, now = part.of(known), part.of(recipe)
        alone = part.name in _OF_SECOND_MOMENT and None in (was, now)
        if was != now and not alone:
            result.append(_change(part, was, now))
    return tuple(result)


_OF_SECOND_MOMENT = ("statistic's axis", "beta2", "second moment's eps")


def _change(part: Part, was: Any, now: Any) -> Change:
    if part.name == "polynomial" and was[1:] == now[1:]:
        coefficients, steps = was[0], len(now[0])
        try:
            if with_steps(coefficients, steps) == now[0]:
                return Change("steps", len(coefficients), steps, 2)
        except ValueError:  # A table that is not that long.
            pass
    if part.name == "hyperball" and None not in (was, now):
        return Change("radius", was.radius, now.radius, 2)
    return Change(part.name, was, now, part.cost)


def nearest(found: Fit, matrices: Sequence[Observed]) -> list[Nearest]:
    """All published recipes, each with what has to change in it, the nearest first."""
    bound = max(1.5 * found.difference, ROUNDING)
    free = found.rate_factor != 1.0

    @cache
    def fits(recipe: Recipe) -> Fit | None:
        # One matrix, whose steps may each choose scale and decay, is enough to rule most of them out.
        if direction_gap(recipe, matrices[0]) > 10 * matrices[0].params[0].size ** 0.5 * bound:
            return None
        tried = fit(recipe, matrices, free_rate=free)
        return tried if tried.difference <= bound else None

    result = []
    for name, known in RECIPES.items():
        best, recipe = found, replace(found.recipe, source="")
        # A whole stage before its parts: two of them may make up for each other.
        for stage in ("decay", "neuron_norm", "polar", "momentum"):
            if (getattr(recipe, stage) is None) == (getattr(known, stage) is None):
                recipe, best = _kept(
                    recipe, replace(recipe, **{stage: getattr(known, stage)}), best, fits
                )
        # Twice, for a later part may make an earlier one idle.
        for part in (*PARTS, *PARTS):
            recipe, best = _kept(recipe, part.put(recipe, part.of(known)), best, fits)
            if part.name == "polynomial" and part.of(recipe) != part.of(known):
                recipe, best = _with_length(part, recipe, known, best, fits)
        recipe = replace(recipe, source=known.source)
        result.append(Nearest(name, changes_of(recipe, name), replace(best, recipe=recipe)))
    return sorted(result, key=lambda near: (near.cost, digits(near.fit.weight_decay)))


def _with_length(part: Part, recipe: Recipe, known: Recipe, best: Fit, fits) -> tuple[Recipe, Fit]:
    """With the known recipe's polynomial at the shortest length that does, or with a published set.

    Converged iterations of two lengths may differ by little more than rounding: the nearer one counts.
    """
    coefficients, *others = part.of(known)
    for sets in (published.lengths(coefficients), POLYNOMIALS.values()):
        changed = [part.put(recipe, (value, *others)) for value in sets]
        found = [(one, tried) for one in changed if (tried := fits(one)) is not None]
        lowest = min((tried.difference for _, tried in found), default=0.0)
        for one, tried in found:
            if tried.difference <= 3 * lowest:
                return one, tried
    return recipe, best


def _kept(recipe: Recipe, changed: Recipe, best: Fit, fits) -> tuple[Recipe, Fit]:
    if changed == recipe:
        return recipe, best
    tried = fits(changed)
    return (changed, tried) if tried is not None else (recipe, best)


def digits(value: float) -> int:
    """How many digits a number has that somebody chose."""
    return len(f"{value:.6g}".replace(".", "").replace("-", "").strip("0"))


_KEYWORDS: dict[str, Callable[[Recipe], dict[str, Any]]] = {
    "Nesterov": lambda recipe: {"nesterov": recipe.momentum.nesterov},
    "beta2": lambda recipe: {"beta2": recipe.neuron_norm and recipe.neuron_norm.beta2},
    "scale": lambda recipe: {"shape_scale": recipe.shape_scale},
    "steps": lambda recipe: {"steps": len(recipe.polar.coefficients)},
}


def keywords(near: Nearest) -> dict[str, Any]:
    """What `normuon(rate, recipe=name, ...)` and `torch_ref.NorMuon` take to make the found recipe.

    Changes that have no keyword are in the recipe itself: then `recipe` is a record, not a name.
    """
    recipe, changed = near.fit.recipe, RECIPES[near.name]
    result: dict[str, Any] = {}
    for change in near.changes:
        result |= _KEYWORDS.get(change.stage, lambda recipe: {})(recipe)
    of_eps = any(change.stage == "eps" for change in near.changes)
    if of_eps and recipe.polar.eps_rule == changed.polar.eps_rule:
        result["eps"] = recipe.polar.eps
    expressed = changed.override(**result)
    different = {
        field.name: getattr(recipe, field.name)
        for field in fields(Recipe)
        if field.name != "source" and getattr(recipe, field.name) != getattr(expressed, field.name)
    }
    value: Any = Record(near.name, different) if different else near.name
    result = {"recipe": value, **result, "weight_decay": near.fit.weight_decay}
    if near.fit.rate_factor != 1.0:
        result["lr_mul"] = near.fit.rate_factor
    return result


@dataclass(frozen=True)
class Record:
    """A published recipe with some of its records replaced, as one writes it."""

    name: str
    records: dict[str, Any]

    def __repr__(self) -> str:
        inner = ", ".join(f"{field}={_written(value)}" for field, value in self.records.items())
        return f"replace(RECIPES[{self.name!r}], {inner})"


def _written(value: Any) -> str:
    text = repr(value)
    for coefficients, name in published.polynomials().items():
        if name in POLYNOMIALS:
            text = text.replace(f"coefficients={coefficients!r}", f"coefficients={name!r}")
    return text
