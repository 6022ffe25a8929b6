"""What the loop costs beside its step: `python -m examples.overhead`, with `pretrain`'s options.

Repeats the compiled step alone on batches that lie on the device, and trains on the same ones from the
same first weights, without and with diagnostics: by turns, several times. The same batches, because the
time of a step depends on them.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from examples.configuration import read_arguments
from examples.errors import one_line
from examples.launch import launch, open_mesh
from examples.mesh import place_batch
from examples.pretrain import Pretrain
from examples.runs import read_run
from examples.step import Setup, compiled_step, first_state, shapes_of

ROUNDS = 3


def measure(config: Pretrain, *, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds a step in each round: of the bare step, of a run, of a run with diagnostics."""
    bare = _Bare(config)
    ways = {
        "the compiled step alone": bare.seconds,
        "training": lambda: _trained(config, diagnostics=False),
        "training with diagnostics": lambda: _trained(config, diagnostics=True),
    }
    # The first of each compiles; its first executions load kernels.
    for way in ways.values():
        way()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


class _Bare:
    def __init__(self, config: Pretrain):
        mesh = open_mesh(config)
        prepared = config.prepare(mesh)
        task, told = prepared.task, prepared.config
        batches = [task.batch(step) for step in range(told.training.steps)]
        self.setup = Setup(
            task.model,
            told.optimizer,
            told.training.steps,
            task.loss,
            mesh,
            deterministic=told.training.deterministic,
        )
        self.seed = told.training.seed
        self.step = compiled_step(
            self.setup, shapes_of(batches[0]), frozen=False, diagnostics=False
        )
        self.batches = [place_batch(batch, mesh) for batch in batches]

    def seconds(self) -> float:
        state = jax.block_until_ready(first_state(self.setup, self.seed))
        begun = time.perf_counter()
        for batch in self.batches:
            state, _ = self.step(state, None, batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - begun) / len(self.batches)


def _trained(config: Pretrain, *, diagnostics: bool) -> float:
    training = dataclasses.replace(config.training, diagnostics=diagnostics, samples=0)
    with tempfile.TemporaryDirectory() as folder:
        told = dataclasses.replace(config, training=training, output=Path(folder))
        return read_run(launch(told, console=Console(quiet=True))).step_seconds


def _table(found: dict[str, list[float]]) -> Table:
    """Medians, and the median over the rounds of each one's ratio to the step alone."""
    table = Table("what", "ms a step", "over the step alone", "least to most")
    bare = next(iter(found.values()))
    for name, seconds in found.items():
        over = sorted(100 * (each / alone - 1) for each, alone in zip(seconds, bare, strict=True))
        table.add_row(
            name,
            f"{1e3 * statistics.median(seconds):.2f}",
            f"{statistics.median(over):+.1f} %",
            f"{over[0]:+.1f} to {over[-1]:+.1f} %",
        )
    return table


if __name__ == "__main__":
    with one_line():
        Console().print(_table(measure(read_arguments(Pretrain()))))
