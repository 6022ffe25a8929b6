"""The recipe that made a trace, found stage by stage.

A stage is searched while the later ones are left free, so the number of trials is a sum over stages and
not their product:

1. Polynomial, its steps, its norm scale, what stands before it, and on which side a statistic is taken:
   from the first step of one matrix, where the momentum is the gradient whatever its rule, and beta2
   cancels. Shape scale and decay are free numbers.
2. Momentum rule, Nesterov and beta2: from all steps of that matrix.
3. The numbers eps and beta2: published values, then the best one between them.
4. Which way the weights lie, and the statistic's rule for the side: from all matrices.
5. A norm that is set or given back, shape scale; then place and power of the decay, and its size.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from normuon_core import RECIPES, Polar, Recipe
from parity_tests.identification import published
from parity_tests.identification.observed import (
    ROUNDING,
    Fit,
    Observed,
    direction_gap,
    direction_gaps,
    fit,
)

KEPT = 10
"""How many candidates of a stage the next one sees."""


@dataclass(frozen=True)
class Found:
    """A fit, and the way the weights lie for it."""

    fit: Fit
    in_out: bool


def search(matrices: Sequence[Observed]) -> list[Found]:
    """The best recipe for matrices that are read as (out, in).

    Both ways of lying where both fit: a recipe whose stages have no side tells them not apart, and one
    whose scale has none may have its statistic on either.
    """
    first = _representative(matrices)
    candidates = _near(_direction_of_first_step(first))
    candidates = _near(_momentum_and_beta2(first, candidates))
    candidates = _numbers(first, candidates)
    few = _few(matrices)
    sides = _sides(few, candidates)
    return _scale_and_decay(few, sides)


@dataclass(frozen=True)
class _Candidate:
    recipe: Recipe
    in_out: bool
    gap: float


def _on(matrix: Observed, in_out: bool) -> Observed:
    return matrix.transposed if in_out else matrix


def _best(candidates: Iterable[_Candidate], kept: int) -> list[_Candidate]:
    return sorted(candidates, key=lambda candidate: candidate.gap)[:kept]


def _near(candidates: list[_Candidate]) -> list[_Candidate]:
    """Those that the best one does not rule out: what eps and beta2 leave of a gap is below 1e-3."""
    return [c for c in candidates if c.gap <= 20 * max(candidates[0].gap, 1e-4)]


def _representative(matrices: Sequence[Observed]) -> Observed:
    """A small matrix that is not square, so that its longer side is known, and whose gradient moves."""

    def unfit(matrix: Observed):
        r, c = matrix.params.shape[1:]
        few = min(r, c) < 4
        return (not matrix.grads[0].any(), few, r == c, r * c)

    return min(matrices, key=unfit)


def _few(matrices: Sequence[Observed]) -> list[Observed]:
    """The smallest tall, wide and square matrices, which is where the rules differ."""
    kinds: dict[int, list[Observed]] = {}
    for matrix in sorted(matrices, key=lambda matrix: matrix.params[0].size):
        r, c = matrix.params.shape[1:]
        if matrix.grads.any():
            kinds.setdefault((r > c) - (r < c), []).append(matrix)
    return [matrix for kind in kinds.values() for matrix in kind[:2]] or list(matrices[:1])


_START = RECIPES["muon_keller"]


def _direction_of_first_step(matrix: Observed) -> list[_Candidate]:
    """The polar factor, further stages that turn the direction, and the side of the statistic."""
    matrix = matrix.until(1)
    norm = next(n for n in published.NEURON_NORMS if n is not None)
    bases = []
    for variant in _that_turn(published.further_stages(_START), matrix):
        for in_out in (False, True):
            # Where nothing has a side, the two ways of lying are one.
            if not in_out or variant != _START:
                bases.append((variant, in_out))
            bases.append(
                (replace(variant, neuron_norm=replace(norm, axis="output", eps=1e-30)), in_out)
            )

    def best(sets, scales) -> list[_Candidate]:
        polars = [
            polar
            for coefficients, scale in itertools.product(sets, scales)
            for polar in published.polar_variants(
                replace(_START.polar, coefficients=coefficients, norm_scale=scale, eps=1e-30)
            )
        ]
        tried = [(base, in_out, cautious) for base, in_out in bases for cautious in (False, True)]
        gaps = np.stack([_gaps(polars, matrix, *choice) for choice in tried], axis=1)
        found = []
        for index in np.argsort(gaps, axis=None, kind="stable")[: 12 * KEPT]:
            of_polar, of_choice = np.unravel_index(index, gaps.shape)
            base, in_out, cautious = tried[of_choice]
            decay = replace(base.decay, cautious=cautious)
            recipe = replace(base, polar=polars[of_polar], decay=decay)
            found.append(_Candidate(recipe, in_out, float(gaps[of_polar, of_choice])))
        return found

    found = _with_ties(best(published.polynomials(), published.NORM_SCALES))
    if found[0].gap > 1e-3:
        # A large eps acts like a larger norm scale, of no published value.
        few = list(published.polynomials())[: len(published.POLYNOMIALS)]
        found = _best([*found, *best(few, np.geomspace(1.0, 8.0, 25)[1:])], 3 * KEPT)
    return found


def _gaps(
    polars: Sequence[Polar], matrix: Observed, base: Recipe, in_out: bool, cautious: bool
) -> np.ndarray:
    """The first step's gap with each polar factor. Its size is free, so the direction is enough."""
    laid = _on(matrix, in_out)
    predicted = np.concatenate([laid.directions(replace(base, polar=polar)) for polar in polars])
    gaps = direction_gaps(predicted, laid, cautious=cautious)
    return np.where(np.isfinite(gaps), gaps, np.inf)


