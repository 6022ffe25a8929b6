"""Which published recipe made a trace: the search, then the name, then a replay of the whole trace."""


from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from normuon_core import RECIPES, Recipe
from parity_tests.compare import infinity_distance
from parity_tests.dialects import Settings
from parity_tests.identification.naming import Change, Nearest, keywords, nearest
from parity_tests.identification.observed import Observed, matrices_of
from parity_tests.identification.search import search
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
      name: the published recipe. also: others that would say the same of this trace.
      recipe: the records that reproduce it. keywords: the call that makes them.
      changes: the stages in which it differs from the published recipe, in the order of a step.
      in_out: whether the weights lie (in, out).
      difference: the largest |replayed - recorded| of an update over its largest entry, whole trace.
      exact: whether that is rounding.
      alone: for a trace that no published recipe with its keywords makes, and that several changes
        explain: nothing. For one change: that one, whose removal leaves the gap.
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
            lines.append(f"  the same    {', '.join(self.also)}")
        return "\n".join(lines)


def identify(path: Path) -> Identification:
    """The published recipe nearest to a trace, with keywords and changes that reproduce it.

    The trace needs neither `dialect` nor `hyperparameters`, and both are left unread.

    Raises:
      ValueError: no weight of it can be read as matrices.
    """
    arrays, meta = read_file(path)
    matrices = _matrices(arrays, meta)
    found = search(matrices)
    laid = [matrix.transposed() if found.in_out else matrix for matrix in matrices]
    replays = [
        (near, difference)
        for near in nearest(found.fit, laid)
        if (difference := _replay(near, found.in_out, arrays, meta)) is not None
    ]
    if not replays:
        raise ValueError(f"{Path(path).name}: no recipe can read its weights.")
    lowest = min(difference for _, difference in replays)
    # dion's split weights keep their second moment elsewhere: 2e-8.
    bound = max(2 * lowest, 1e-10)
    good = [(near, difference) for near, difference in replays if difference <= bound]
    near, difference = good[0]
    also = [n.name for n, _ in good[1:] if n.changes == () == near.changes]
    plain = replace(near, changes=(), fit=replace(near.fit, recipe=RECIPES[near.name]))
    gap = _replay(plain, found.in_out, arrays, meta) if near.changes else difference
    return Identification(
        name=near.name,
        also=tuple(also),
        recipe=near.fit.recipe,
        keywords=keywords(near),
        changes=near.changes,
        in_out=found.in_out,
        difference=difference,
        exact=difference <= 1e-9,
        gap=np.inf if gap is None else gap,
    )


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


def _replay(near: Nearest, in_out: bool, arrays, meta) -> float | None:
    """The whole trace by the named recipe, every weight as that dialect reads it; None if it cannot."""
    settings = Settings(near.fit.recipe, near.fit.weight_decay, near.fit.rate_factor)
    try:
        trace = read_as(near.name, settings, arrays, meta, name="")
    except ValueError:
        return None
    weights = tuple(replace(w, layout=_laid(w, in_out)) for w in trace.weights)
    with np.errstate(all="ignore"):
        trajectories = run_oracle(replace(trace, weights=weights))
    return max(
        infinity_distance(after - before, seen_after - seen_before)
        for weight in weights
        for before, after, seen_before, seen_after in zip(
            *_pairs(trajectories[weight.name].params), *_pairs(weight.params), strict=True
        )
        if (seen_after != seen_before).any()
    )


def _pairs(params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return params[:-1], params[1:]


def _laid(weight: Weight, in_out: bool):
    output, reduction = (-1, -2) if in_out else (-2, -1)
    return replace(weight.layout, output_axis=output, reduction_axis=reduction)
