"""The recipe that made a trace, found stage by stage.

A stage is searched while the later ones are left free, so the number of trials is a sum over stages and
not their product:

1. The hyperball, which is seen: the norms stay.
2. Polynomial, its steps, its norm scale, its eps, what stands before it, and on which side a statistic
   is taken: from the first step of one matrix, where the momentum is the gradient whatever its rule, and
   beta2 cancels. Shape scale and decay are free numbers.
3. Momentum rule, Nesterov, beta2, and whether a norm is set before the second moment: from all steps of
   that matrix.
4. The numbers eps and beta2: published values, then the best one between them.
5. Which way the weights lie, and the statistic's rule for the side: from all matrices.
6. A norm that is set or given back, shape scale; then place and power of the decay, and its size.
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
    hyperball_of,
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
    start = replace(RECIPES["muon_keller"], hyperball=hyperball_of(matrices))
    candidates = _near(_direction_of_first_step(first, start), 1e-4)
    candidates = _eps_of_first_step(first.until(1), candidates)
    few = _few(matrices)
    candidates = _near(_first_steps([matrix.until(1) for matrix in few], candidates), 1e-8)
    polars = list(dict.fromkeys(candidate.recipe.polar for candidate in candidates))
    candidates = _near(_momentum_and_beta2(first, candidates), 1e-4)
    candidates = _with_polars(first, _numbers(first, candidates), polars)
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
    """Where the gaps are rounding, those without a second moment first, then in the order given."""

    def order(candidate: _Candidate):
        return max(candidate.gap, ROUNDING), candidate.recipe.neuron_norm is not None

    return sorted(candidates, key=order)[:kept]


def _near(candidates: list[_Candidate], left: float) -> list[_Candidate]:
    """Those that the best one does not rule out, where what is not yet decided leaves such a gap."""
    return [c for c in candidates if c.gap <= 20 * max(candidates[0].gap, left)]


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


def _direction_of_first_step(matrix: Observed, start: Recipe) -> list[_Candidate]:
    """The polar factor, further stages that turn the direction, and the side of the statistic.

    Its eps is left out.
    """
    matrix = matrix.until(1)
    norm = next(n for n in published.NEURON_NORMS if n is not None)
    bases = []
    for variant in _that_turn(published.further_stages(start), matrix):
        # Where nothing else has a side, the two ways of lying are one, or one for each axis.
        sided = variant != start
        for in_out in (False, True):
            if sided or not in_out:
                bases.append((variant, in_out))
            for axis in ("output", "input") if sided else ("output",):
                of_axis = replace(norm, axis=axis, eps=1e-30)
                bases.append((replace(variant, neuron_norm=of_axis), in_out))

    def best(sets, scales) -> list[_Candidate]:
        polars = [
            polar
            for coefficients, scale in itertools.product(sets, scales)
            for polar in published.polar_variants(
                replace(start.polar, coefficients=coefficients, norm_scale=scale, eps=1e-30)
            )
        ]
        tried = [(base, in_out, cautious) for base, in_out in bases for cautious in (False, True)]
        gaps = np.stack([_gaps(polars, matrix, *choice) for choice in tried], axis=1)
        found = []
        order = np.argsort(np.maximum(gaps, ROUNDING), axis=None, kind="stable")
        # All that reproduce the first step: converged iterations of many lengths may.
        tied = np.count_nonzero(gaps <= max(2 * gaps.min(), ROUNDING))
        for index in order[: max(3 * KEPT, min(tied, _TIED))]:
            of_polar, of_choice = np.unravel_index(index, gaps.shape)
            base, in_out, cautious = tried[of_choice]
            recipe = replace(_with_cautious(base, cautious), polar=polars[of_polar])
            found.append(_Candidate(recipe, in_out, float(gaps[of_polar, of_choice])))
        return found

    found = best(published.polynomials(), published.NORM_SCALES)
    if found[0].gap > 1e-3:
        # A large eps acts like a larger norm scale, of no published value.
        few = list(published.polynomials())[: len(published.POLYNOMIALS)]
        found = _best([*found, *best(few, np.geomspace(1.0, 8.0, 25)[1:])], 3 * KEPT)
    return found


def _with_cautious(recipe: Recipe, cautious: bool) -> Recipe:
    return replace(recipe, decay=replace(recipe.decay, cautious=cautious))


def _gaps(
    polars: Sequence[Polar], matrix: Observed, base: Recipe, in_out: bool, cautious: bool
) -> np.ndarray:
    """The first step's gap with each polar factor. Its size is free, so the direction is enough."""
    laid = _on(matrix, in_out)
    predicted = np.concatenate([laid.directions(replace(base, polar=polar)) for polar in polars])
    gaps = direction_gaps(predicted, laid, _with_cautious(base, cautious))
    return np.where(np.isfinite(gaps), gaps, np.inf)


_TIED = 40 * KEPT
"""How many ties are kept, where they are so many that nothing tells them apart."""


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


