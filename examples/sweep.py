"""Where the presets of fine-tuning come from: a phase again and again, with multiples of its rates.

`python -m examples.sweep sft RUN --data FILE --steps 200` takes what `python -m examples sft` takes.
Both rates are multiplied together: the AdamW beside the matrices keeps its share. Beside the loss stands
the share of right answers to the questions of `held_out.jsonl` in the data's folder, if it is there.
"""

import dataclasses
import tempfile
from collections.abc import Sequence
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
from examples.runs import read_run
from examples.settings import OPTIONS
from examples.sft import Sft

OPTIMIZERS = ("adamw", "muon", "normuon")
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclasses.dataclass(frozen=True)
class Found:
    """The final validation loss of a run, and its share of right answers."""

    loss: float
    right: float | None

    def __str__(self) -> str:
        return f"{self.loss:.4f}" + ("" if self.right is None else f", {self.right:.0%}")


def sweep(
    config: Sft | Dpo,
    *,
    optimizers: Sequence[str] = OPTIMIZERS,
    factors: Sequence[float] = FACTORS,
    console: Console | None = None,
) -> dict[str, list[Found]]:
    """What each optimizer comes to at each multiple of its preset's rates.

    Args:
      config: the phase; its folder and optimizer are set here, and no run is kept.
    """
    presets: Presets = SFT if isinstance(config, Sft) else DPO
    found: dict[str, list[Found]] = {}
    for name in optimizers:
        told = dataclasses.replace(config.optimizer, optimizer=name)
        preset = with_preset(told, presets, width=config.model.width)
        for factor in factors:
            beside = preset.adam_learning_rate
            optimizer = dataclasses.replace(
                preset,
                learning_rate=factor * (preset.learning_rate or 0.0),
                adam_learning_rate=None if beside is None else factor * beside,
            )
            ended = _trained(dataclasses.replace(config, optimizer=optimizer))
            found.setdefault(name, []).append(ended)
            (console or Console()).print(f"{name} x {factor:g}: {ended}", highlight=False)
    return found


def _trained(config: Sft | Dpo) -> Found:
    quiet, questions = Console(quiet=True), config.data.with_name("held_out.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        training = dataclasses.replace(config.training, samples=0)
        told = dataclasses.replace(config, training=training, output=Path(folder))
        run = launch(told, console=quiet)
        right = ask(run, questions, quiet).right if questions.exists() else None
        return Found(read_run(run).final_loss, right)


def _table(found: dict[str, list[Found]]) -> Table:
    table = Table(title="Validation loss and right answers at multiples of the preset's rates")
    table.add_column("optimizer")
    for factor in FACTORS:
        table.add_column(f"x {factor:g}", justify="right")
    for name, ended in found.items():
        table.add_row(name, *map(str, ended))
    return table


if __name__ == "__main__":
    commands = (
        Annotated[Sft, tyro.conf.subcommand("sft")] | Annotated[Dpo, tyro.conf.subcommand("dpo")]
    )
    with one_line():
        Console().print(_table(sweep(tyro.cli(commands, config=OPTIONS))))
