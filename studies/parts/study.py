"""`python -m studies parts`: the arms tuned, then trained on seeds of their own, then shorter runs."""

import dataclasses

from examples.gpt import GPTConfig
from studies.lab import Lab, until_out_of_time
from studies.lanes import Lanes
from studies.ledger import Ledger
from studies.options import Options
from studies.parts.arms import GROUPS, NAMES, ORDER, axes, optimizers
from studies.parts.report import write_report
from studies.pretraining import Pretraining, pretraining, text
from studies.training import training
from studies.trial import Trial
from studies.tuning import TunedSize, Tuning

SHORTER = ("Muon", "all")
"""Arms that are also trained with fewer steps, each length with its own decay to zero."""


@dataclasses.dataclass(frozen=True)
class Size(TunedSize):
    """`fractions` are the lengths of the shorter runs, in evaluations."""

    fractions: tuple[int, ...]


FULL = Size(
    Pretraining(
        GPTConfig(width=256, depth=4, heads=4, context=128, dtype="bfloat16"),
        batch=16,
        every=10,
        evaluations=100,
        held_out=64,
    ),
    lanes=16,
    seeds=16,
    tuning_seeds=2,
    rounds=2,
    most_rounds=6,
    fractions=(60, 70, 80, 90),
)
SMALL = Size(
    Pretraining(
        GPTConfig(width=32, depth=1, heads=2, context=32),
        batch=4,
        every=2,
        evaluations=50,
        held_out=16,
    ),
    lanes=8,
    seeds=8,
    tuning_seeds=2,
    rounds=1,
    most_rounds=3,
    fractions=(60, 80),
)


@dataclasses.dataclass(frozen=True)
class Parts(Options):
    """AdamW, Muon and each part of NorMuon: steps to AdamW's loss, final loss, time a step."""

    def run(self) -> None:
        size = SMALL if self.small else FULL
        lab = self._lab(size)
        tuning = size.tuning(lab, {arm: axes(arm) for arm in ORDER})
        try:
            with until_out_of_time():
                self._trials(size, lab, tuning)
        finally:
            write_report(self, size.setup, lab.ledger, tuning, seeds=range(size.seeds))

    def _lab(self, size: Size) -> Lab:
        setup = size.setup
        task = pretraining(setup)
        trainings = {
            arm: training(task, make, every=setup.every, most=setup.evaluations)
            for arm, make in optimizers().items()
        }
        ledger = Ledger(
            self.file("parts", "csv"),
            setup=str(setup),
            names=NAMES,
            metrics=("loss",),
            curves=("loss",),
            every=setup.every,
        )
        lanes = Lanes(task, trainings, names=NAMES, data=text(setup), count=size.lanes)
        return Lab(lanes, ledger, minutes=self.minutes)

    def _trials(self, size: Size, lab: Lab, tuning: Tuning) -> None:
        rounds = size.rounds
        for group in (*GROUPS, ORDER):  # at last those that others have overtaken
            rounds = tuning.tune(group, at_least=rounds, at_most=size.most_rounds)
            for arm in group:
                lab.run(finals(size, tuning, arm, size.setup.evaluations), curves=True)
        for length in size.fractions:
            for arm in SHORTER:
                lab.run(finals(size, tuning, arm, length), curves=True)


def finals(size: Size, tuning: Tuning, arm: str, evaluations: int) -> list[Trial]:
    """The comparison's trials of an arm, with the values that tuning has found."""
    values = tuning.so_far(arm).values
    return [Trial(arm, values, seed, evaluations) for seed in range(size.seeds)]
