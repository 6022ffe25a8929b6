"""`python -m studies sphere`: arms tuned and trained on seeds of their own, then sweeps and controls."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from examples.ngpt import AXES, NGPTConfig, role_of
from examples.optimizers import is_matrix
from studies.lab import Lab, until_out_of_time
from studies.lanes import Lanes
from studies.ledger import Ledger
from studies.options import Options
from studies.pretraining import Pretraining, pretraining, text
from studies.sphere.arms import (
    DOWNHILL,
    GEODESIC,
    GROUPS,
    NAMES,
    ORDER,
    RETRACTION,
    SWEPT,
    UPHILL,
    axes,
    optimizers,
)
from studies.sphere.plan import LAZY, PUBLISHED, Comparisons
from studies.sphere.record import run_record
from studies.sphere.report import write_report
from studies.training import Data, Task, training
from studies.tuning import TunedSize

FULL = TunedSize(
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
SMALL = TunedSize(
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
            run_record(self, self.data)
            return
        size = SMALL if self.small else FULL
        lab = self._lab(size)
        tuning = size.tuning(lab, {arm: axes(arm) for arm in ORDER})
        try:
            with until_out_of_time():
                run_all(Comparisons(size, lab, tuning))
        finally:
            write_report(self, Comparisons(size, lab, tuning))

    def _lab(self, size: TunedSize) -> Lab:
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
            curves=(),
            every=setup.every,
        )
        lanes = Lanes(task, trainings, names=NAMES, data=text(setup), count=size.lanes)
        return Lab(lanes, ledger, minutes=self.minutes)


def run_all(plan: Comparisons) -> None:
    """Every trial, what decides most first.

    Raises:
      OutOfTime: the lab's limit would be passed; what was finished is kept.
    """
    size, lab, tuning = plan.size, plan.lab, plan.tuning
    missing = {trial.arm for trial in plan.paired() if trial not in lab.ledger}
    lab.prepare([arm for arm in (*ORDER, UPHILL, DOWNHILL) if arm in missing])
    rounds = size.rounds
    for group in (*GROUPS, ORDER):  # at last those that others have overtaken
        rounds = tuning.tune(group, at_least=rounds, at_most=size.most_rounds)
        for arm in group:
            lab.run(plan.finals(arm))
        for arm in (GEODESIC, RETRACTION):
            lab.run(plan.at_projections_values(arm))
    for every in LAZY:
        lab.run(plan.lazy(every))
    for arm, every in PUBLISHED:
        lab.run(plan.by_the_published_rule(arm, every))
    for arm in SWEPT:
        plan.sweep(arm)


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
