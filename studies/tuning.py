"""Arms tuned by equally many trials, on seeds of their own."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from studies.lab import Lab
from studies.search import Axis, Point, best, is_inside, next_round, values_at
from studies.trial import Trial

FIRST_SEED = 1000
"""Tuning's seeds start here, and a comparison's at 0: no arm is tuned on its test."""


class Found(NamedTuple):
    """Of an arm.

    Attributes:
      losses: means over the tuning seeds, by point. rounds: of equally many points.
    """

    axes: Sequence[Axis]
    losses: Mapping[Point, float]
    rounds: int

    @property
    def values(self) -> dict[str, float]:
        """The best ones; where tuning starts if nothing was tried."""
        point = best(self.losses) if self.losses else (0,) * len(self.axes)
        return values_at(self.axes, point)

    @property
    def inside(self) -> bool:
        """Whether the grid reaches beyond the best on every side."""
        return bool(self.losses) and is_inside(self.axes, self.losses)


class Tuning:
    """The search of every arm, as far as the ledger has it.

    Args:
      axes: by arm. seeds: how many each point is trained with. points: of one round.
      evaluations: the length of a trial. metric: what is made small.
    """

    def __init__(
        self,
        lab: Lab,
        axes: Mapping[str, Sequence[Axis]],
        *,
        seeds: int,
        points: int,
        evaluations: int,
        metric: str = "loss",
    ):
        self._lab, self._axes = lab, axes
        self._seeds = range(FIRST_SEED, FIRST_SEED + seeds)
        self._points, self._evaluations, self._metric = points, evaluations, metric

    def tune(self, arms: Sequence[str], *, at_least: int, at_most: int) -> int:
        """Rounds for all arms alike, until the best of each lies inside its grid.

        None gets fewer than another already has: a rerun tunes as an uninterrupted run would have.

        Returns:
          How many rounds each arm has had.
        """
        at_least = max(at_least, *(self.so_far(arm).rounds for arm in arms))
        for rounds in range(at_least, max(at_least, at_most) + 1):
            behind = [arm for arm in arms if self.so_far(arm).rounds < rounds]
            self._lab.prepare(behind)
            for arm in behind:
                self._reach(arm, rounds)
            if all(self.so_far(arm).inside for arm in arms):
                return rounds
        return max(at_least, at_most)

    def so_far(self, arm: str) -> Found:
        """What the ledger's whole rounds say of an arm."""
        axes = self._axes[arm]
        losses: dict[Point, float] = {}
        for rounds in itertools.count():
            points = next_round(axes, losses, self._points)
            trials = {point: self.trials(arm, point) for point in points}
            if not all(trial in self._lab.ledger for own in trials.values() for trial in own):
                return Found(axes, losses, rounds)
            losses |= {point: self._mean(own) for point, own in trials.items()}
        raise AssertionError("a ledger ends")

    def trials(self, arm: str, point: Point) -> list[Trial]:
        """One a seed."""
        values = values_at(self._axes[arm], point)
        return [Trial(arm, values, seed, self._evaluations) for seed in self._seeds]

    def _reach(self, arm: str, rounds: int) -> None:
        while (found := self.so_far(arm)).rounds < rounds:
            points = next_round(found.axes, found.losses, self._points)
            self._lab.run([trial for point in points for trial in self.trials(arm, point)])

    def _mean(self, trials: Sequence[Trial]) -> float:
        rows = [self._lab.ledger[trial] for trial in trials]
        return float(np.mean([row.final[self._metric] for row in rows]))
