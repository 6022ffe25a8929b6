"""`python -m studies mechanism`: equal rates in every arm, so that what differs is the stage."""

import dataclasses

import jax
import numpy as np

from examples.gpt import GPTConfig
from studies.intervals import interval
from studies.lab import Lab, OutOfTime
from studies.lanes import Lanes
from studies.ledger import Ledger, Row
from studies.mechanism.measures import MEASURES, measures
from studies.options import Options
from studies.parts.arms import ADAMW, NAMES, OF_MUON, optimizers
from studies.pictures import COLORS, panels, save
from studies.pretraining import Pretraining, pretraining, text
from studies.tables import markdown
from studies.training import MakeOptimizer, Values, training
from studies.trial import Trial

ARMS = (ADAMW, "Muon", "all", "+ Polar Express", "+ NorMuon", "+ cautious decay")
TITLES = dict(
    zip(
        MEASURES,
        (
            "update: spread of neuron norms",
            "update: spread of squared singular values",
            "weight: spread of neuron norms",
            "weight: spread of squared singular values",
            "orthogonality error",
            "share of the mask",
        ),
        strict=True,
    )
)
MISSING = "not run"


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a form of the study. `seeds` run side by side."""

    setup: Pretraining
    seeds: int


FULL = Size(
    Pretraining(
        GPTConfig(width=256, depth=4, heads=4, context=128, dtype="bfloat16"),
        batch=16,
        every=50,
        evaluations=20,
        held_out=64,
    ),
    seeds=8,
)
SMALL = Size(
    Pretraining(
        GPTConfig(width=32, depth=1, heads=2, context=32),
        batch=4,
        every=10,
        evaluations=10,
        held_out=16,
    ),
    seeds=8,
)


@dataclasses.dataclass(frozen=True)
class Mechanism(Options):
    """Neuron norms and singular values of updates and weights, orthogonality, the mask, over a run."""

    def run(self) -> None:
        size = SMALL if self.small else FULL
        setup, task = size.setup, pretraining(size.setup)
        made = optimizers()
        trainings = {
            arm: training(
                task,
                _one_step_longer(made[arm]),
                every=setup.every,
                most=setup.evaluations,
                inspect=measures(OF_MUON[arm].recipe if arm in OF_MUON else None),
            )
            for arm in ARMS
        }
        ledger = Ledger(
            self.file("mechanism", "csv"),
            setup=str(setup),
            names=NAMES,
            metrics=("loss", *MEASURES),
            curves=("loss", *MEASURES),
            every=setup.every,
        )
        lanes = Lanes(task, trainings, names=NAMES, data=text(setup), count=size.seeds)
        lab = Lab(lanes, ledger, minutes=self.minutes)
        trials = {arm: _trials(arm, size) for arm in ARMS}
        try:
            missing = [arm for arm in ARMS if any(trial not in ledger for trial in trials[arm])]
            lab.prepare(missing)
            for arm in ARMS:
                lab.run(trials[arm], curves=True)
        except OutOfTime:
            print("the time is over; the same command goes on")
        finally:
            found = {
                arm: [ledger[trial] for trial in own]
                for arm, own in trials.items()
                if all(trial in ledger for trial in own)
            }
            _write(self, setup, found, size.seeds)


def _trials(arm: str, size: Size) -> list[Trial]:
    values = {"rate": 0.004 if arm == ADAMW else 0.02, "adam_rate": 0.008, "decay": 0.05}
    return [Trial(arm, values, seed, size.setup.evaluations) for seed in range(size.seeds)]


def _one_step_longer(make: MakeOptimizer) -> MakeOptimizer:
    """The rate is not zero yet where the last evaluation measures a step."""

    def longer(values: Values, steps: jax.Array, seed: jax.Array):
        return make(values, steps + 1, seed)

    return longer


def _write(options: Options, setup: Pretraining, found: dict[str, list[Row]], seeds: int) -> None:
    rows = [row for own in found.values() for row in own]
    machines = sorted({f"{row.machine}; {row.versions}" for row in rows})
    lines = [[arm, *(_cell(found.get(arm), name) for name in MEASURES)] for arm in ARMS]
    content = [
        "# mechanism\n",
        f"Written by `python -m studies mechanism`. Setup: {setup}.\n",
        f"Machine: {' | '.join(machines) or MISSING}.\n",
        "Means over the second half of the run and over the blocks' matrices; intervals are 95 %, over"
        f" {seeds} seeds.\n",
        markdown(["arm", *TITLES.values()], lines),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    options.file("mechanism", "md").write_text("\n".join(content))
    figure, axes = panels(len(MEASURES), width=3.6, height=3.2)
    for each, name in zip(axes, MEASURES, strict=True):
        for color, arm in zip(COLORS, ARMS, strict=False):
            if arm in found:
                mean = np.mean([row.curves[name] for row in found[arm]], axis=0)
                steps = setup.every * np.arange(1, len(mean) + 1)
                each.plot(steps, mean, color=color, label=arm)
        each.set_title(TITLES[name], fontsize=9)
        each.set_xlabel("step")
    if found:
        axes[0].legend(frameon=False, fontsize=8)
    save(figure, options.file("mechanism", "png"))


def _cell(rows: list[Row] | None, name: str) -> str:
    if not rows:
        return MISSING
    halves = [row.curves[name][len(row.curves[name]) // 2 :].mean() for row in rows]
    if not np.isfinite(halves).all():
        return "–"
    mean, half = interval(halves)
    return f"{mean:.3f} ± {half:.3f}"
