"""Tables and the picture of what was measured.

`python -m benchmarks.report --out FOLDER` renders them anew, as when FOLDER/cards got another file.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib
import typer
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import cards
from benchmarks.cards import Card, Part
from benchmarks.ratios import Measured
from benchmarks.rows import Row


def write(folder: Path) -> bool:
    """results.md and results.png of every GPU whose results are in folder/cards.

    Returns whether there was anything to draw.
    """
    found = cards.load(folder)
    (folder / "results.md").write_text(markdown(found))
    return draw(folder / "results.png", found)


def columns(base: str) -> list[str]:
    return [
        *("what", "implementation", "ms", "quartiles", f"over {base}"),
        *("share", "TFLOP/s", "more"),
    ]


def cells(row: Row, base: float | None) -> list[str]:
    """A row as text; `base` is the time that its own is divided by."""
    if row.milliseconds is None:
        return [row.what, row.who, "-", "", "", "", "", row.reason or ""]
    quartiles = "" if row.quartiles is None else "–".join(f"{each:.2f}" for each in row.quartiles)
    ratio = f"{row.milliseconds / base:.2f}" if base else ""
    share = "" if row.share is None else f"{row.share:.2f}"
    teraflops = "" if row.teraflops is None else f"{row.teraflops:.0f}"
    more = ", ".join(f"{name} {value:.2f}" for name, value in row.more.items())
    time = f"{row.milliseconds:.2f}"
    return [row.what, row.who, time, quartiles, ratio, share, teraflops, more]


def lines(rows: Sequence[Row], base: str) -> list[list[str]]:
    """Every row as text, its time over that of the row's own base, else of `base`, on its workload."""
    times = {(row.what, row.who): row.milliseconds for row in rows}
    return [cells(row, times.get((row.what, row.base or base))) for row in rows]


def ratio_lines(ratios: Sequence[Measured]) -> list[list[str]]:
    return [
        [each.what, each.name, f"{each.median:.3f}", "–".join(f"{q:.3f}" for q in each.quartiles)]
        for each in ratios
    ]


def tables(part: Part) -> Iterator[Table]:
    """A part's rows, and its ratios if it has any. `share`: of the reference, which is 1."""
    yield _table(part.title, columns(part.base), lines(part.rows, part.base))
    if part.ratios:
        yield _table(f"{part.title}, ratios", RATIOS, ratio_lines(part.ratios))


RATIOS = ["what", "ratio", "median", "quartiles"]
"""Columns of a table of ratios."""


def markdown(found: Mapping[str, Card]) -> str:
    """The results of every GPU, for a file."""
    text = ["# Benchmarks", ""]
    for device, card in found.items():
        text += [f"## {device}", ""]
        for part in card.values():
            text += [f"### {part.title}", ""]
            text += [f"- {name}: {_short(value)}" for name, value in part.machine.items()]
            text += [
                f"- {race}: " + ", ".join(f"{name} {_span(span)}" for name, span in spans.items())
                for race, spans in part.clocks.items()
            ]
            text += ["", *_markdown(columns(part.base), lines(part.rows, part.base)), ""]
            if part.ratios:
                text += [*_markdown(RATIOS, ratio_lines(part.ratios)), ""]
    return "\n".join(text)


def _short(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _span(span: Sequence[float]) -> str:
    """(least, median, largest) as the median and the range."""
    least, middle, most = span
    return f"{middle:.0f} ({least:.0f}–{most:.0f})"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    result = Table(*head, title=title)
    for line in rows:
        result.add_row(*line)
    return result


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    text = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return text + ["| " + " | ".join(line) + " |" for line in rows]


def draw(path: Path, found: Mapping[str, Card]) -> bool:
    """Horizontal bars, a line of panels for each GPU: times as multiples of the reference.

    The dashed line is the reference itself: the arithmetic and the bytes at the machine's own rates.
    Without one there is nothing to draw, and an older picture is taken away. Returns whether it drew.
    """
    matplotlib.use("agg")
    drawn = {
        device: {part.title: rows for part in card.values() if (rows := _with_a_share(part))}
        for device, card in found.items()
    }
    drawn = {device: panels for device, panels in drawn.items() if panels}
    if not drawn:
        path.unlink(missing_ok=True)
        return False
    heights = [max(map(_height, panels.values())) for panels in drawn.values()]
    columns = max(map(len, drawn.values()))
    size = (9 * columns, 1.2 * len(heights) + 0.2 * sum(heights))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(
        len(drawn),
        columns,
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    names = dict.fromkeys(
        row.who for panels in drawn.values() for rows in panels.values() for row in rows
    )
    colours = {name: matplotlib.color_sequences["tab20"][i % 20] for i, name in enumerate(names)}
    for line, (device, panels) in zip(axes, drawn.items(), strict=True):
        for axis in line[len(panels) :]:
            axis.set_axis_off()
        for axis, (title, rows) in zip(line, panels.items(), strict=False):
            _draw_panel(axis, rows, colours)
            axis.set_title(f"{title}, {device}")
    figure.savefig(path, dpi=120)
    return True


def _with_a_share(part: Part) -> list[Row]:
    return [row for row in part.rows if row.share]


def _height(rows: Sequence[Row]) -> float:
    return sum(len(_of(rows, what)) + 1.6 for what in _whats(rows))


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


def main(
    out: Annotated[Path, typer.Option(help="Folder that has cards/ and gets the report.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Render the results of every GPU in a folder."""
    write(out)


if __name__ == "__main__":
    typer.run(main)
