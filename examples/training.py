"""The loop that all phases share: batches in, losses on the way out, checkpoints beside."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from examples.checkpoints import Checkpoints
from examples.gpt import GPTConfig
from examples.logged import Logged
from examples.losses import Loss
from examples.mesh import place_batch
from examples.metrics import Line, Metrics
from examples.optimizers import OptimizerConfig
from examples.processes import is_first
from examples.progress import Bar
from examples.runs import read_run
from examples.settings import Training
from examples.step import (
    Setup,
    State,
    abstract_state,
    compiled_evaluation,
    compiled_step,
    first_state,
    shapes_of,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """What a phase trains, and on what.

    Attributes:
      name: for the progress bar.
      batch: a step's batch, arrays with rows first, the same on every process.
      validation: batches of the same shapes.
      params: first weights; None are random ones of the run's seed.
      frozen: parameters that the loss compares with, or None.
    """

    name: str
    model: GPTConfig
    loss: Loss
    batch: Callable[[int], dict[str, np.ndarray]]
    validation: Sequence[dict[str, np.ndarray]]
    params: Any = None
    frozen: Any = None


def train(
    task: Task,
    training: Training,
    optimizer: OptimizerConfig,
    folder: Path,
    *,
    mesh: Mesh | None = None,
    console: Console | None = None,
) -> State:
    """Trains to the last step, from the folder's last checkpoint if it has one.

    Args:
      folder: of the run; the log and the checkpoints are written there.
      mesh: where; None is JAX's default device.

    Returns:
      The last state.
    """
    setup = Setup(
        task.model, optimizer, training.steps, task.loss, mesh, deterministic=training.deterministic
    )
    checkpoints = Checkpoints(folder / "checkpoints", keep=training.keep)
    step = checkpoints.latest() or 0
    if step:
        state = checkpoints.restore(abstract_state(setup))
    else:
        state = first_state(setup, training.seed, task.params)
    metrics = Metrics(folder, step=step, tensorboard=training.tensorboard, written=is_first())
    rows = task.validation[0]["tokens"]
    bar = Bar(
        task.name,
        task.model,
        steps=training.steps,
        tokens=rows.size // rows.shape[-1] * task.model.context,
        frozen=task.frozen is not None,
        console=console or Console(quiet=True),
    )
    try:
        with bar:
            loop = _Loop(setup, task, training, metrics, checkpoints, bar)
            return loop.run(state, step, _seconds_until(folder, step))
    finally:
        checkpoints.close()
        metrics.close()


class _Loop:
    """One run while it goes on. `seconds` is its clock, which stands while no step is made."""

    def __init__(
        self,
        setup: Setup,
        task: Task,
        training: Training,
        metrics: Metrics,
        checkpoints: Checkpoints,
        bar: Bar,
    ):
        self.setup, self.task, self.training = setup, task, training
        self.metrics, self.checkpoints, self.bar = metrics, checkpoints, bar
        self.held_out = [place_batch(batch, setup.mesh) for batch in task.validation]
        self.shapes = shapes_of(self.held_out[0])
        self.pending: list[tuple[int, Logged]] = []
        self.loss, self.seconds, self.shown = math.nan, 0.0, (0, 0.0)

    def run(self, state: State, step: int, seconds: float) -> State:
        self.seconds, self.shown = seconds, (step, seconds)
        frozen, training = self.task.frozen, self.training
        programs = {wanted: self._program(wanted) for wanted in {False, training.diagnostics}}
        if step == 0:
            self._evaluate(state, step)
        begun = time.perf_counter()
        while step < training.steps:
            batch = place_batch(self.task.batch(step), self.setup.mesh)
            step += 1
            looked = step % training.log_every == 0
            state, logged = programs[training.diagnostics and looked](state, frozen, batch)
            self.pending.append((step, logged))
            evaluated = step % training.evaluate_every == 0 or step == training.steps
            saved = step % training.checkpoint_every == 0 or step == training.steps
            if not (looked or evaluated or saved):
                continue
            # The newest step may still be running: waiting for it would leave the device idle after.
            self._write(0 if evaluated or saved else 1)
            self.seconds += time.perf_counter() - begun
            self._show(step)
            if evaluated:
                self._evaluate(state, step)
            if saved:
                self.metrics.flush()
                self.checkpoints.save(state, step)
            begun = time.perf_counter()
        return state

    def _program(self, diagnostics: bool):
        frozen = self.task.frozen is not None
        return compiled_step(self.setup, self.shapes, frozen=frozen, diagnostics=diagnostics)

    def _write(self, left: int) -> None:
        """What was logged, but for the last so many steps."""
        count = len(self.pending) - left
        for step, logged in jax.device_get(self.pending[:count]):
            numbers = logged.as_tree()
            self.metrics.write({"step": step, **numbers})
            self.loss = numbers["loss"]
        del self.pending[:count]

    def _show(self, step: int) -> None:
        before, then = self.shown
        self.shown = step, self.seconds
        self.bar.show(step, self.loss, max(1e-9, (self.seconds - then) / (step - before)))

    def _evaluate(self, state: State, step: int) -> None:
        frozen = self.task.frozen
        evaluate = compiled_evaluation(self.setup, self.shapes, frozen=frozen is not None)
        sums = jax.device_get([evaluate(state.params, frozen, batch) for batch in self.held_out])
        weight = sum(float(each["weight"]) for each in sums)
        found: Line = {
            f"validation_{name}": sum(float(each[name]) for each in sums) / weight
            for name in sums[0]
            if name != "weight"
        }
        self.metrics.write({"step": step, **found, "seconds": self.seconds})
        self.bar.say(f"step {step}: validation loss {found['validation_loss']:.4f}")


def _seconds_until(folder: Path, step: int) -> float:
    """The clock of the run that is resumed."""
    if step == 0:
        return 0.0
    return max(each.seconds for each in read_run(folder).evaluations)
