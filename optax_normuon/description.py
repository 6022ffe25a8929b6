"""What would become of every leaf, as a table to be read before training."""

import numpy as np

from normuon_core.shape_rules import check_shape_rule, shape_factor
from optax_normuon.layout import LayoutTree, find_routes
from optax_normuon.paths import named_leaves


def describe(params, layout: LayoutTree = None, *, shape_scale: str = "original") -> str:
    """A table of what `normuon` would do with each leaf, to be printed and read before training.

    Args:
      params: arrays or abstract arrays.
      layout: as for `normuon`.
      shape_scale: the rule whose factors the `scale` column shows.

    Returns:
      One line a leaf: path, shape, matrices x (out, in), optimizer, scale, and why.

    Raises:
      ValueError, TypeError: as `normuon(...).init` would.
    """
    rule = check_shape_rule(shape_scale)
    rows = [["path", "shape", "matrices x (out, in)", "optimizer", "scale", "why"]]
    routes = find_routes(layout, params)
    for path, name, leaf in named_leaves(params):
        shape = np.shape(leaf)
        printed = "x".join(map(str, shape)) or "()"
        found = routes[path]
        if found.layout is None:
            rows.append([name, printed, "", "AdamW", "", found.why])
            continue
        view = found.layout.on(shape, name)
        sizes, inputs = view.output_sizes, view.inputs
        matrices = " + ".join(f"{view.stack_shape[0]} x ({size}, {inputs})" for size in sizes)
        factors = ", ".join(f"{shape_factor(rule, size, inputs):.4g}" for size in sizes)
        scale = "rms" if rule == "rms" else factors
        rows.append([name, printed, matrices, "NorMuon", scale, found.why])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
