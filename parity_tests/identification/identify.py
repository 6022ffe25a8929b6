"""Which published recipe made a trace: the search, then the name, then a replay of the whole trace."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from normuon_core import RECIPES, Recipe
from parity_tests.compare import infinity_distance
from parity_tests.dialects import Settings
from parity_tests.identification.naming import Change, Nearest, digits, keywords, nearest
from parity_tests.identification.observed import ROUNDING, Observed, matrices_of
from parity_tests.identification.search import Found, search
from parity_tests.oracle_driver import run_oracle
from parity_tests.traces import Weight, read_as, read_file

_PLAIN = "torch_muon"
"""A dialect in which a weight's shape says all, (out, in)."""
_READ_BY_DIALECT = ("attn", "attn_gate", "mlp_bank")
"""Labels that mean something else in every dialect."""


@dataclass(frozen=True)
class Identification:
    """What a trace is.

    Attributes:
      name: the published recipe. also: others as near, with changes of their own if it has any.
      recipe: the records that reproduce it. keywords: the call that makes them.
      changes: the stages in which it differs from the published recipe, in the order of a step.
      in_out: whether the weights lie (in, out).
      difference: the largest |replayed - recorded| of an update over its largest entry, whole trace.
      exact: whether that is rounding.
      gap: the difference without the changes.
    """

    name: str
    also: tuple[str, ...]
    recipe: Recipe
    keywords: dict[str, Any]
    changes: tuple[Change, ...]
    in_out: bool
    difference: float
    exact: bool
    gap: float

    def __str__(self) -> str:
        call = ", ".join(f"{name}={value!r}" for name, value in self.keywords.items())
        lines = [self.name, f"  keywords    {call}"]
        lines += [f"  changed     {change}" for change in self.changes]
        if self.changes:
            lines.append(f"  without     the changes the difference is {self.gap:.2g}")
        lines.append(f"  weights     {'(in, out)' if self.in_out else '(out, in)'}")
        kind = "rounding" if self.exact else "more than rounding"
        lines.append(f"  difference  {self.difference:.2g} of the update, {kind}")
        if self.also:
            lines.append(f"  as near     {', '.join(self.also)}")
        return "\n".join(lines)


def identify(path: Path) -> Identification:
    """The published recipe nearest to a trace, with keywords and changes that reproduce it.

    The trace needs neither `dialect` nor `hyperparameters`, and both are left unread.

    Raises:
      ValueError: no weight of it can be read as matrices.
    """
    arrays, meta = read_file(path)
    matrices = _matrices(arrays, meta)
    read = [
        _Reading(near, found.in_out)
        for found in search(matrices)
        for near in _named(found, matrices)
    ]
    replays = [(reading, _replay(reading, arrays, meta)) for reading in read]
    lowest = min(replay.difference for _, replay in replays)
    if lowest == np.inf:
        raise ValueError(f"{Path(path).name}: no recipe can read its weights.")
    bound = max(1.5 * lowest, ROUNDING)
    good = [
        (reading, replay)
        for reading, replay in replays
        if replay.difference <= bound or (replay.exact and lowest <= _DIONS)
    ]
    (reading, replay), *others = sorted(good, key=lambda pair: pair[0].order)
    near = reading.near
    same = [r for r, _ in others if (r.near.cost, r.in_out) == (near.cost, reading.in_out)]
    plain = replace(near, changes=(), fit=replace(near.fit, recipe=RECIPES[near.name]))
    unchanged = _replay(replace(reading, near=plain), arrays, meta)
    return Identification(
        name=near.name,
        also=tuple(r.near.name for r in same),
        recipe=near.fit.recipe,
        keywords=keywords(near),
        changes=near.changes,
        in_out=reading.in_out,
        difference=replay.difference,
        exact=replay.exact,
        gap=unchanged.difference,
    )


@dataclass(frozen=True)
class _Reading:
    near: Nearest
    in_out: bool

    @property
    def order(self):
        """The fewest changes first; where both ways of lying fit, the recipe's own."""
        own = self.in_out == (self.near.name == "optax_muon")
        return self.near.cost, not own, digits(self.near.fit.weight_decay)


def _named(found: Found, matrices: list[Observed]) -> list[Nearest]:
    return nearest(found.fit, [m.transposed if found.in_out else m for m in matrices])


def _matrices(arrays, meta) -> list[Observed]:
    """The matrices of the weights that mean the same in every dialect; of all where there is none."""

    def plain(spec) -> bool:
        fused = "split_sizes" in spec or spec["shape"][0] == 3 * spec["shape"][-1]
        return spec.get("label") not in _READ_BY_DIALECT and not fused

    specs = {name: spec for name, spec in meta["weights"].items() if plain(spec)}
    if not specs:
        unlabelled = {"shape", "reshape", "num_heads", "lr_mul", "wd_mul"}
        specs = {
            name: {key: value for key, value in spec.items() if key in unlabelled}
            for name, spec in meta["weights"].items()
        }
    settings = Settings(RECIPES["normuon"])
    trace = read_as(_PLAIN, settings, arrays, {**meta, "weights": specs}, name="")
    return [m for weight in trace.weights for m in matrices_of(weight, trace.lr, trace.mu)]


@dataclass(frozen=True)
class _Replay:
    """`exact`: whether every weight is within rounding, or within what its layout allows."""

    difference: float
    exact: bool


_EXACT = 1e-9
_DIONS = 1e-6
"""What dion's split weights, whose second moment it keeps elsewhere, are held to."""


def _replay(reading: _Reading, arrays, meta) -> _Replay:
    """The whole trace by the named recipe, every weight as that dialect reads it."""
    found = reading.near.fit
    settings = Settings(found.recipe, found.weight_decay, found.rate_factor)
    try:
        trace = read_as(reading.near.name, settings, arrays, meta, name="")
    except ValueError:
        return _Replay(np.inf, False)
    weights = tuple(replace(w, layout=_laid(w, reading.in_out)) for w in trace.weights)
    with np.errstate(all="ignore"):
        trajectories = run_oracle(replace(trace, weights=weights))
    differences = {w.name: _difference(trajectories[w.name].params, w.params) for w in weights}
    exact = all(differences[w.name] <= max(_EXACT, w.bound) for w in weights)
    return _Replay(max(differences.values()), exact)


def _difference(replayed: np.ndarray, recorded: np.ndarray) -> float:
    pairs = zip(np.diff(replayed, axis=0), np.diff(recorded, axis=0), strict=True)
    return max((infinity_distance(mine, seen) for mine, seen in pairs if seen.any()), default=0.0)


def _laid(weight: Weight, in_out: bool):
    output, reduction = (-1, -2) if in_out else (-2, -1)
    return replace(weight.layout, output_axis=output, reduction_axis=reduction)
