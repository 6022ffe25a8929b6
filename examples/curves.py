"""Curves of any set of runs: a CSV file, and a picture over steps and over time."""

import csv
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from examples.errors import BadInput
from examples.runs import OUT, Evaluation, Run, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Told apart by all eyes (Okabe and Ito).
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
DROP = 0.8  # of the way down that is left out of the picture: it looks the same for every run


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw the validation losses of runs, and print a table of them."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs; runs of one optimizer and several seeds make one curve with a band."""
    output: Path = OUT / "curves.png"
    """The picture."""


def plot(config: Plot) -> Path:
    """Draws it.

    Raises:
      BadInput: no runs, or a folder that is none.
    """
    if not config.runs:
        raise BadInput("give the folders of the runs to draw.")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    draw([read_run(folder) for folder in config.runs], config.output)
    return config.output


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """A line for each evaluation of each run."""
    lines = [
        {
            "optimizer": run.optimizer,
            "learning_rate": run.settings["optimizer"]["learning_rate"],
            "adam_learning_rate": run.settings["optimizer"].get("adam_learning_rate"),
            "seed": run.seed,
            **dataclasses.asdict(evaluation),
        }
        for run in runs
        for evaluation in run.evaluations
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def draw(runs: Sequence[Run], path: Path, *, title: str = "") -> None:
    """Validation loss by step and by time, from where the first drop is over; a band spans the seeds."""
    from matplotlib.figure import Figure  # Here: it takes a second to import.

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    curves = grouped(runs)
    for color, (label, own) in zip(_colors(len(curves)), curves.items(), strict=True):
        _curve(by_step, lambda e: e.step, label, own, color)
        _curve(by_time, lambda e: e.seconds, label, own, color)
    highest, lowest = _after_the_drop(runs)
    margin = 0.05 * (highest - lowest) or 0.01
    by_step.set_ylim(lowest - margin, highest + margin)
    by_step.set_ylabel("validation loss (nats)")
    by_step.set_xlabel("step")
    by_time.set_xlabel("seconds of training, without compilation and evaluation")
    by_time.legend(frameon=False)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Curves by label, in order of first appearance: an optimizer's runs over seeds, in order of seeds.

    Where an optimizer has two runs of one seed, every run is a curve of its own, named as its folder.
    """
    labels = [(run.optimizer, run.seed) for run in runs]
    alone = len(set(labels)) < len(labels)
    result: dict[str, list[Run]] = {}
    for run in runs:
        result.setdefault(run.name if alone else run.optimizer, []).append(run)
    return {label: sorted(own, key=lambda run: run.seed) for label, own in result.items()}


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _curve(
    axes: "Axes", where: Callable[[Evaluation], float], label: str, runs: list[Run], color: str
) -> None:
    """The mean of the runs, at the mean of their places, as far as all of them go."""
    both = list(zip(*(run.evaluations for run in runs), strict=False))
    places = [statistics.fmean(where(e) for e in at) for at in both]
    losses = [[e.validation_loss for e in at] for at in both]
    mean = [statistics.fmean(at) for at in losses]
    axes.plot(places, mean, color=color, label=label, marker=".", markersize=4)
    if len(runs) > 1:
        low, high = [min(at) for at in losses], [max(at) for at in losses]
        axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)


def _after_the_drop(runs: Sequence[Run]) -> tuple[float, float]:
    """(highest, lowest) loss to show."""
    losses = [[e.validation_loss for e in run.evaluations] for run in runs]
    lowest = min(map(min, losses))
    highest = max(own[0] for own in losses)
    return lowest + (1 - DROP) * (highest - lowest), lowest
