"""What would become of every leaf, as a table to be read before training."""

from collections.abc import Sequence

import jax
import numpy as np

from normuon_core.recipes import find_recipe
from normuon_core.shape_rules import check_shape_rule, shape_factor
from optax_normuon.layout import LayoutTree, find_routes, resolve_layouts
from optax_normuon.orthogonalization import orthogonalization_stage
from optax_normuon.paths import named_leaves
from optax_normuon.sharding import Cut, Factor
from optax_normuon.specs import Specs, SpecTree, own_shardings, resolve_specs
from optax_normuon.stacking import place_groups, place_leaf, stack_ceiling


def describe(
    params,
    layout: LayoutTree = None,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    param_specs: SpecTree = None,
    shape_scale: str = "original",
) -> str:
    """A table of what `normuon` would do with each leaf, to be printed and read before training.

    On a mesh a second table says where the matrices are orthogonalized, by groups that are alike in
    shape and in how they are divided: "whole" where they lie whole, "owners" one device for each,
    "shards" divided in the Gram form. FLOPs are one device's in the iteration, bytes what it sends of
    matrices and Gram matrices, both a step; padding is matrices of zeros among those of all owners.

    Args:
      params: arrays or abstract arrays.
      layout: as for `normuon`.
      mesh: the mesh; None is the one that is set, or the parameters' own.
      param_specs: as for `normuon`; None reads the parameters' shardings.
      shape_scale: the rule whose factors the `scale` column shows.

    Returns:
      One line a leaf: path, shape, matrices x (out, in), optimizer, scale, and why; on a mesh one line a
      group as well.

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
        runs, inputs = view.runs, view.inputs
        matrices = " + ".join(f"{view.matrices(run)} x ({run.size}, {inputs})" for run in runs)
        factors = ", ".join(f"{shape_factor(rule, run.size, inputs):.4g}" for run in runs)
        scale = "rms" if rule == "rms" else factors
        rows.append([name, printed, matrices, "NorMuon", scale, found.why])
    if param_specs is None:
        param_specs = own_shardings(params)
        if not jax.tree.leaves(param_specs):
            param_specs = None
    specs = resolve_specs(param_specs, params, mesh=mesh)
    if specs is None:
        return _table(rows)
    return f"{_table(rows)}\n\n{_table(_groups(params, layout, specs))}"


def _groups(params, layout: LayoutTree, specs: Specs) -> list[list[str]]:
    stage = orthogonalization_stage(
        **vars(find_recipe("normuon").polar), compute_dtype=None, algorithm="auto", backend="auto"
    )
    views = resolve_layouts(layout, params)
    leaves = [(path, leaf) for path, _, leaf in named_leaves(params) if path in views]
    groups = place_groups(
        stage,
        {i: place_leaf(views[path], path, specs) for i, (path, _) in enumerate(leaves)},
        {i: leaf.dtype for i, (_, leaf) in enumerate(leaves)},
        specs,
        ceiling=stack_ceiling(None),
    )
    header = ["matrices x (rows, columns)", "divided over", "strategy", "owners", "a device's"]
    rows = [[*header, "padding", "FLOPs a device", "bytes sent"]]
    for group, placement, stacks in groups:
        count = sum(piece.stop - piece.start for stack in stacks for piece in stack)
        rows.append(
            [
                f"{count} x ({group.rows}, {group.columns})",
                _divided(group.cut),
                placement.strategy,
                str(placement.owners),
                str(placement.each),
                str(placement.padding),
                f"{placement.operations:.3g}",
                f"{placement.bytes_sent:.3g}",
            ]
        )
    return rows


def _divided(cut: Cut | None) -> str:
    if cut is None:
        return ""
    batch = f"batch {'+'.join(cut.batch)}; " if cut.batch else ""
    return f"{batch}{_side(cut.rows)} x {_side(cut.columns)}"


def _side(side: Sequence[Factor]) -> str:
    return "+".join(axis for _, axes in side for axis in axes) or "-"


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
