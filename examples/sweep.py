"""Where the presets come from, and how far they reach: a phase with multiples of its rates.

`python -m examples.sweep --factors 0.5 1 2 sft RUN --data FILE`: after `sft` as `python -m examples`.
Both rates are multiplied together: the AdamW beside the matrices keeps its share. Beside the loss stands
the share of right answers to the questions of `held_out.jsonl` in the data's folder, if it is there.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from examples.dpo import Dpo
from examples.errors import one_line
from examples.launch import launch
from examples.phases import ask
from examples.presets import DPO, SFT, Presets, with_preset
from examples.pretrain import Pretrain
from examples.pretrain_ngpt import PretrainNGPT
from examples.runs import read_run
from examples.settings import OPTIONS
from examples.sft import Sft
from examples.trained import load_description


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train a phase with multiples of its preset's rates."""

    phase: (
        Annotated[Pretrain, tyro.conf.subcommand("pretrain")]
        | Annotated[PretrainNGPT, tyro.conf.subcommand("ngpt")]
        | Annotated[Sft, tyro.conf.subcommand("sft")]
        | Annotated[Dpo, tyro.conf.subcommand("dpo")]
    )
    optimizers: tuple[str, ...] = ("adamw", "muon", "normuon")
    """Names, as for `--optimizer`."""
    factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """What the preset's rates are multiplied by."""


@dataclasses.dataclass(frozen=True)
class Found:
    """The final validation loss of a run, and its share of right answers."""

    loss: float
    right: float | None

    def __str__(self) -> str:
        return f"{self.loss:.4f}" + ("" if self.right is None else f", {self.right:.0%}")


def sweep(config: Sweep, console: Console) -> dict[str, list[Found]]:
    """What each optimizer comes to at each multiple of its preset's rates; no run is kept."""
    phase, found = config.phase, {}
    presets, width = presets_of(phase)
    for name in config.optimizers:
        told = dataclasses.replace(phase.optimizer, optimizer=name)
        preset = with_preset(told, presets, width=width)
        for factor in config.factors:
            beside = preset.adam_learning_rate
            optimizer = dataclasses.replace(
                preset,
                learning_rate=factor * (preset.learning_rate or 0.0),
                adam_learning_rate=None if beside is None else factor * beside,
            )
            ended = _trained(dataclasses.replace(phase, optimizer=optimizer))
            found.setdefault(name, []).append(ended)
            console.print(f"{name} x {factor:g}: {ended}", highlight=False)
    return found


def presets_of(phase: Pretrain | Sft | Dpo) -> tuple[Presets, int]:
    """The presets, and the width of the model."""
    if isinstance(phase, Pretrain):
        return phase.presets, phase.model.width
    _, model, _ = load_description(phase.start)
    return SFT if isinstance(phase, Sft) else DPO, model.width


def _trained(config: Pretrain | Sft | Dpo) -> Found:
    quiet, data = Console(quiet=True), config.data
    questions = None if isinstance(config, Pretrain) else data and data.with_name("held_out.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(config.training, samples=0)
        told = dataclasses.replace(config, training=training, output=Path(folder))
        run = launch(told, console=quiet)
        right = ask(run, questions, quiet).right if questions and questions.exists() else None
        return Found(read_run(run).final_loss, right)


def _table(config: Sweep, found: dict[str, list[Found]]) -> Table:
    table = Table(title="Validation loss and right answers at multiples of the preset's rates")
    table.add_column("optimizer")
    for factor in config.factors:
        table.add_column(f"x {factor:g}", justify="right")
    for name, ended in found.items():
        table.add_row(name, *map(str, ended))
    return table


if __name__ == "__main__":
    with one_line():
        told = tyro.cli(Sweep, config=(*OPTIONS, tyro.conf.OmitSubcommandPrefixes))
        console = Console()
        console.print(_table(told, sweep(told, console)))
