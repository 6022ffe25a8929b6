"""Trains a small GPT with AdamW, Muon and NorMuon from the same weights on the same batches.

`python -m examples.train_gpt` takes about two minutes on two CPU cores. On a GPU try
`--width 512 --depth 8 --heads 8 --context 512 --batch 64 --steps 2000 --dtype bfloat16`, with `--tune`
first: the best learning rates change with model, batch and steps.

`JAX_NUM_CPU_DEVICES=4 python -m examples.train_gpt --mesh fsdp=2,tensor=2` divides model and batch among
four devices. One run may have many processes, one a GPU or one a host: each is started with `--mesh` and
its own `--process`.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import jax
import typer
from jax.sharding import Mesh
from rich.console import Console

from examples.comparison import difference_table, grid_table, result_table
from examples.corpus import Corpus, load_corpus, unigram_entropy
from examples.curves import draw, write_csv
from examples.gpt import GPTConfig, parameter_count
from examples.mesh import batch_parts, read_mesh
from examples.optimizers import OPTIMIZERS
from examples.processes import is_first, join
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
    mesh: Annotated[
        str | None,
        typer.Option(
            help="Devices as name=size,...: fsdp divides parameters and batch, tensor the parameters,"
            " data the batch; by default one device."
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            envvar="JAX_COORDINATOR_ADDRESS",
            help="host:port of process 0, for a run of many processes.",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, envvar="JAX_NUM_PROCESSES", help="How many there are.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(min=0, envvar="JAX_PROCESS_ID", help="Which of them this one is.")
    ] = None,
) -> None:
    """Train a small byte-level GPT with AdamW, Muon and NorMuon, and compare them."""
    names = _optimizer_names(optimizers)
    try:
        join(coordinator, processes, process)
        model = GPTConfig(width, depth, heads, context, dtype.value)
        data = load_corpus(corpus)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    settings = Settings(model, batch, steps)
    devices = _mesh(mesh, batch)
    console = Console(record=True, quiet=not is_first())
    console.width = max(console.width, COLUMNS)
    _print_heading(console, data, settings, devices)

    grid = _grid(console, data, settings, devices, path=rates, retune=retune)
    runs = [
        train(data, settings, optimizer=name, rates=grid.best(name), seed=seed, mesh=devices)
        for seed in range(seeds)
        for name in names
    ]
    console.print(result_table(runs))
    if len(names) > 1:
        console.print(difference_table(runs))
    if is_first():
        _write(output, console, data, runs)


def _optimizer_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in OPTIMIZERS:
            raise typer.BadParameter(f"--optimizers: {name!r} is none of {', '.join(OPTIMIZERS)}.")
    return list(dict.fromkeys(names))


def _mesh(text: str | None, batch: int) -> Mesh | None:
    if text is None:
        if jax.process_count() > 1:
            raise typer.BadParameter(
                "--mesh is missing: many processes need one to share the work."
            )
        return None
    try:
        mesh = read_mesh(text)
    except ValueError as error:
        raise typer.BadParameter(f"--mesh: {error}") from error
    if batch % batch_parts(mesh):
        raise typer.BadParameter(
            f"--batch: {batch} windows cannot be divided over {text}: give a multiple of"
            f" {batch_parts(mesh)}."
        )
    return mesh


def _print_heading(console: Console, corpus: Corpus, settings: Settings, mesh: Mesh | None) -> None:
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
        f" on {jax.devices()[0].device_kind}{'' if mesh is None else f', {_described(mesh)}'}"
    )


def _described(mesh: Mesh) -> str:
    sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    count = jax.process_count()
    return f"{mesh.size} devices {sizes}" + (f" of {count} processes" if count > 1 else "")


def _grid(
    console: Console,
    corpus: Corpus,
    settings: Settings,
    mesh: Mesh | None,
    *,
    path: Path,
    retune: bool,
) -> Grid:
    if retune:
        grid = tune(corpus, settings, mesh=mesh)
        if is_first():
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
