"""A trace as its matrices: what was seen of each, and how far a recipe's steps are from it.

A direction depends on gradients alone, and the recorded weights are known at every step. So a step is
predicted from the recorded weight before it, not from a predicted one: an error of one step stays there,
and the prediction is linear in weight decay and in a factor on the learning rate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from normuon_core import Recipe
from parity_tests import oracle
from parity_tests.traces import Weight


@dataclass(frozen=True)
class Observed:
    """One (outputs, inputs) matrix.

    Attributes:
      params: (T + 1, r, c). grads: (T, r, c). lr, mu: (T,).
      lr_mul, wd_mul: the matrix's own multipliers.
    """

    name: str
    params: np.ndarray
    grads: np.ndarray
    lr: np.ndarray
    mu: np.ndarray
    lr_mul: float
    wd_mul: float
    _kept: dict[tuple, np.ndarray] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def updates(self) -> np.ndarray:
        """Weight before minus weight after, (T, r, c)."""
        return self.params[:-1] - self.params[1:]

    @cached_property
    def transposed(self) -> "Observed":
        """The same matrix, read as (in, out) if it was read as (out, in)."""
        return replace(self, params=self.params.swapaxes(-1, -2), grads=self.grads.swapaxes(-1, -2))

    def until(self, steps: int) -> "Observed":
        """Its first steps alone."""
        return replace(
            self,
            params=self.params[: steps + 1],
            grads=self.grads[:steps],
            lr=self.lr[:steps],
            mu=self.mu[:steps],
        )

    def predict(self, recipe: Recipe, weight_decay: float) -> np.ndarray:
        """The updates of the recipe, each from the recorded weight before it, (T, r, c)."""
        if weight_decay:
            return self._applied(recipe, weight_decay)
        stages = (_before_decay(recipe), recipe.shape_scale, recipe.hyperball)
        return self._once(stages, lambda: self._applied(recipe, 0.0))

    def _applied(self, recipe: Recipe, weight_decay: float) -> np.ndarray:
        state, result = oracle.State(), np.empty_like(self.grads)
        for t, direction in enumerate(self.directions(recipe)):
            result[t] = self.params[t] - oracle.applied(
                recipe,
                self.params[t],
                direction,
                state,
                lr=self.lr[t],
                weight_decay=weight_decay,
                lr_mul=self.lr_mul,
                wd_mul=self.wd_mul,
            )
        return result

    def directions(self, recipe: Recipe) -> np.ndarray:
        """What the stages before the decay make of the gradients, (T, r, c)."""

        def polar_factors():
            state = oracle.State()
            steps = zip(self.grads, self.mu, strict=True)
            return np.stack([oracle.orthogonalized(recipe, g, state, mu=mu) for g, mu in steps])

        def normalized():
            state = oracle.State()
            factors = self._once(_first_stages(recipe), polar_factors)
            return np.stack([oracle.normalized(recipe, factor, state) for factor in factors])

        return self._once(_before_decay(recipe), normalized)

    def _once(self, stages: tuple, result: Callable[[], np.ndarray]) -> np.ndarray:
        """The result, kept: thousands of candidates have their first stages in common."""
        if stages not in self._kept:
            if len(self._kept) * self.grads.size > _MOST:
                self._kept.clear()
            self._kept[stages] = result()
        return self._kept[stages]


_MOST = 2**23
"""How many numbers a matrix keeps of its candidates."""


def _first_stages(recipe: Recipe) -> tuple:
    return recipe.momentum, recipe.row_equilibration, recipe.polar


def _before_decay(recipe: Recipe) -> tuple:
    return *_first_stages(recipe), recipe.norm_setting, recipe.neuron_norm


def matrices_of(weight: Weight, lr: np.ndarray, mu: np.ndarray) -> list[Observed]:
    """Every matrix that the weight's layout finds in it."""
    as_matrices, _ = oracle.as_matrices_and_back(weight.params.shape[1:], weight.layout)
    params = np.stack([as_matrices(p) for p in weight.params])
    grads = np.stack([as_matrices(g) for g in weight.grads])
    batch = params.shape[1:-2]
    lr_mul, wd_mul = np.broadcast_to(weight.lr_mul, batch), np.broadcast_to(weight.wd_mul, batch)
    splits = weight.layout.output_splits or 1
    if isinstance(splits, int):
        splits = (params.shape[-2] // splits,) * splits
    ends = np.cumsum((0, *splits))
    return [
        Observed(
            name=weight.name,
            params=params[(slice(None), *index, slice(first, last))],
            grads=grads[(slice(None), *index, slice(first, last))],
            lr=lr,
            mu=mu,
            lr_mul=float(lr_mul[index]),
            wd_mul=float(wd_mul[index]),
        )
        for index in np.ndindex(batch)
        for first, last in pairwise(ends)
    ]


@dataclass(frozen=True)
class Fit:
    """How near a recipe comes to what was seen, at its best.

    Attributes:
      difference: the largest |predicted - seen| over the largest |seen| of the same step and matrix.
      weight_decay, rate_factor: what it takes; `rate_factor` multiplies every learning rate.
    """

    recipe: Recipe
    difference: float
    weight_decay: float
    rate_factor: float = 1.0


def fit(recipe: Recipe, matrices: Sequence[Observed], *, free_rate: bool = False) -> Fit:
    """The recipe with the weight decay, and if `free_rate` the rate factor, of least squares."""
    seen, bare, decayed = [], [], []
    for matrix in matrices:
        updates = matrix.updates
        sizes = np.abs(updates).max(axis=(1, 2), keepdims=True)
        sizes[sizes == 0] = np.inf
        without = matrix.predict(recipe, 0.0)
        seen.append((updates / sizes).ravel())
        bare.append((without / sizes).ravel())
        decayed.append(((matrix.predict(recipe, 1.0) - without) / sizes).ravel())
    y, v, x = (np.concatenate(parts) for parts in (seen, bare, decayed))
    if not (np.isfinite(v).all() and np.isfinite(x).all()):
        return Fit(recipe, np.inf, 0.0)
    factor = 1.0
    if free_rate:
        factor, decay = _two_columns(y, v, x)
    else:
        decay = _one_column(y - v, x)
    rounded, best = _rounded(decay), float(np.abs(y - factor * v - decay * x).max())
    # Nobody sets a decay of more digits than these; the rest is the trace's rounding.
    with_rounded = float(np.abs(y - factor * v - rounded * x).max())
    if with_rounded <= max(1.5 * best, ROUNDING):
        decay, best = rounded, with_rounded
    return Fit(
        recipe, best, decay / factor if recipe.decay.inside_scale and factor else decay, factor
    )


ROUNDING = 2e-11
"""Differences below are float64's rounding. Source: parity_tests/golden/README.md finds 1.4e-12."""


def direction_gap(recipe: Recipe, matrix: Observed, *, free: bool = True) -> float:
    """The mean of `direction_gaps` over a matrix's steps."""
    predicted = matrix.predict(recipe, 0.0)
    if not np.isfinite(predicted).all():
        return np.inf
    gaps = direction_gaps(predicted, matrix, cautious=recipe.decay.cautious, free=free)
    return float(gaps.sum() / len(gaps))


def direction_gaps(
    predicted: np.ndarray, matrix: Observed, *, cautious: bool, free: bool = True
) -> np.ndarray:
    """|predicted - seen| / |seen|, Frobenius norms, where every step may choose its own scale and decay.

    Neither the shape scale nor place and power of the decay matter then, nor a norm that is set. With
    `free=False` every step chooses its decay alone.

    Args:
      predicted: (T, r, c), the updates without decay. Where `matrix` has one step, (N, r, c), those of
        N candidates.

    Returns:
      (T,) or (N,).
    """
    params = np.broadcast_to(matrix.params[:-1], predicted.shape)
    seen = np.broadcast_to(matrix.updates, predicted.shape)
    x = params * (predicted * params >= 0) if cautious else params
    columns = np.stack([predicted, x, seen])
    (vv, vx, vy), (_, xx, xy), (_, _, yy) = np.einsum("atij,btij->abt", columns, columns)
    if free:
        determinant = vv * xx - vx**2
        determinant[determinant == 0] = np.inf
        a, b = (vy * xx - xy * vx) / determinant, (xy * vv - vy * vx) / determinant
        rest = seen - a[:, None, None] * predicted - b[:, None, None] * x
    else:
        xx[xx == 0] = np.inf
        rest = seen - predicted - ((xy - vx) / xx)[:, None, None] * x
    yy[yy == 0] = np.inf
    return np.sqrt(np.einsum("tij,tij->t", rest, rest) / yy)


def _one_column(y, x) -> float:
    size = x @ x
    return float(x @ y / size) if size > 0 else 0.0


def _two_columns(y, v, x) -> tuple[float, float]:
    (a, b), *_ = np.linalg.lstsq(np.stack([v, x], axis=1), y, rcond=None)
    return float(a), float(b)


def _rounded(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else float(f"{value:.4g}")