def _with_ties(ordered: Sequence[_Candidate]) -> list[_Candidate]:
    """The best, and all that reproduce the first step: converged iterations of many lengths may."""
    return [c for i, c in enumerate(ordered) if i < 3 * KEPT or c.gap <= ROUNDING]


def _that_turn(recipes: Sequence[Recipe], matrix: Observed) -> list[Recipe]:
    """Those of the recipes whose first step has a direction of its own, the simplest of each."""
    kept: list[Recipe] = []
    for recipe in recipes:
        own = matrix.predict(recipe, 0.0)
        pretended = replace(matrix, params=np.stack([matrix.params[0], matrix.params[0] - own[0]]))
        if all(direction_gap(other, pretended) > 1e-6 for other in kept):
            kept.append(recipe)
    return kept


def _tried(recipe: Recipe, matrix: Observed, in_out: bool, **options) -> _Candidate:
    return _Candidate(recipe, in_out, direction_gap(recipe, _on(matrix, in_out), **options))


def _momentum_and_beta2(matrix: Observed, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    tried = []
    for candidate in candidates:
        for momentum in published.MOMENTA:
            for beta2 in published.BETA2S if candidate.recipe.neuron_norm else (None,):
                recipe = replace(candidate.recipe, momentum=momentum).override(beta2=beta2)
                tried.append(_tried(recipe, matrix, candidate.in_out))
    return _best(tried, KEPT)


def _numbers(matrix: Observed, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The candidates with their best beta2 and eps.

    Published values first, all together, for each leaves a gap that hides the others' errors; numbers
    between them only where those leave a gap.
    """
    result = [_published_numbers(matrix, candidate) for candidate in candidates]
    lowest = min(candidate.gap for candidate in result)
    if lowest <= _CLOSED:
        return _best(result, KEPT)
    between = []
    for candidate in _best(result, 2):
        for _ in range(2):
            candidate = _best_eps(matrix, _best_beta2(matrix, candidate))
        between.append(_published_numbers(matrix, _best_beta2(matrix, candidate)))
    return _best([*result, *between], KEPT)


_CLOSED = 1e-10
"""A gap that no number of a stage has a part in: the smallest eps that is seen moves more."""


def _published_numbers(matrix: Observed, candidate: _Candidate) -> _Candidate:
    recipe = candidate.recipe
    norms = [None]
    if recipe.neuron_norm is not None:
        beta2 = _beta2(_best_beta2(matrix, candidate))
        values = dict.fromkeys(round(beta2, digits) for digits in (2, 3, 4))
        floors = dict.fromkeys((n.eps, n.eps_rule) for n in published.NEURON_NORMS if n is not None)
        norms = [
            replace(recipe.neuron_norm, beta2=value, eps=eps, eps_rule=rule)
            for value in values
            if value < 1
            for eps, rule in floors
        ]
    own, tried = recipe.polar, [candidate]
    epses = [*published.EPSES, *((float(f"{own.eps:.{n}e}"), own.eps_rule) for n in (0, 1, 2, 9))]
    for norm in norms:
        for eps, rule in dict.fromkeys(epses):
            polar = replace(recipe.polar, eps=eps, eps_rule=rule)
            changed = replace(recipe, neuron_norm=norm, polar=polar)
            tried.append(_tried(changed, matrix, candidate.in_out))
    return min(tried, key=lambda c: max(c.gap, ROUNDING))


def _beta2(candidate: _Candidate) -> float:
    """Of a candidate that has a second moment."""
    norm = candidate.recipe.neuron_norm
    assert norm is not None
    return norm.beta2


def _best_beta2(matrix: Observed, candidate: _Candidate) -> _Candidate:
    norm = candidate.recipe.neuron_norm
    if norm is None:
        return candidate

    def at(beta2: float) -> _Candidate:
        return _tried(candidate.recipe.override(beta2=float(beta2)), matrix, candidate.in_out)

    best = min((at(beta2) for beta2 in published.BETA2S), key=lambda c: c.gap)
    best = min(best, candidate, key=lambda c: c.gap)
    if best.gap <= ROUNDING:
        return best
    # Its distance from 1 is what people choose, on a logarithmic scale.
    centre = np.log(1 - _beta2(best))
    value = _lowest(lambda x: at(1 - np.exp(min(x, 0.0))).gap, centre - 1.0, min(centre + 1.0, 0.0))
    found = at(1 - np.exp(min(value, 0.0)))
    beta2 = _beta2(found)
    rounded = [at(round(beta2, digits)) for digits in (2, 3, 4) if round(beta2, digits) < 1]
    # Rounded values come first: a decimal that fits as well is the one that was set.
    return min([*rounded, found, best], key=lambda c: max(c.gap, ROUNDING))


def _best_eps(matrix: Observed, candidate: _Candidate) -> _Candidate:
    def at(eps: float, rule: str) -> _Candidate:
        polar = replace(candidate.recipe.polar, eps=float(eps), eps_rule=rule)
        return _tried(replace(candidate.recipe, polar=polar), matrix, candidate.in_out)

    best = min((at(*eps) for eps in published.EPSES), key=lambda c: c.gap)
    # A published value that is only nearer to the true one than the others leaves much of the gap.
    if best.gap <= 1e-8:
        return best
    tried = [best, candidate]
    for rule in ("add", "max"):
        size = np.log(np.linalg.norm(matrix.grads[0]))
        grid = np.linspace(size - 24, size + 5, 30)
        centre = min(grid, key=lambda x: at(np.exp(x), rule).gap)
        value = _lowest(lambda x, rule=rule: at(np.exp(x), rule).gap, centre - 1.0, centre + 1.0)
        exact = float(np.exp(value))
        tried += [at(float(f"{exact:.{digits}e}"), rule) for digits in (0, 1, 2)] + [
            at(exact, rule)
        ]
    return min(tried, key=lambda c: max(c.gap, ROUNDING))


def _lowest(function: Callable[[float], float], lower: float, upper: float) -> float:
    """Where a function with one valley is lowest, by golden section."""
    ratio = (5**0.5 - 1) / 2
    left, right = upper - ratio * (upper - lower), lower + ratio * (upper - lower)
    at_left, at_right = function(left), function(right)
    for _ in range(30):
        if at_left <= at_right:
            upper, right, at_right = right, left, at_left
            left = upper - ratio * (upper - lower)
            at_left = function(left)
        else:
            lower, left, at_left = left, right, at_right
            right = lower + ratio * (upper - lower)
            at_right = function(right)
    return (lower + upper) / 2


def _sides(matrices: Sequence[Observed], candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Both ways of lying, and every rule for the statistic's side; the direction alone counts."""
    tried = []
    for candidate in candidates:
        norm = candidate.recipe.neuron_norm
        axes = published.AXES if norm is not None else (None,)
        for in_out in (False, True):
            for axis in axes:
                recipe = candidate.recipe
                if norm is not None:
                    recipe = replace(recipe, neuron_norm=replace(norm, axis=axis))
                gap = max(direction_gap(recipe, _on(m, in_out)) for m in matrices)
                tried.append(_Candidate(recipe, in_out, gap))
    lowest = min(candidate.gap for candidate in tried)
    return [c for c in _best(tried, 4 * KEPT) if c.gap <= max(2 * lowest, 1e-8)][: 2 * KEPT]


def _scale_and_decay(matrices: Sequence[Observed], candidates: Sequence[_Candidate]) -> list[Found]:
    scaled = []
    for candidate in candidates:
        for recipe in _scalings(candidate.recipe):
            laid = [_on(matrix, candidate.in_out) for matrix in matrices]
            gap = max(direction_gap(recipe, matrix, free=False) for matrix in laid)
            scaled.append(_Candidate(recipe, candidate.in_out, gap))
    best = _fitted(matrices, scaled, free_rate=False)
    if best[0].fit.difference <= 1e-6:
        return best
    # No shape rule alone explains the sizes: perhaps one with a factor does.
    other = _fitted(matrices, scaled, free_rate=True)
    return other if other[0].fit.difference < 0.7 * best[0].fit.difference else best


def _scalings(recipe: Recipe) -> Iterable[Recipe]:
    for further in published.further_stages(recipe):
        for norm in published.NEURON_NORMS if recipe.neuron_norm else (None,):
            if norm is not None and recipe.neuron_norm is not None:
                norm = replace(norm, beta2=recipe.neuron_norm.beta2, axis=recipe.neuron_norm.axis)
            for rule in published.SHAPE_RULES:
                yield replace(further, neuron_norm=norm, shape_scale=rule)


def _fitted(matrices, candidates: Sequence[_Candidate], *, free_rate: bool) -> list[Found]:
    """Place and power of the decay, from all steps with one weight decay."""
    lowest = min(c.gap for c in candidates)
    near = candidates
    if not free_rate:
        near = [c for c in _best(candidates, 60) if c.gap <= max(3 * lowest, 1e-8)]
    fits = []
    for recipe, in_out in dict.fromkeys((c.recipe, c.in_out) for c in near):
        laid = [_on(matrix, in_out) for matrix in matrices]
        for decay in published.DECAYS:
            if decay.cautious == recipe.decay.cautious:
                found = fit(replace(recipe, decay=decay), laid, free_rate=free_rate)
                fits.append(Found(found, in_out))
    fits.sort(key=lambda found: max(found.fit.difference, ROUNDING))
    bound = max(1.5 * fits[0].fit.difference, ROUNDING)
    other = [f for f in fits if f.in_out != fits[0].in_out and f.fit.difference <= bound]
    return [fits[0], *other[:1]]
