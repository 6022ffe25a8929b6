"""`python -m studies finetune`: a coarse sweep of update sizes, then what decides on other seeds."""

import dataclasses
import time
import zlib
from pathlib import Path

from examples.errors import BadInput
from examples.gpt import GPTConfig
from studies.finetune.arms import BASES, NAMES, OPTIMIZERS, ORDER, first_dtype, optimizers
from studies.finetune.bases import bases
from studies.finetune.data import Problems, Sizes, made, on_device, read
from studies.finetune.plan import Plan
from studies.finetune.report import write_report
from studies.finetune.task import answer_task, base_task, update_size
from studies.lab import Lab, until_out_of_time
from studies.lanes import Lanes
from studies.ledger import Ledger
from studies.options import Options
from studies.training import MakeOptimizer, Task, training

METRICS = (
    *("loss", "exact", "result", "held_out_loss", "held_out_exact", "held_out_result"),
    *("old_loss", "update_rms"),
)
"""Of new numbers in known templates, of held-out templates, of the old task, and the measured size."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a form of the study.

    Attributes:
      long: the context for rows from files, which are longer than those that are made.
      base_steps, base_batch, base_seeds: of pretraining. batch, every, evaluations: of fine-tuning.
      seeds: of the comparison. coarse_seeds: of the first sweep.
    """

    model: GPTConfig
    data: Sizes
    long: int
    base_steps: int
    base_batch: int
    base_seeds: int
    batch: int
    every: int
    evaluations: int
    lanes: int
    seeds: int
    coarse_seeds: int

    def of_context(self, context: int) -> "Size":
        model = dataclasses.replace(self.model, context=context)
        return dataclasses.replace(
            self, model=model, data=dataclasses.replace(self.data, context=context)
        )

    def teaching(self, problems: int) -> "Size":
        return dataclasses.replace(
            self, data=dataclasses.replace(self.data, prose=problems, train=problems)
        )

    @property
    def base(self) -> str:
        model, data = self.model, self.data
        return (
            f"{model.width} x {model.depth}, context {model.context}, {model.dtype}; bases"
            f" {self.base_steps} steps of {self.base_batch}, {data.prose} problems as prose"
        )

    @property
    def plan(self) -> Plan:
        return Plan(self.evaluations, self.seeds, self.coarse_seeds)

    @property
    def tuned(self) -> str:
        return f"{self.evaluations * self.every} steps of {self.batch}, {self.data.train} problems"


FULL = Size(
    GPTConfig(width=256, depth=4, heads=4, context=96, dtype="bfloat16"),
    Sizes(context=96, prose=20000, train=4000, asked=256, windows=64),
    long=512,
    base_steps=4000,
    base_batch=32,
    base_seeds=4,
    batch=16,
    every=60,
    evaluations=5,
    lanes=32,
    seeds=8,
    coarse_seeds=2,
)
SMALL = Size(
    GPTConfig(width=32, depth=1, heads=2, context=96),
    Sizes(context=96, prose=500, train=200, asked=16, windows=8),
    long=192,
    base_steps=60,
    base_batch=8,
    base_seeds=2,
    batch=4,
    every=2,
    evaluations=5,
    lanes=8,
    seeds=2,
    coarse_seeds=1,
)


@dataclasses.dataclass(frozen=True)
class Finetune(Options):
    """AdamW, Muon and NorMuon on word problems, by update size, base and number format."""

    train: Path | None = None
    """JSONL rows as GSM8K's to fine-tune on; with `test`. None: problems that are made."""
    test: Path | None = None
    """JSONL rows that are only asked."""

    def run(self) -> None:
        start = time.monotonic()
        size, problems, source = self._problems(SMALL if self.small else FULL)
        data = on_device(problems, size.data)
        weights, old = bases(
            BASES,
            base_task(size.model, size.base_batch),
            data,
            steps=size.base_steps,
            seeds=size.base_seeds,
            setup=f"{size.base}; {source}",
            cache=self.file("finetune", "cache"),
        )
        setup = f"{size.base}; {size.tuned}; {source}"
        left = None
        if self.minutes is not None:
            left = self.minutes - (time.monotonic() - start) / 60
        lab = self._lab(size, setup, data | {"bases": weights}, left)
        try:
            with until_out_of_time():
                run_all(size.plan, lab)
        finally:
            write_report(self, setup, lab.ledger, size.plan, old)

    def _problems(self, size: Size) -> tuple[Size, Problems, str]:
        """Those of the files, and the size that they make; or those that are made in this size."""
        if self.train is None and self.test is None:
            return size, made(size.data), "made problems"
        if self.train is None or self.test is None:
            raise BadInput("give both --train and --test, or neither.")
        size = size.of_context(size.long)
        problems = read(self.train, self.test, size.data)
        files = [
            f"{path.name} {zlib.crc32(path.read_bytes()):08x}" for path in (self.train, self.test)
        ]
        return size.teaching(len(problems.train)), problems, ", ".join(files)

    def _lab(self, size: Size, setup: str, data, minutes: float | None) -> Lab:
        task = answer_task(size.model, size.batch)
        trainings = {arm: _training(arm, task, make, size) for arm, make in optimizers().items()}
        ledger = Ledger(
            self.file("finetune", "csv"),
            setup=setup,
            names=NAMES,
            metrics=METRICS,
            curves=(),
            every=size.every,
        )
        lanes = Lanes(task, trainings, names=NAMES, data=data, count=size.lanes)
        return Lab(lanes, ledger, averaged=("update_rms",), minutes=minutes)


def run_all(plan: Plan, lab: Lab) -> None:
    """Every trial, what decides most first.

    Raises:
      OutOfTime: the lab's limit would be passed; what was finished is kept.
    """
    for trials in plan.groups(lab.ledger):
        arms = {trial.arm for trial in trials if trial not in lab.ledger}
        if arms:
            lab.prepare(OPTIMIZERS if arms <= set(OPTIMIZERS) else ORDER)
        lab.run(trials)


def _training(arm: str, task: Task, make: MakeOptimizer, size: Size):
    run = training(task, make, every=size.every, most=size.evaluations, inspect=update_size)
    dtype = first_dtype(arm)
    return lambda data, seed, values, length, params: run(data, seed, values, length, dtype(params))
