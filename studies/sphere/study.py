"""`python -m studies sphere`: arms tuned and trained on seeds of their own, then sweeps and controls."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from examples.ngpt import AXES, NGPTConfig, role_of
from examples.optimizers import is_matrix
from studies.lab import Lab, OutOfTime
from studies.lanes import Lanes
from studies.ledger import Ledger
from studies.options import Options
from studies.pretraining import Pretraining, pretraining, text
from studies.sphere.arms import (
    DOWNHILL,
    FROZEN,
    GEODESIC,
    GROUPS,
    NAMES,
    ORDER,
    PROJECTION,
    RETRACTION,
    SWEPT,
    UPHILL,
    axes,
    optimizers,
)
from studies.sphere.record import run_record
from studies.sphere.report import write_report
from studies.training import Data, Task, training
from studies.trial import Trial
from studies.tuning import FIRST_SEED, Tuning

RATES = (0.001, 0.003, 0.01, 0.023, 0.05, 0.1)
"""Of the published sweep; it goes on by factors of two or a half until the best lies inside."""
MOST_FURTHER = 4
LAZY = (1, 3, 5, 7, 10, 15, 20)
"""Steps from one projection to the next."""
PUBLISHED_EVERY, NEVER = 7, 1e6


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a form of the study.

    Attributes:
      lanes: trainings side by side. seeds: of the comparison. tuning_seeds: of each point of a grid.
      rounds, most_rounds: of tuning, each of `lanes / tuning_seeds` points.
    """

    setup: Pretraining
    lanes: int
    seeds: int
    tuning_seeds: int
    rounds: int
    most_rounds: int

    @property
    def points(self) -> int:
        return self.lanes // self.tuning_seeds


FULL = Size(
    Pretraining(
        NGPTConfig(width=256, depth=4, heads=4, context=128, dtype="bfloat16"),
        batch=16,
        every=10,
        evaluations=80,
        held_out=64,
    ),
    lanes=16,
    seeds=16,
    tuning_seeds=2,
    rounds=2,
    most_rounds=5,
)
SMALL = Size(
    Pretraining(
        NGPTConfig(width=32, depth=1, heads=2, context=32),
        batch=4,
        every=2,
        evaluations=30,
        held_out=16,
    ),
    lanes=8,
    seeds=8,
    tuning_seeds=2,
    rounds=1,
    most_rounds=2,
)


@dataclasses.dataclass(frozen=True)
class Sphere(Options):
    """nGPT: projection, retraction, geodesic, hyperball; directions, lazy projection, controls."""

    record: bool = False
    """Train the published 11 x 768 preset once, and nothing else."""
    data: Path | None = None
    """Of the preset: FineWeb's .bin shards. None is the source of Python's own standard library."""

    def run(self) -> None:
        if self.record:
            run_record(self)
            return
        size = SMALL if self.small else FULL
        lab = self._lab(size)
        tuning = Tuning(
            lab,
            {arm: axes(arm) for arm in ORDER},
            seeds=size.tuning_seeds,
            points=size.points,
            evaluations=size.setup.evaluations,
        )
        try:
            self._trials(size, lab, tuning)
        except OutOfTime:
            print("the time is over; the same command goes on")
        finally:
            write_report(self, Comparisons(size, lab, tuning))

    def _lab(self, size: Size) -> Lab:
        setup = size.setup
        task = with_drift(pretraining(setup))
        trainings = {
            arm: training(task, make, every=setup.every, most=setup.evaluations)
            for arm, make in optimizers().items()
        }
        ledger = Ledger(
            self.file("sphere", "csv"),
            setup=f"nGPT {setup}",
            names=NAMES,
            metrics=("loss", "drift"),
            every=setup.every,
        )
        lanes = Lanes(task, trainings, names=NAMES, data=text(setup), count=size.lanes)
        return Lab(lanes, ledger, curve="loss", minutes=self.minutes)

    def _trials(self, size: Size, lab: Lab, tuning: Tuning) -> None:
        plan = Comparisons(size, lab, tuning)
        rounds = size.rounds
        for place, group in enumerate((*GROUPS, ORDER)):  # at last those that others have overtaken
            lab.prepare(group)
            rounds = tuning.tune(group, at_least=rounds, at_most=size.most_rounds)
            for arm in group:
                lab.run(plan.finals(arm), curves=True)
            if place == 0:
                for arm in (GEODESIC, RETRACTION):
                    lab.run(plan.at_projections_values(arm), curves=True)
            if place == 1:
                for every in LAZY:
                    lab.run(plan.lazy(every))
        for arm, every in plan.published:
            lab.run(plan.by_the_published_rule(arm, every))
        for arm in SWEPT:
            plan.sweep(arm)


@dataclasses.dataclass(frozen=True)
class Comparisons:
    """Which trials are compared, for the study that runs them and for the report that reads them."""

    size: Size
    lab: Lab
    tuning: Tuning

    published = ((UPHILL, PUBLISHED_EVERY), (DOWNHILL, PUBLISHED_EVERY), (DOWNHILL, NEVER))

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


def with_drift(task: Task) -> Task:
    """An evaluation also says how far the matrices' slices are from norm 1, in the mean."""

    def measure(data: Data, params) -> dict[str, jax.Array]:
        off = [
            jnp.abs(jnp.sqrt(jnp.square(leaf).sum(AXES["embedding"][role_of(path)])) - 1).mean()
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
            if is_matrix(path)
        ]
        return task.measure(data, params) | {"drift": jnp.stack(off).mean()}

    return task._replace(measure=measure)
