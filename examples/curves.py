"""The losses on the way: a CSV file and a picture."""

import csv
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.comparison import group
from examples.training import Run

COLORS = {"adamw": "#0072B2", "muon": "#E69F00", "normuon": "#009E73"}  # told apart by all eyes


def write_csv(runs: Sequence[Run], path: Path) -> None:
    """A line for each evaluation of each run."""
    lines = [
        {
            "optimizer": run.optimizer,
            **dataclasses.asdict(run.rates),
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


def draw(runs: Sequence[Run], path: Path, *, title: str, unigram_entropy: float) -> None:
    """Validation loss by step, whole and near its end; the band spans the seeds."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    whole, ending = figure.subplots(1, 2)
    for axes in (whole, ending):
        for name, own in group(runs).items():
            _curve(axes, name, own)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    whole.axhline(unigram_entropy, color="0.4", linestyle=":", label="unigram entropy")
    whole.set_ylabel("validation loss (nats a byte)")
    whole.legend(frameon=False)
    whole.set_title("the whole run", fontsize="medium")
    _zoom_in(ending, runs)
    ending.set_title("its second half", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)


def _curve(axes: Axes, name: str, runs: Sequence[Run]) -> None:
    steps = [evaluation.step for evaluation in runs[0].evaluations]
    losses = [[e.validation_loss for e in run.evaluations] for run in runs]
    by_step = list(zip(*losses, strict=True))
    mean = [statistics.fmean(values) for values in by_step]
    axes.plot(steps, mean, color=COLORS[name], label=name, marker=".", markersize=4)
    if len(runs) > 1:
        low, high = [min(values) for values in by_step], [max(values) for values in by_step]
        axes.fill_between(steps, low, high, color=COLORS[name], alpha=0.2, linewidth=0)


def _zoom_in(axes: Axes, runs: Sequence[Run]) -> None:
    last = runs[0].evaluations[-1].step
    shown = [e.validation_loss for run in runs for e in run.evaluations if e.step >= last / 2]
    margin = 0.05 * (max(shown) - min(shown)) or 0.01
    axes.set_xlim(last / 2, last * 1.02)
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
