"""How the studies' pictures look."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.curves import COLORS

__all__ = ["COLORS", "panels", "save"]


def panels(count: int, *, width: float = 4.8, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """Axes side by side, without the frame's upper and right line."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = [figure.add_subplot(1, count, i + 1) for i in range(count)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