def _eps_of_first_step(matrix: Observed, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """The candidates with their best eps: as long as it is missing, its gap hides the others."""

    def published_eps(candidate: _Candidate) -> _Candidate:
        tried = [candidate]
        for eps, rule in published.EPSES:
            polar = replace(candidate.recipe.polar, eps=eps, eps_rule=rule)
            tried.append(_tried(replace(candidate.recipe, polar=polar), matrix, candidate.in_out))
        return _best(tried, 1)[0]

    found = _best([published_eps(candidate) for candidate in candidates], len(candidates))
    if found[0].gap > _SEEN_EPS:
        few = found[: 3 * KEPT]
        found = _best([*found, *(_best_eps(matrix, candidate) for candidate in few)], len(found))
    return found


_SEEN_EPS = 1e-8
"""A gap with a published eps that another one cannot be expected to remove."""


def _first_steps(matrices: Sequence[Observed], candidates: Sequence[_Candidate]):
    """The candidates with the largest gap of the matrices' first steps, whichever the statistic's side.

    What has converged on one matrix may not have on another.
    """
    found = []
    for candidate in candidates:
        norm, recipes = candidate.recipe.neuron_norm, [candidate.recipe]
        if norm is not None:
            norms = [replace(norm, axis=axis) for axis in ("output", "input")]
            recipes = [replace(candidate.recipe, neuron_norm=norm) for norm in norms]
        gaps = [
            min(direction_gap(recipe, _on(matrix, candidate.in_out)) for recipe in recipes)
            for matrix in matrices
        ]
        found.append(replace(candidate, gap=max(gaps)))
    return _best(found, len(found))


def _momentum_and_beta2(matrix: Observed, candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Also whether a norm is set before the second moment, which then averages other numbers.

    The first polar factor of a kind chooses for the others, which are as near.
    """
    kinds: dict[tuple[Recipe, bool], list[_Candidate]] = {}
    for candidate in candidates:
        kind = replace(candidate.recipe, polar=candidates[0].recipe.polar), candidate.in_out
        kinds.setdefault(kind, []).append(candidate)
    tried = []
    for first, *others in kinds.values():
        chosen = [_best_beta2(matrix, c) for c in _histories(matrix, first)]
        tried += chosen
        for other, history in itertools.product(others, chosen):
            recipe = replace(history.recipe, polar=other.recipe.polar)
            tried.append(_tried(recipe, matrix, other.in_out))
    return _best(tried, 3 * KEPT)


def _histories(matrix: Observed, candidate: _Candidate) -> list[_Candidate]:
    """The candidate with the momenta and settings of the norm that bring it nearest, each with the
    nearest published beta2."""
    norm = candidate.recipe.neuron_norm
    beta2s = published.BETA2S if norm is not None else (None,)
    settings = published.FURTHER["norm_setting"] if norm is not None else (None,)
    tried = []
    for momentum, setting in itertools.product(published.MOMENTA, settings):
        recipe = replace(candidate.recipe, momentum=momentum, norm_setting=setting)
        of_beta2 = [
            _tried(recipe.override(beta2=beta2), matrix, candidate.in_out) for beta2 in beta2s
        ]
        tried += _best(of_beta2, 1)
    return _best(tried, KEPT // 2)


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


def _with_polars(
    matrix: Observed, candidates: list[_Candidate], polars: Iterable[Polar]
) -> list[_Candidate]:
    """Also the candidates with every polar factor that is as near on this matrix: on another one it may
    be nearer."""
    lowest, polars = candidates[0].gap, list(polars)
    result = list(candidates)
    kinds = {(replace(c.recipe, polar=polars[0]), c.in_out): c for c in reversed(candidates)}
    for best in [best for best in kinds.values() if best.gap <= max(2 * lowest, ROUNDING)]:
        own = best.recipe.polar
        for polar in polars:
            polar = replace(polar, eps=own.eps, eps_rule=own.eps_rule)
            other = _tried(replace(best.recipe, polar=polar), matrix, best.in_out)
            if other.gap <= max(2 * best.gap, 1e-8):
                result.append(other)
    return result


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
    if best.gap <= _SEEN_EPS:
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
    kept: dict[tuple, _Candidate] = {}
    for candidate in _best(tried, len(tried)):
        # Polar factors that are alike to rounding are one; `naming` takes the published one of them.
        alike = candidate.gap <= ROUNDING and replace(
            candidate.recipe, polar=candidates[0].recipe.polar
        )
        kept.setdefault((alike or candidate.recipe, candidate.in_out), candidate)
    return [c for c in kept.values() if c.gap <= max(2 * lowest, 1e-8)][: 2 * KEPT]


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
    for setting in published.FURTHER["norm_setting"]:
        for norm in published.NEURON_NORMS if recipe.neuron_norm else (None,):
            if norm is not None and recipe.neuron_norm is not None:
                norm = replace(norm, beta2=recipe.neuron_norm.beta2, axis=recipe.neuron_norm.axis)
            for rule in published.SHAPE_RULES:
                yield replace(recipe, norm_setting=setting, neuron_norm=norm, shape_scale=rule)


def _without_idle_scale(recipe: Recipe) -> Recipe:
    """On the hyperball a scale of update and decay alike is divided out."""
    idle = recipe.hyperball is not None and recipe.decay.inside_scale
    return replace(recipe, shape_scale="none") if idle else recipe


def _fitted(matrices, candidates: Sequence[_Candidate], *, free_rate: bool) -> list[Found]:
    """Place and power of the decay, from all steps with one weight decay."""
    lowest = min(c.gap for c in candidates)
    near = candidates
    if not free_rate:
        near = [c for c in _best(candidates, 60) if c.gap <= max(3 * lowest, 1e-8)]
    fits = []
    decays = [(c, decay) for c in near for decay in published.DECAYS]
    tried = [
        (_without_idle_scale(replace(c.recipe, decay=decay)), c.in_out)
        for c, decay in decays
        if decay.cautious == c.recipe.decay.cautious
    ]
    for recipe, in_out in dict.fromkeys(tried):
        laid = [_on(matrix, in_out) for matrix in matrices]
        fits.append(Found(fit(recipe, laid, free_rate=free_rate), in_out))
    fits.sort(key=lambda found: max(found.fit.difference, ROUNDING))
    bound = max(1.5 * fits[0].fit.difference, ROUNDING)
    other = [f for f in fits if f.in_out != fits[0].in_out and f.fit.difference <= bound]
    return [fits[0], *other[:1]]
