"""Optimizers side by side: pretraining from the same weights on the same batches, seed by seed.

`make demo` is this with nothing set: about three minutes on two CPU cores. On a GPU try
`--width 512 --depth 8 --heads 8 --context 512 --batch 64 --steps 2000 --dtype bfloat16`, with
`--tune True` first: the best learning rates change with model, batch and steps.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from examples.comparison import difference_table, grid_table, result_table
from examples.curves import draw, write_csv
from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.launch import description, launch, open_mesh
from examples.optimizers import MOMENTUM_DTYPES, NAMES, OptimizerConfig
from examples.presets import Rates
from examples.pretrain import Pretrain
from examples.runs import Run, new_folder, read_run
from examples.settings import OF_THE_PROCESS, Devices, Training
from examples.tuning import Grid, tune
from optax_normuon import RECIPES

RATES = Path(__file__).parent / "learning_rates.json"
COLUMNS = 100  # of the tables, also where the output is no terminal


@dataclasses.dataclass(frozen=True)
class Compare:
    """Pretrain with several optimizers, and compare them in tables and a picture."""

    data: Path | None = None
    """As for pretrain."""
    optimizers: str = "adamw,muon,normuon"
    """Names, with commas between."""
    momentum_dtypes: str = "float32"
    """In which momentum is kept, with commas between: every recipe runs with each of them."""
    seeds: int = 1
    """Runs of each."""
    tune: bool = False
    """First search their learning rates and record them; a search that was stopped goes on."""
    rates: Path = RATES
    """Where the learning rates are recorded."""
    output: Path | None = None
    """Folder of tables, picture and runs, which must be new. None: the next free one of examples/out."""
    model: GPTConfig = dataclasses.field(default_factory=GPTConfig)
    training: Training = dataclasses.field(
        default_factory=lambda: Training(checkpoint_every=10**9, samples=0)
    )
    devices: Devices = dataclasses.field(default_factory=Devices, metadata=OF_THE_PROCESS)


def compare(config: Compare) -> Path:
    """Trains, prints and writes; returns the folder.

    Raises:
      BadInput: an unknown optimizer, no recorded rates, or as `launch`.
    """
    names = _names(config.optimizers)
    first = config.devices.process in (None, 0)
    console = Console(record=True, quiet=not first)
    console.width = max(console.width, COLUMNS)
    # Processes must have met before JAX is asked for a device.
    mesh = open_mesh(Pretrain(training=config.training, devices=config.devices))
    grid = _grid(config, names, console)
    told = {
        label: _told(config, optimizer, grid.best(optimizer.optimizer))
        for label, optimizer in _optimizers(names, config.momentum_dtypes).items()
    }
    prepared = next(iter(told.values())).prepare(mesh)
    folder = new_folder(config.output, "compare")
    console.print(description(prepared, mesh), highlight=False)
    console.print(f"{', '.join(told)}, {config.seeds} seed(s) each", soft_wrap=True)
    runs = []
    for seed in range(config.seeds):
        for label, pretrain in told.items():
            training = dataclasses.replace(config.training, seed=seed)
            output = folder / f"{label}-{seed}"
            run = dataclasses.replace(pretrain, training=training, output=output)
            runs.append(read_run(launch(run, console=_bar_alone(first))))
    console.print(result_table(runs))
    if len(told) > 1:
        console.print(difference_table(runs))
    if first:
        _write(folder, console, runs)
    return folder


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in NAMES:
            raise BadInput(f"--optimizers: {name!r} is none of {', '.join(NAMES)}.")
    return list(dict.fromkeys(names))


def _optimizers(names: Sequence[str], dtypes: str) -> dict[str, OptimizerConfig]:
    """What is to run, by the names of its folders: a recipe with each dtype, all else once."""
    asked = {dtype.strip() for dtype in dtypes.split(",")}
    if unknown := asked - {*MOMENTUM_DTYPES}:
        raise BadInput(
            f"--momentum-dtypes: {', '.join(sorted(unknown))} is none of {', '.join(MOMENTUM_DTYPES)}."
        )
    result = {}
    for name in names:
        for dtype in MOMENTUM_DTYPES:
            if dtype not in (asked if name in RECIPES else {"float32"}):
                continue
            label = name if dtype == "float32" else f"{name}-{dtype}"
            result[label] = OptimizerConfig(name, momentum_dtype=dtype)
    return result


def _told(config: Compare, optimizer: OptimizerConfig, rates: Rates) -> Pretrain:
    return Pretrain(
        data=config.data,
        model=config.model,
        optimizer=dataclasses.replace(optimizer, **dataclasses.asdict(rates)),
        training=config.training,
        devices=config.devices,
    )


def _grid(config: Compare, names: Sequence[str], console: Console) -> Grid:
    if config.tune:
        told = config.data, config.model, config.training, config.devices
        grid = tune(names, *told, record=config.rates)
        console.print(grid_table(grid))
        return grid
    if not config.rates.exists():
        raise BadInput(f"no learning rates are recorded in {config.rates}: add --tune True.")
    grid = Grid.read(config.rates)
    if differing := grid.differing_settings(config.model, config.training):
        console.print(
            f"Note: the learning rates of {config.rates.name} were searched with"
            f" {', '.join(differing)}; --tune True searches them for this run's settings."
        )
    return grid


def _bar_alone(first: bool) -> Console:
    """A terminal shows each run's progress; elsewhere only the tables are printed."""
    console = Console(stderr=True)
    console.quiet = not (first and console.is_terminal)
    return console


def _write(folder: Path, console: Console, runs: Sequence[Run]) -> None:
    (folder / "table.txt").write_text(console.export_text())
    write_csv(runs, folder / "validation.csv")
    draw(runs, folder / "validation.png", title="Byte-level GPT")
    console.print(
        f"Written: table.txt, validation.csv and validation.png in {folder}", soft_wrap=True
    )
