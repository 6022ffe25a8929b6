"""Tables and the picture of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.rows import Row


def columns(base: str) -> list[str]:
    return ["what", "implementation", "ms", f"over {base}", "share", "TFLOP/s", "more"]


def cells(row: Row, base: float | None) -> list[str]:
    """A row as text; `base` is the time that its own is divided by."""
    if row.failure is not None:
        return [row.what, row.who, "-", "", "", "", row.failure]
    assert row.milliseconds is not None
    ratio = f"{row.milliseconds / base:.2f}" if base else ""
    share = "" if row.share is None else f"{row.share:.2f}"
    teraflops = "" if row.teraflops is None else f"{row.teraflops:.0f}"
    more = ", ".join(f"{name} {value:.2f}" for name, value in row.more.items())
    return [row.what, row.who, f"{row.milliseconds:.2f}", ratio, share, teraflops, more]


def lines(rows: Sequence[Row], base: str) -> list[list[str]]:
    """Every row as text, its time over that of the implementation `base` on the same workload."""
    own = {row.what: row.milliseconds for row in rows if row.who == base}
    return [cells(row, own.get(row.what)) for row in rows]


def table(title: str, rows: Sequence[Row], base: str) -> Table:
    """`share`: of the reference, which is 1."""
    result = Table(*columns(base), title=title)
    for line in lines(rows, base):
        result.add_row(*line)
    return result


def markdown(title: str, rows: Sequence[Row], base: str) -> str:
    """The same as `table`, for a file."""
    head = columns(base)
    text = [f"## {title}", "", "| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    text += ["| " + " | ".join(line) + " |" for line in lines(rows, base)]
    return "\n".join(text) + "\n"


def draw(path: Path, panels: Mapping[str, Sequence[Row]]) -> bool:
    """Horizontal bars, a panel for each kind of workload: times as multiples of the reference.

    The dashed line is the reference itself: the arithmetic and the bytes at the machine's own rates.
    Without one there is nothing to draw, and an older picture is taken away. Returns whether it drew.
    """
    matplotlib.use("agg")
    found = {title: [row for row in rows if row.share] for title, rows in panels.items()}
    found = {title: rows for title, rows in found.items() if rows}
    if not found:
        path.unlink(missing_ok=True)
        return False
    heights = [sum(len(_of(rows, what)) + 1.6 for what in _whats(rows)) for rows in found.values()]
    figure = Figure(figsize=(12, 1.2 + 0.2 * max(heights)), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    names = list(dict.fromkeys(row.who for rows in found.values() for row in rows))
    colours = {name: matplotlib.color_sequences["tab20"][i % 20] for i, name in enumerate(names)}
    for axis, (title, rows) in zip(axes, found.items(), strict=True):
        _draw_panel(axis, rows, colours)
        axis.set_title(title)
    figure.savefig(path, dpi=120)
    return True


def _draw_panel(axis, rows: Sequence[Row], colours) -> None:
    height, ticks = 0.0, []
    for what in _whats(rows):
        for row in _of(rows, what):
            assert row.share is not None
            axis.barh(height, 1 / row.share, height=0.85, color=colours[row.who])
            label = f" {row.who}, {row.milliseconds:.3g} ms"
            axis.text(1 / row.share, height, label, va="center", fontsize=7)
            height += 1
        ticks.append((height - 0.5 - len(_of(rows, what)) / 2, what))
        height += 1.6
    axis.axvline(1, color="black", linestyle="--", linewidth=1)
    axis.set_yticks([place for place, _ in ticks], [what for _, what in ticks])
    axis.set_xlabel("time over the reference")
    largest = max(1 / row.share for row in rows if row.share)
    axis.set_xlim(0, 1.55 * largest)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)


def _whats(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.what for row in rows))


def _of(rows: Sequence[Row], what: str) -> list[Row]:
    return [row for row in rows if row.what == what]
