"""What the loop costs beside its step: `python -m examples.overhead`, with `pretrain`'s options.

Repeats the compiled step alone on one batch, then trains, without and with diagnostics.
"""

import dataclasses
import tempfile
import time
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from examples.errors import one_line
from examples.launch import launch, open_mesh
from examples.mesh import place_batch
from examples.pretrain import Pretrain
from examples.runs import read_run
from examples.settings import OPTIONS
from examples.step import Setup, compiled_step, first_state, shapes_of


def measure(config: Pretrain) -> dict[str, float]:
    """Seconds a step: of the bare step, of a run, of a run with diagnostics."""
    mesh = open_mesh(config)
    return {
        "the compiled step alone": _bare(config, mesh),
        "training": _trained(config, diagnostics=False),
        "training with diagnostics": _trained(config, diagnostics=True),
    }


def _bare(config: Pretrain, mesh) -> float:
    prepared = config.prepare(mesh)
    task, told = prepared.task, prepared.config
    setup = Setup(task.model, told.optimizer, told.training.steps, task.loss, mesh)
    host = task.batch(0)
    step = compiled_step(setup, shapes_of(host), frozen=False, diagnostics=False)
    state, batch = first_state(setup, 0), place_batch(host, mesh)
    state, _ = step(state, None, batch)
    jax.block_until_ready(state)
    begun = time.perf_counter()
    for _ in range(told.training.steps):
        state, _ = step(state, None, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - begun) / told.training.steps


def _trained(config: Pretrain, *, diagnostics: bool) -> float:
    training = dataclasses.replace(config.training, diagnostics=diagnostics, samples=0)
    with tempfile.TemporaryDirectory() as folder:
        told = dataclasses.replace(config, training=training, output=Path(folder))
        return read_run(launch(told, console=Console(quiet=True))).step_seconds


def _table(seconds: dict[str, float]) -> Table:
    table = Table("what", "ms a step", "over the step alone")
    bare = next(iter(seconds.values()))
    for name, each in seconds.items():
        table.add_row(name, f"{1e3 * each:.2f}", f"{100 * (each / bare - 1):+.1f} %")
    return table


if __name__ == "__main__":
    with one_line():
        Console().print(_table(measure(tyro.cli(Pretrain, config=OPTIONS))))
