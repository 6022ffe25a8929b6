"""How the studies' pictures look."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.curves import COLORS

__all__ = ["COLORS", "panels", "save"]


def panels(count: int, *, width: float = 4.8, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """Axes, at most three side by side, without the frame's upper and right line."""
    rows, columns = math.ceil(count / 3), min(count, 3)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
