"""The question about the leaves in doubt: one for all of them, with an answer to paste."""

import fnmatch
import glob
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import optax

from normuon_core.layout import MatrixView
from normuon_core.table import fold_members, leaf_table
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.route import LeafLayout, Route, as_matrix_layout

MATRICES = "matrices x (out, in)"
ADAMW, DOUBT = "AdamW", "?"


def refuse_doubts(
    params: optax.Params,
    routes: Mapping[KeyPath, Route],
    overrides: Mapping[str, LeafLayout] | None = None,
) -> None:
    """Refuses routes that leave a leaf in doubt.

    Raises:
      ValueError: one for all leaves in doubt, with the whole table, the readings, and a dictionary to
        paste.
    """
    doubts = sum(found.in_doubt for found in routes.values())
    if not doubts:
        return
    header = ["path", "shape", MATRICES, "optimizer", "why"]
    rows = leaf_rows(params, routes, lambda view: [printed_matrices(view), "matrices"])
    leaves = "1 leaf" if doubts == 1 else f"{doubts} leaves"
    raise ValueError(
        f"{leaves} can be read in more than one way, and a guess would train the wrong thing.\n\n"
        f"{leaf_table(header, rows)}\n\n{question(params, routes, overrides)}"
    )


def leaf_rows(
    params: optax.Params,
    routes: Mapping[KeyPath, Route],
    cells: Callable[[MatrixView], list[str]],
    *,
    rest: str = ADAMW,
) -> list[list[str]]:
    """One row a leaf: path, shape, matrices and optimizer (and what more `cells` makes), and why.

    Args:
      params: arrays or abstract arrays.
      routes: of every leaf.
      cells: those of a leaf that is a matrix; a leaf that is none has as many.
      rest: what the optimizer of leaves that are no matrices is called.
    """
    rows = []
    for path, name, leaf in named_leaves(params):
        shape, found = np.shape(leaf), routes[path]
        if found.layout is None:
            own = ["", DOUBT if found.in_doubt else rest]
        else:
            own = cells(found.layout.on(shape, name))
        rows.append([name, "x".join(map(str, shape)) or "()", *own, found.why])
    columns = max(map(len, rows), default=0)
    return [[*row[:-1], *[""] * (columns - len(row)), row[-1]] for row in rows]


def printed_matrices(view: MatrixView) -> str:
    """`3 x (20, 12)`: how many matrices, output neurons by inputs."""
    return " + ".join(f"{view.matrices(run)} x ({run.size}, {view.inputs})" for run in view.runs)


def question(
    params: optax.Params,
    routes: Mapping[KeyPath, Route],
    overrides: Mapping[str, LeafLayout] | None = None,
) -> str:
    """The readings of every leaf in doubt, and one dictionary that answers for all."""
    leaves = named_leaves(params)
    names = [name for _, name, _ in leaves]
    doubts = {name: (np.shape(leaf), routes[path]) for path, name, leaf in leaves}
    doubts = {name: doubt for name, doubt in doubts.items() if doubt[1].in_doubt}
    rows = [[name, str(shape), found.why] for name, (shape, found) in doubts.items()]
    lines: list[str] = []
    entries = [
        (repr(pattern), _written(pattern, chosen), "")
        for pattern, chosen in (overrides or {}).items()
    ]
    for (path, shape, _), members in fold_members(rows):
        own = [rows[member][0] for member in members]
        readings = doubts[own[0]][1].readings
        number = f" ({len(own)} leaves)" if len(own) > 1 else ""
        lines.append(f"{path}: shape {shape}{number} can be read in {len(readings)} ways:")
        lines += [f"  {reading.meaning}: {reading.layout}" for reading in readings]
        first = readings[0]
        for pattern in _patterns(own, names):
            entries.append((repr(pattern), _written(pattern, first.layout), first.meaning))
    lines.append("Say which, for example with")
    if len(entries) == 1:
        ((pattern, written, _),) = entries
        lines.append(f"  layout=optax_normuon.layout_by_path({{{pattern}: {written}}})")
    else:
        lines.append("  layout=optax_normuon.layout_by_path({")
        for pattern, written, meaning in entries:
            lines.append(f"      {pattern}: {written},{f'  # {meaning}' if meaning else ''}")
        lines.append("  })")
    lines.append("or give None in a layout's place to leave the leaf to AdamW.")
    return "\n".join(lines)


def _written(name: str, layout: LeafLayout) -> str:
    return "None" if layout is None else f"optax_normuon.{as_matrix_layout(name, layout)}"


def _patterns(own: Sequence[str], names: Sequence[str]) -> list[str]:
    """One pattern that meets the leaves `own` and no others; where there is none, one for each leaf."""
    wholes = [re.split(r"(\d+)", name) for name in own]
    if len(own) > 1 and len({len(whole) for whole in wholes}) == 1:
        columns = [set(column) for column in zip(*wholes, strict=True)]
        pattern = "".join("*" if len(p) > 1 else glob.escape(next(iter(p))) for p in columns)
        if {name for name in names if fnmatch.fnmatchcase(name, pattern)} == set(own):
            return [pattern]
    return [glob.escape(name) for name in own]
