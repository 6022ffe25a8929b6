"""The learning-rate grid: searched with `--tune True`, kept in a JSON file, read by every other run."""

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.launch import launch
from examples.optimizers import OptimizerConfig
from examples.presets import Rates, same_update
from examples.pretrain import Pretrain
from examples.processes import is_first
from examples.runs import Run, read_run
from examples.settings import Devices, Training

SEED = 1000  # apart from the seeds of the comparison, so that no optimizer is tuned on its test
ADAMW_GRID = (2e-3, 4e-3, 8e-3, 1.6e-2)
MATRIX_GRID = (0.01, 0.02, 0.04, 0.08)
EXTENSIONS = 4


@dataclasses.dataclass(frozen=True)
class GridPoint:
    """One run of the grid. `validation_loss` is None where the run diverged."""

    optimizer: str
    rates: Rates
    validation_loss: float | None
    seconds: float

    @property
    def rank(self) -> float:
        """For `min`: the loss, and infinity for a diverged run."""
        return math.inf if self.validation_loss is None else self.validation_loss


@dataclasses.dataclass(frozen=True)
class Grid:
    """Every run of a search, with what it was run on: one JSON document."""

    settings: dict
    seed: int
    corpus: str
    machine: dict
    versions: dict
    points: tuple[GridPoint, ...]

    def best(self, optimizer: str) -> Rates:
        """The rates of the optimizer's lowest validation loss.

        Raises:
          BadInput: the grid has no run of that optimizer.
        """
        own = [point for point in self.points if point.optimizer == optimizer]
        if not own:
            raise BadInput(
                f"the recorded grid has no run of {optimizer}: run again with --tune True."
            )
        return min(own, key=lambda point: point.rank).rates

    def differing_settings(self, model: GPTConfig, training: Training) -> list[str]:
        """`name=recorded value` where these settings are not the ones of the search."""
        asked, recorded = _flat(_searched(model, training)), _flat(self.settings)
        return [f"{name}={value}" for name, value in recorded.items() if asked[name] != value]

    def write(self, path: Path) -> None:
        new = path.with_suffix(".new")
        new.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")
        os.replace(new, path)

    @classmethod
    def read(cls, path: Path) -> "Grid":
        """The record of a search.

        Raises:
          BadInput: it is none.
        """
        try:
            content = json.loads(path.read_text())
            points = [
                GridPoint(**{**point, "rates": Rates(**point["rates"])})
                for point in content.pop("points")
            ]
            return cls(**content, points=tuple(points))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"{path} is no record of a search: {error!r}.") from error


def search(loss: Callable[[float], float], grid: Sequence[float]) -> float:
    """The rate of the lowest loss, on a grid that grows until the best is not at its end.

    Args:
      loss: of a rate; called once for each.
      grid: rates to begin with; it grows by factors of two, by EXTENSIONS rates at most.
    """
    losses = {rate: loss(rate) for rate in grid}
    for _ in range(EXTENSIONS):
        best = min(losses, key=losses.__getitem__)
        if best not in (min(losses), max(losses)):
            break
        rate = best / 2 if best == min(losses) else best * 2
        losses[rate] = loss(rate)
    return min(losses, key=losses.__getitem__)


def tune(
    names: Sequence[str],
    data: Path | None,
    model: GPTConfig,
    training: Training,
    devices: Devices,
    *,
    record: Path,
) -> Grid:
    """Searches AdamW's rate first, then each other optimizer's together with the AdamW beside it.

    Every run is recorded as it ends, beside `record` in a file `.part`. A search that was stopped goes
    on from there, if it was of the same settings, data, machine and versions.

    Args:
      names: of the optimizers; AdamW's rate is searched in any case.
      data, model, training, devices: of the runs, whose folders are not kept.
      record: where the whole search is written at its end.

    Raises:
      BadInput: the `.part` is of another search, or no record of one.
    """
    grid = Grid(
        settings=_searched(model, training),
        seed=SEED,
        corpus=f"standard library of Python {platform.python_version()}"
        if data is None
        else data.name,
        machine={
            "system": f"{platform.system()} {platform.machine()}",
            "device": jax.devices()[0].device_kind,
            "cores": os.cpu_count(),
        },
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
        },
        points=(),
    )
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_suffix(".part")
    found = _found_before(part, grid)
    points: list[GridPoint] = []

    @functools.cache
    def loss(optimizer: str, rates: Rates) -> float:
        if (optimizer, rates) not in found:
            told = Pretrain(
                data=data,
                model=model,
                optimizer=OptimizerConfig(optimizer, **dataclasses.asdict(rates)),
                training=dataclasses.replace(training, seed=SEED),
                devices=devices,
            )
            run = run_briefly(told)
            final = run.final_loss if math.isfinite(run.final_loss) else None
            seconds = round(run.evaluations[-1].seconds, 1)
            found[optimizer, rates] = GridPoint(optimizer, rates, final, seconds)
            if is_first():
                dataclasses.replace(grid, points=tuple(found.values())).write(part)
        points.append(found[optimizer, rates])
        return points[-1].rank

    adam = search(lambda rate: loss("adamw", Rates(rate)), ADAMW_GRID)
    for name in names:
        if name != "adamw":
            like = same_update(name, model.width)
            _search_both_rates(functools.partial(loss, name), [like * r for r in MATRIX_GRID], adam)
    whole = dataclasses.replace(grid, points=tuple(points))
    if is_first():
        whole.write(record)
        part.unlink()
    return whole


def _found_before(part: Path, grid: Grid) -> dict[tuple[str, Rates], GridPoint]:
    """What a search of `grid`'s settings had found when it was stopped."""
    if not part.exists():
        return {}
    before = Grid.read(part)
    if dataclasses.replace(before, points=()) != grid:
        raise BadInput(
            f"{part} is what a search of other settings, data or versions had found when it was stopped:"
            " remove it to begin anew."
        )
    return {(point.optimizer, point.rates): point for point in before.points}


def run_briefly(told: Pretrain) -> Run:
    """A run of which only the log is wanted."""
    with tempfile.TemporaryDirectory() as folder:
        return read_run(launch(dataclasses.replace(told, output=Path(folder))))


def _search_both_rates(loss: Callable[[Rates], float], grid: Sequence[float], adam: float) -> None:
    """The matrices' rate with AdamW's best beside it; the AdamW beside; the matrices' rate again, for
    the two depend on each other."""
    matrix = search(lambda rate: loss(Rates(rate, adam)), grid)
    # Embedding and head alone bear, and like, a higher rate than a whole model does.
    beside = search(lambda rate: loss(Rates(matrix, rate)), (adam, 2 * adam, 4 * adam))
    search(lambda rate: loss(Rates(rate, beside)), (matrix / 2, matrix, matrix * 2))


def _searched(model: GPTConfig, training: Training) -> dict:
    return {
        "model": dataclasses.asdict(model),
        "batch": training.batch,
        "steps": training.steps,
    }


def _flat(settings: dict) -> dict:
    return {**settings["model"], "batch": settings["batch"], "steps": settings["steps"]}
