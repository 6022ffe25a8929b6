"""What the runs say: losses over seeds, paired differences, steps to AdamW's final loss."""

import itertools
import statistics
from collections.abc import Sequence

from rich.table import Table

from examples.curves import grouped
from examples.presets import Rates
from examples.runs import Run
from examples.tuning import Grid

MISSING = "–"


def steps_to_reach(run: Run, loss: float) -> float | None:
    """Where the validation curve, straight between evaluations, first is at `loss`; None: nowhere.

    A run that ends lower may still get there late: until its rate has decayed a loss is higher than
    the same weights would show soon after.
    """
    for before, after in itertools.pairwise(run.evaluations):
        if after.validation_loss <= loss:
            part = (before.validation_loss - loss) / (
                before.validation_loss - after.validation_loss
            )
            return before.step + part * (after.step - before.step)
    return None


def result_table(runs: Sequence[Run]) -> Table:
    """A row for each optimizer: mean and spread over its seeds."""
    table = Table(
        title="Validation loss in nats, at the end of the decay",
        caption="Times are of training alone, without compilation and evaluation.",
    )
    for heading in (
        "optimizer",
        "learning rate",
        "AdamW beside",
        "final loss",
        "spread",
        "steps to AdamW's",
        "ms a step",
        "seconds a run",
    ):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    by_name = grouped(runs)
    for name, own in by_name.items():
        final = [run.final_loss for run in own]
        rates = own[0].settings["optimizer"]
        table.add_row(
            name,
            *rate_cells(Rates(rates["learning_rate"], rates.get("adam_learning_rate"))),
            f"{statistics.fmean(final):.4f}",
            spread(final),
            _steps_cell(own, by_name.get("adamw", [])),
            f"{1e3 * statistics.median(run.step_seconds for run in own):.0f}",
            f"{statistics.fmean(run.evaluations[-1].seconds for run in own):.0f}",
        )
    return table


def difference_table(runs: Sequence[Run]) -> Table:
    """A row for each two optimizers: the difference of their final losses, seed by seed."""
    table = Table(title="Difference of final losses, paired by seed")
    for heading in ("pair", "mean", "spread", "lower in"):
        table.add_column(heading, justify="left" if heading == "pair" else "right")
    for (first, ones), (second, others) in itertools.combinations(grouped(runs).items(), 2):
        differences = [b.final_loss - a.final_loss for a, b in zip(ones, others, strict=True)]
        lower = sum(difference < 0 for difference in differences)
        table.add_row(
            f"{second} − {first}",
            f"{statistics.fmean(differences):+.4f}",
            spread(differences),
            f"{lower} of {len(differences)} seeds",
        )
    return table


def grid_table(grid: Grid) -> Table:
    """A row for each run of the learning-rate search, and which one each optimizer will use."""
    table = Table(title=f"Learning-rate grid, seed {grid.seed}")
    for heading in ("optimizer", "learning rate", "AdamW beside", "final loss", ""):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for point in grid.points:
        table.add_row(
            point.optimizer,
            *rate_cells(point.rates),
            "diverged" if point.validation_loss is None else f"{point.validation_loss:.4f}",
            "best" if point.rates == grid.best(point.optimizer) else "",
        )
    return table


def rate_cells(rates: Rates) -> tuple[str, str]:
    """Learning rate, and that of the AdamW beside it."""
    beside = rates.adam_learning_rate
    return f"{rates.learning_rate:g}", MISSING if beside is None else f"{beside:g}"


def spread(values: Sequence[float]) -> str:
    """Sample standard deviation, which takes two values."""
    return f"{statistics.stdev(values):.4f}" if len(values) > 1 else MISSING


def _steps_cell(own: Sequence[Run], adamw: Sequence[Run]) -> str:
    reached = [
        steps
        for run, other in zip(own, adamw, strict=False)
        if (steps := steps_to_reach(run, other.final_loss)) is not None
    ]
    if len(reached) < len(own):
        return MISSING
    return f"{statistics.fmean(reached):.0f}"
