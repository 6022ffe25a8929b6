"""Which trainings the study has, and in which order: what decides most first."""

import dataclasses
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
from studies.trial import Trial
from studies.tuning import FIRST_SEED

COARSE = tuple(10.0**-k for k in range(7, 1, -1))
SIZES = tuple(sorted((*COARSE, *(10.0 ** -(k + 0.5) for k in range(6, 1, -1)))))
"""Root mean squares of the update, from 1e-7 to 1e-2: every power of ten, then halfway between."""
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
        bases = range(len(BASES))
        for sizes in (COARSE, SIZES):
            for arm in OPTIMIZERS:
                yield [t for s in sizes for b in bases for t in self.swept(arm, b, s)]
        for arm in OPTIMIZERS:
            yield [
                trial
                for base in bases
                for size in self.around_best(ledger, arm, base)
                for trial in self.compared(arm, base, size)
            ]
        for step in STEPS:
            yield [t for rate in RATES for b in bases for t in self.recorded(step, b, rate)]
        yield [t for s in SIZES for b in bases for t in self.swept(EVERYTHING, b, s)]
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

    def around_best(self, ledger: Ledger, arm: str, base: int) -> list[float]:
        """The best size of the sweep and its neighbours."""
        place = SIZES.index(self.best(ledger, arm, base))
        return list(SIZES[max(0, place - 1) : place + 2])

    def best(self, ledger: Ledger, arm: str, base: int) -> float:
        """The size of the sweep's lowest answer loss.

        Raises:
          KeyError: the sweep is not finished.
        """

        def loss(size: float) -> float:
            rows = [ledger[trial] for trial in self.swept(arm, base, size)]
            found = float(np.mean([row.final["loss"] for row in rows]))
            return found if np.isfinite(found) else np.inf

        return min(SIZES, key=loss)

    def _trials(self, arm: str, values: dict[str, float], seeds: Sequence[int]) -> list[Trial]:
        return [Trial(arm, values, seed, self.evaluations) for seed in seeds]


def rows_of(ledger: Ledger, trials: Sequence[Trial]) -> list[Row]:
    """The trials' rows in their order; none unless all are there."""
    if not all(trial in ledger for trial in trials):
        return []
    return [ledger[trial] for trial in trials]
