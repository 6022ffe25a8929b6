"""Which trials the study of spheres compares: the study runs them, and the report reads them."""

import dataclasses
from collections.abc import Iterator, Sequence

from studies.lab import Lab
from studies.sphere.arms import DOWNHILL, GEODESIC, ORDER, PROJECTION, RETRACTION, UPHILL
from studies.trial import Trial
from studies.tuning import FIRST_SEED, TunedSize, Tuning

RATES = (0.001, 0.003, 0.01, 0.023, 0.05, 0.1)
"""Of the published sweep; it goes on by factors of two or a half until the best lies inside."""
MOST_FURTHER = 4
LAZY = (1, 3, 5, 7, 10, 15, 20)
"""Steps from one projection to the next."""
NEVER = 1e6
PUBLISHED = ((UPHILL, 7), (DOWNHILL, 7), (DOWNHILL, NEVER))
"""Rules without a tangent, and the steps from one projection to the next."""


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """The trials, with the values that tuning has found so far."""

    size: TunedSize
    lab: Lab
    tuning: Tuning

    def paired(self) -> list[Trial]:
        """All that are paired by seed, with the values found so far."""
        trials = [*map(self.finals, ORDER), *map(self.lazy, LAZY)]
        trials += map(self.at_projections_values, (GEODESIC, RETRACTION))
        trials += [self.by_the_published_rule(arm, every) for arm, every in PUBLISHED]
        return [trial for each in trials for trial in each]

    def finals(self, arm: str) -> list[Trial]:
        """The comparison's trials of an arm, with the values that tuning has found."""
        return self._paired(arm, {})

    def at_projections_values(self, arm: str) -> list[Trial]:
        """An arm with the values that were found for projection: only the step differs."""
        return self._paired(arm, {}, values_of=PROJECTION)

    def lazy(self, every: float) -> list[Trial]:
        """Projection every so many steps, with the values of every step's."""
        return self._paired(PROJECTION, {} if every == 1 else {"every": every})

    def by_the_published_rule(self, arm: str, every: float) -> list[Trial]:
        """With projection's values."""
        return self._paired(arm, {"every": every}, values_of=PROJECTION)

    def sweep(self, arm: str) -> dict[float, list[Trial]]:
        """Trains an arm at rates of the published sweep and beyond, with its tuned Adam rate."""
        for rates in self._widening(arm):
            trials = [trial for rate in rates for trial in self.at_rate(arm, rate)]
            self.lab.run(trials)
        return self.swept(arm)

    def swept(self, arm: str) -> dict[float, list[Trial]]:
        """The sweep's trials that the ledger has, by rate."""
        found: dict[float, list[Trial]] = {}
        for rates in self._widening(arm):
            own = {rate: self.at_rate(arm, rate) for rate in rates}
            if not all(trial in self.lab.ledger for each in own.values() for trial in each):
                break
            found |= own
        return dict(sorted(found.items()))

    def at_rate(self, arm: str, rate: float) -> list[Trial]:
        """On tuning's seeds."""
        values = self.tuning.so_far(arm).values | {"rate": rate}
        seeds = range(FIRST_SEED, FIRST_SEED + self.size.tuning_seeds)
        return [Trial(arm, values, seed, self.size.setup.evaluations) for seed in seeds]

    def _widening(self, arm: str) -> Iterator[Sequence[float]]:
        """The published rates, then one further at a time while the best is at an end.

        Each is yielded before its losses are asked for: whoever iterates has run it by then.
        """
        yield RATES
        rates = list(RATES)
        for _ in range(MOST_FURTHER):
            losses = [self._mean(self.at_rate(arm, rate)) for rate in rates]
            best = losses.index(min(losses))
            if 0 < best < len(rates) - 1:
                return
            further = rates[0] / 2 if best == 0 else rates[-1] * 2
            rates = sorted([*rates, further])
            yield (further,)

    def _mean(self, trials: Sequence[Trial]) -> float:
        losses = [self.lab.ledger[trial].final["loss"] for trial in trials]
        mean = sum(losses) / len(losses)
        return mean if mean == mean else float("inf")

    def _paired(
        self, arm: str, more: dict[str, float], *, values_of: str | None = None
    ) -> list[Trial]:
        values = self.tuning.so_far(values_of or arm).values | more
        length = self.size.setup.evaluations
        return [Trial(arm, values, seed, length) for seed in range(self.size.seeds)]
