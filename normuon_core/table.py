"""Tables that people read before they train: columns in line, identical layers folded, totals below."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

Row = Sequence[str]

# A number that counts layers is a part of the path by itself: `layers/0`, `Block_0`, `h.0`; `fc1` and
# `fc2` are names.
_INDEX = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def table(rows: Sequence[Row]) -> str:
    """`rows` as text with the columns in line; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    ruled = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in ruled
    )


def leaf_table(header: Row, rows: Sequence[Row]) -> str:
    """One line a leaf, or one for leaves that are alike; these have a column `leaves` with their number.

    Args:
      header: the columns' names; the first column is the path.
      rows: one a leaf.
    """
    folded = fold(rows)
    if all(count == 1 for _, count in folded):
        return table([header, *rows])
    counted = [[row[0], str(count), *row[1:]] for row, count in folded]
    return table([[header[0], "leaves", *header[1:]], *counted])


def fold(rows: Sequence[Row]) -> list[tuple[list[str], int]]:
    """Rows that differ only in the indices within their paths, as one row, and how many it stands for.

    `layers/0/up` to `layers/11/up` become `layers/{0..11}/up`; with two indices the folded path stands
    for every combination of them. A folded row takes the place of its first.

    Args:
      rows: without header; the first cell is the path.
    """
    return [(row, len(members)) for row, members in fold_members(rows)]


def fold_members(rows: Sequence[Row]) -> list[tuple[list[str], list[int]]]:
    """As `fold`, with the places in `rows` of those that a folded row stands for."""
    alike: dict[tuple[str, ...], list[tuple[int, str]]] = {}
    for position, (path, *cells) in enumerate(rows):
        alike.setdefault((_INDEX.sub("{}", path), *cells), []).append((position, path))
    found: list[tuple[list[str], list[int]]] = []
    for (_, *cells), places in alike.items():
        positions = {tuple(_INDEX.findall(path)): position for position, path in places}
        between = _INDEX.split(places[0][1])
        for sets in _products(list(positions)):
            members = sorted(positions[indices] for indices in itertools.product(*sets))
            braced = [_braced(values) for values in sets]
            path = "".join(map("".join, itertools.zip_longest(between, braced, fillvalue="")))
            found.append(([path, *cells], members))
    return sorted(found, key=lambda entry: entry[1][0])


def _products(indices: list[tuple[str, ...]]) -> list[tuple[tuple[str, ...], ...]]:
    """Tuples of equal length as a disjoint union of products of sets, the first axis split last."""
    if not indices[0]:
        return [()]
    rests: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in indices:
        rests.setdefault(first, []).append(tuple(rest))
    with_rest: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first, rest in rests.items():
        with_rest.setdefault(frozenset(rest), []).append(first)
    return [
        (tuple(sorted(firsts, key=int)), *sets)
        for rest, firsts in with_rest.items()
        for sets in _products(sorted(rest))
    ]


def _braced(values: tuple[str, ...]) -> str:
    """`3` as it is; 0, 1, 2, 5 as `{0..2,5}`."""
    if len(values) == 1:
        return values[0]
    runs: list[list[str]] = []
    for value in values:
        if runs and int(value) == int(runs[-1][-1]) + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(_run(run) for run in runs) + "}"


def _run(run: list[str]) -> str:
    return run[0] if len(run) == 1 else f"{run[0]}{',' if len(run) == 2 else '..'}{run[-1]}"


class Total(NamedTuple):
    """What one optimizer trains: `state` has the bytes of each kind of state (momentum, ...)."""

    optimizer: str
    leaves: int
    parameters: int
    state: Mapping[str, int]


def totals_table(totals: Sequence[Total]) -> str:
    """For each optimizer its leaves, parameters, their share of all, and the bytes of its state."""
    everything = sum(total.parameters for total in totals)
    rows: list[Row] = [["optimizer", "leaves", "parameters", "share", "state bytes", "of which"]]
    for total in totals:
        kinds = [f"{kind} {size:,}" for kind, size in total.state.items() if size]
        rows.append(
            [
                total.optimizer,
                f"{total.leaves:,}",
                f"{total.parameters:,}",
                f"{total.parameters / max(everything, 1):.1%}",
                f"{sum(total.state.values()):,}",
                ", ".join(kinds),
            ]
        )
    return table(rows)
