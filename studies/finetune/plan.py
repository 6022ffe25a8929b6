"""Which trainings the study has, and in which order: what decides most first."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np

from studies.finetune.arms import (
    ADAMW,
    BASES,
    BF16,
    CAUTIOUS,
    EVERYTHING,
    MUON,
    NORMUON,
    OPTIMIZERS,
    REMAINDER,
    SCALES,
    at_size,
)
from studies.ledger import Ledger, Row
from studies.search import Axis, best
from studies.trial import Trial
from studies.tuning import FIRST_SEED, Found

AXIS = Axis("size", 1e-4, factor=math.sqrt(10))
"""Root mean squares of the update: powers of ten, and halfway between. A grid is a range of places on
it, and has the same sizes for every arm."""
COARSE = range(-6, 5, 2)
FIRST = range(-6, 5)
"""From 1e-7 to 1e-2; a grid is widened from here, by a power of ten at a time."""
WIDEST = range(-10, 9)
"""From 1e-9, which float32 weights of this model swallow, to 1, which is above any weight of it."""
ALL = (*OPTIMIZERS, EVERYTHING)
"""The arms that are swept."""
ROUNDED = (1e-6, 1e-5, 1e-4, 1e-3)
"""Those at which number formats are compared."""
RATES = (1e-5, 3e-5, 1e-4)
"""Of the record."""
DECAY = 0.1
"""Of the record's arms."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One of the record's arms: what it adds to the one before, and the numbers that say so."""

    name: str
    arm: str
    scale: int = 0
    decay: float = DECAY


_LARGEST = SCALES.index("max_dim")
STEPS = (
    Step("AdamW", ADAMW, decay=0.0),
    Step("Muon, no shape scale, plain decay", MUON),
    Step("+ scale `original`", MUON, SCALES.index("original")),
    Step("+ scale 0.2 sqrt(max) instead", MUON, SCALES.index("match_rms_adamw")),
    Step("+ scale sqrt(max) instead", MUON, _LARGEST),
    Step("+ second moment", NORMUON, _LARGEST),
    Step("+ cautious decay", CAUTIOUS, _LARGEST),
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Trials by what they are for.

    Attributes:
      evaluations: the length of each. seeds: of the comparison. coarse_seeds: of the first sweep.
    """

    evaluations: int
    seeds: int
    coarse_seeds: int

    @property
    def coarse(self) -> Sequence[int]:
        return range(FIRST_SEED, FIRST_SEED + self.coarse_seeds)

    @property
    def final(self) -> Sequence[int]:
        return range(self.seeds)

    def groups(self, ledger: Ledger) -> Iterator[list[Trial]]:
        """In order; later groups depend on the rows of earlier ones."""
        for arm in OPTIMIZERS:
            yield self._sweep(arm, COARSE)
        for grid in self._widening(ledger, OPTIMIZERS):
            for arm in OPTIMIZERS:
                yield self._sweep(arm, grid)
        for arm in OPTIMIZERS:
            yield [
                trial
                for base in range(len(BASES))
                for size in self.around_best(ledger, arm, base)
                for trial in self.compared(arm, base, size)
            ]
        for step in STEPS:
            yield [
                trial
                for rate in RATES
                for base in range(len(BASES))
                for trial in self.recorded(step, base, rate)
            ]
        for grid in self._widening(ledger, ALL):
            for arm in ALL:
                yield self._sweep(arm, grid)
        for arm in OPTIMIZERS:
            for kind in ("", BF16, REMAINDER):
                yield [t for s in ROUNDED for t in self.compared(arm + kind, 0, s)]

    def swept(self, arm: str, base: int, size: float) -> list[Trial]:
        """Of the first sweep, one a coarse seed."""
        return self._trials(arm, {**at_size(arm, size), "base": base}, self.coarse)

    def compared(self, arm: str, base: int, size: float) -> list[Trial]:
        """The same on the comparison's seeds."""
        return self._trials(arm, {**at_size(arm, size), "base": base}, self.final)

    def recorded(self, step: Step, base: int, rate: float) -> list[Trial]:
        """The record's arm, with one rate for everything."""
        told = {"rate": rate, "adam_rate": rate, "scale": step.scale, "decay": step.decay}
        return self._trials(step.arm, {**told, "base": base}, self.final)

    def grid(self, ledger: Ledger, arms: Sequence[str]) -> range:
        """The widest grid of which every arm has all rows; an empty one if the first is not finished."""
        reached = range(0)
        for grid in self._widening(ledger, arms):
            if not all(trial in ledger for arm in arms for trial in self._sweep(arm, grid)):
                break
            reached = grid
        return reached

    def found(self, ledger: Ledger, arm: str, base: int) -> Found:
        """What the sweep of the optimizers says of one of them."""
        return self._found(ledger, arm, base, self.grid(ledger, OPTIMIZERS))

    def around_best(self, ledger: Ledger, arm: str, base: int) -> list[float]:
        """The best size of the sweep and its neighbours, as far as there are any."""
        found = self.found(ledger, arm, base)
        (place,) = best(found.losses)
        return [AXIS.value(i) for i in range(place - 1, place + 2) if (i,) in found.losses]

    def _widening(self, ledger: Ledger, arms: Sequence[str]) -> Iterator[range]:
        """Grids, each wider than the last, until the best of every arm on every base lies inside.

        All arms have the grid that one of them needs. Whoever asks for the next needs the rows of this.
        """
        grid, wider = range(0), FIRST
        while wider != grid:
            grid = wider
            yield grid
            found = [self._found(ledger, a, b, grid) for a in arms for b in range(len(BASES))]
            places = [best(each.losses)[0] for each in found]
            start = grid.start - 2 * (grid[0] in places)
            stop = grid.stop + 2 * (grid[-1] in places)
            wider = range(max(start, WIDEST.start), min(stop, WIDEST.stop))

    def _found(self, ledger: Ledger, arm: str, base: int, grid: range) -> Found:
        losses = {}
        for place in grid:
            rows = [ledger[trial] for trial in self.swept(arm, base, AXIS.value(place))]
            losses[(place,)] = float(np.mean([row.final["loss"] for row in rows]))
        return Found([AXIS], losses, rounds=1)

    def _sweep(self, arm: str, grid: range) -> list[Trial]:
        return [
            trial
            for place in grid
            for base in range(len(BASES))
            for trial in self.swept(arm, base, AXIS.value(place))
        ]

    def _trials(self, arm: str, values: dict[str, float], seeds: Sequence[int]) -> list[Trial]:
        return [Trial(arm, values, seed, self.evaluations) for seed in seeds]


def rows_of(ledger: Ledger, trials: Sequence[Trial]) -> list[Row]:
    """The trials' rows in their order; none unless all are there."""
    if not all(trial in ledger for trial in trials):
        return []
    return [ledger[trial] for trial in trials]
