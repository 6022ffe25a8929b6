"""Trains a small GPT with AdamW, Muon and NorMuon from the same weights on the same batches.

`python -m examples.train_gpt` takes about two minutes on two CPU cores. On a GPU try
`--width 512 --depth 8 --heads 8 --context 512 --batch 64 --steps 2000 --dtype bfloat16`, with `--tune`
first: the best learning rates change with model, batch and steps.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console

from examples.comparison import difference_table, grid_table, result_table
from examples.corpus import Corpus, load_corpus, unigram_entropy
from examples.curves import draw, write_csv
from examples.gpt import GPTConfig, parameter_count
from examples.optimizers import OPTIMIZERS
from examples.training import Run, Settings, train
from examples.tuning import Grid, tune

HERE = Path(__file__).parent
COLUMNS = 100  # of the tables, also where the output is no terminal


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


def main(
    corpus: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            help="A folder of files, or one file; by default Python's own standard library.",
        ),
    ] = None,
    width: Annotated[int, typer.Option(min=2)] = GPTConfig.width,
    depth: Annotated[int, typer.Option(min=1)] = GPTConfig.depth,
    heads: Annotated[int, typer.Option(min=1)] = GPTConfig.heads,
    context: Annotated[int, typer.Option(min=1, help="Bytes in a window.")] = GPTConfig.context,
    dtype: Annotated[Dtype, typer.Option(help="Of the activations.")] = Dtype.float32,
    batch: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 8,
    steps: Annotated[int, typer.Option(min=2)] = 300,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each optimizer.")] = 1,
    optimizers: Annotated[str, typer.Option(help="Comma-separated.")] = ",".join(OPTIMIZERS),
    retune: Annotated[
        bool, typer.Option("--tune", help="First search the learning rates and record them.")
    ] = False,
    rates: Annotated[Path, typer.Option(help="Where the learning rates are recorded.")] = HERE
    / "learning_rates.json",
    output: Annotated[
        Path, typer.Option(help="Folder for the tables, the picture and the CSV file.")
    ] = HERE / "out",
) -> None:
    """Train a small byte-level GPT with AdamW, Muon and NorMuon, and compare them."""
    names = _optimizer_names(optimizers)
    try:
        model = GPTConfig(width, depth, heads, context, dtype.value)
        data = load_corpus(corpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    settings = Settings(model, batch, steps)
    console = Console(record=True)
    console.width = max(console.width, COLUMNS)
    _print_heading(console, data, settings)

    grid = _grid(console, data, settings, path=rates, retune=retune)
    runs = [
        train(data, settings, optimizer=name, rates=grid.best(name), seed=seed)
        for seed in range(seeds)
        for name in names
    ]
    console.print(result_table(runs))
    if len(names) > 1:
        console.print(difference_table(runs))
    _write(output, console, data, runs)


def _optimizer_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OPTIMIZERS:
            raise typer.BadParameter(f"--optimizers: {name!r} is none of {', '.join(OPTIMIZERS)}.")
    return list(dict.fromkeys(names))


def _print_heading(console: Console, corpus: Corpus, settings: Settings) -> None:
    model = settings.model
    count = parameter_count(model)
    console.print(
        f"{corpus.description}: {len(corpus.train):,} bytes to train on,"
        f" {len(corpus.validation):,} held out,"
        f" unigram entropy {unigram_entropy(corpus.validation):.3f} nats a byte"
    )
    console.print(
        f"GPT with {count:,} parameters: width {model.width}, depth {model.depth},"
        f" {model.heads} heads, context {model.context}, {model.dtype};"
        f" {settings.steps} steps of {settings.batch} x {model.context} bytes"
        f" on {jax.devices()[0].device_kind}"
    )


def _grid(
    console: Console, corpus: Corpus, settings: Settings, *, path: Path, retune: bool
) -> Grid:
    if retune:
        grid = tune(corpus, settings)
        grid.write(path)
        console.print(grid_table(grid))
        return grid
    if not path.exists():
        raise typer.BadParameter(f"no learning rates are recorded in {path}: add --tune.")
    grid = Grid.read(path)
    differing = grid.differing_settings(settings)
    if differing:
        console.print(
            f"Note: the learning rates of {path.name} were searched with {', '.join(differing)};"
            " --tune searches them for this run's settings."
        )
    return grid


def _write(output: Path, console: Console, corpus: Corpus, runs: Sequence[Run]) -> None:
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.txt").write_text(console.export_text())
    write_csv(runs, output / "validation.csv")
    draw(
        runs,
        output / "validation.png",
        title=f"Byte-level GPT on the {corpus.description}",
        unigram_entropy=unigram_entropy(corpus.validation),
    )
    console.print(f"Written: table.txt, validation.csv and validation.png in {output}")


if __name__ == "__main__":
    typer.run(main)
