"""What would become of every leaf, as a table to be read before training."""

from collections.abc import Sequence
from dataclasses import fields
from itertools import groupby

import jax
import optax

from normuon_core.layout import MatrixView
from normuon_core.recipes import Recipe, find_recipe
from normuon_core.shape_rules import ShapeRule, shape_factor
from normuon_core.table import leaf_table, table, totals_table
from optax_normuon.leaves.layout import LayoutTree, Views, find_routes, overrides_of, views_of
from optax_normuon.leaves.paths import named_leaves
from optax_normuon.leaves.question import (
    ADAMW,
    DOUBT,
    MATRICES,
    leaf_rows,
    printed_matrices,
    question,
)
from optax_normuon.leaves.route import Route
from optax_normuon.mesh.matrix_sharding import Factor, MatrixSharding
from optax_normuon.mesh.specs import Specs, SpecTree, own_shardings, resolve_specs
from optax_normuon.optimizer import normuon
from optax_normuon.plans import Execution, plans
from optax_normuon.totals import totals


def describe(
    params: optax.Params,
    layout: LayoutTree = None,
    *,
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None = None,
    param_specs: SpecTree = None,
    recipe: str | Recipe = "normuon",
    shape_scale: ShapeRule | None = None,
    **keywords,
) -> str:
    """A table of what `normuon` would do with each leaf, to be printed and read before training.

    Layers that are alike take one line. A leaf that can be read in two ways has a "?", and below the
    table stand its readings with a dictionary to paste: `normuon(...).init` would raise. Totals come
    last: for each optimizer its parameters and the bytes of its state over all devices.

    On a mesh a second table is the plan of the step. Matrices of one shape that are divided in the same
    way have a line, which says which engine steps them and where they are orthogonalized: "whole" where
    they lie whole, "owners" where each goes to one device, "shards" where they stay divided and take
    the Gram form. FLOPs are those of one device in the iteration, bytes are what it sends of matrices
    and Gram matrices, both in one step; padding counts matrices of zeros among those of all owners.
    Stacks are stepped one after the other, but the last ones of groups that have the same wave together:
    owners that lack a matrix of one work on another's meanwhile.

    A recipe that no kernel can run is left to XLA; a line says so and why.

    Args:
      params: arrays or abstract arrays.
      layout: as for `normuon`.
      mesh: the mesh; None is the one that is set, or the parameters' own.
      param_specs: as for `normuon`; None reads the parameters' shardings.
      recipe, shape_scale: as for `normuon`; the `scale` column shows the rule's factors.
      **keywords: what else `normuon` is given, so that one set of keywords serves both.

    Returns:
      The tables.

    Raises:
      ValueError, TypeError: as `normuon(...).init` would, save for leaves in doubt.
    """
    chosen = find_recipe(recipe).override(shape_scale=shape_scale)
    name = "Muon" if chosen.neuron_norm is None else "NorMuon"
    routes = find_routes(layout, params)
    views = views_of(routes, params)

    def cells(view: MatrixView) -> list[str]:
        factors = (
            f"{shape_factor(chosen.shape_scale, run.size, view.inputs):.4g}" for run in view.runs
        )
        scale = "rms" if chosen.shape_scale == "rms" else ", ".join(factors)
        return [printed_matrices(view), name, scale]

    header = ["path", "shape", MATRICES, "optimizer", "scale", "why"]
    rest = ADAMW if keywords.get("others") is None else "others"
    rows = leaf_rows(params, routes, cells, rest=rest)
    # Without a single matrix the scale has no cells.
    rows = [[*row[:-1], *[""] * (len(header) - len(row)), row[-1]] for row in rows]
    sections = [leaf_table(header, rows)]
    if param_specs is None:
        param_specs = own_shardings(params)
        if not jax.tree.leaves(param_specs):
            param_specs = None
    names = {field.name for field in fields(Execution)}
    execution = Execution(chosen, **{k: v for k, v in keywords.items() if k in names})
    specs = resolve_specs(param_specs, params, mesh=mesh)
    if specs is not None:
        sections.append(table(_groups(params, views, specs, execution)))
    if execution.backend == "auto" and not execution.support:
        sections.append(f"Engine xla steps all matrices: {execution.support}.")
    if any(found.in_doubt for found in routes.values()):
        sections.append(question(params, routes, overrides_of(layout)))
    # The kernels change nothing in the state, and need not be there to describe it.
    made = {"learning_rate": 1.0, **keywords, "backend": "xla"}
    tx = normuon(recipe=recipe, shape_scale=shape_scale, layout=views, **made)
    optimizers = {path: _optimizer(found, name, rest) for path, found in routes.items()}
    sections.append(totals_table(totals(params, optimizers, tx)))
    return "\n\n".join(sections)


def _optimizer(found: Route, matrices: str, rest: str) -> str:
    if found.layout is not None:
        return matrices
    return DOUBT if found.in_doubt else rest


def _groups(
    params: optax.Params, views: Views, specs: Specs, execution: Execution
) -> list[list[str]]:
    """One line for each group of matrices of every engine, from the plan that the step makes."""
    leaves = {path: leaf for path, _, leaf in named_leaves(params) if path in views}
    header = ["matrices x (rows, columns)", "divided over", "engine", "strategy", "owners"]
    rows = [[*header, "a device's", "padding", "stacks", "wave", "FLOPs a device", "bytes sent"]]
    for engine, stacks in plans(execution, leaves, views, specs).items():
        for key, group in groupby(stacks, key=lambda stack: stack.key):
            alike = list(group)
            first, wave = alike[0], alike[-1].wave
            placement = first.placement
            rows.append(
                [
                    f"{first.group_size} x ({key.rows}, {key.columns})",
                    _divided(key.sharding),
                    engine,
                    placement.strategy,
                    str(placement.owners),
                    str(placement.each),
                    str(placement.padding),
                    str(len(alike)),
                    "-" if wave is None else str(wave + 1),
                    f"{placement.operations:.3g}",
                    f"{placement.bytes_sent:.3g}",
                ]
            )
    return rows


def _divided(sharding: MatrixSharding | None) -> str:
    if sharding is None:
        return ""
    batch = f"batch {'+'.join(sharding.batch)}; " if sharding.batch else ""
    return f"{batch}{_side(sharding.rows)} x {_side(sharding.columns)}"


def _side(side: Sequence[Factor]) -> str:
    return "+".join(axis for _, axes in side for axis in axes) or "-"
