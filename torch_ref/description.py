"""What would become of every parameter of a model, as a table to be read before training."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from normuon_core import MatrixView, Recipe, find_recipe
from normuon_core.shape_rules import ShapeRule, shape_factor
from normuon_core.table import Total, leaf_table, totals_table
from torch_ref.leaves.routing import Layouts, Owned, Route, question, route
from torch_ref.optimizer import NorMuon
from torch_ref.parameter_groups import check_options, grouped, optimizer_of, printed_shape

_HEADER = ["path", "shape", "matrices x (out, in)", "optimizer", "scale", "why"]

_KINDS = {"exp_avg": "first moment", "exp_avg_sq": "second moment"}


def describe(
    model: nn.Module,
    *,
    layouts: Layouts | None = None,
    recipe: str | Recipe = "normuon",
    shape_scale: ShapeRule | None = None,
    **keywords: Any,
) -> str:
    """A table of what `NorMuon(param_groups(model, ...))` would do, to be read before training.

    Layers that are alike take one line. A parameter that can be read in more than one way has a "?",
    and below the table stand its readings with a dictionary to paste: `param_groups` would raise. Then
    come totals: for each optimizer its parameters and the bytes of its state, over all ranks.

    Args:
      model: its parameters may lie on any device, "meta" too.
      layouts, recipe, shape_scale, **keywords: as for `param_groups`; `lr` and `adam_lr` may be among
        them.

    Returns:
      The tables.

    Raises:
      ValueError, TypeError: as `NorMuon(param_groups(...))`, save for parameters in doubt.
    """
    rates = {key: keywords.pop(key, 1.0) for key in ("lr", "adam_lr")}
    check_options(keywords)
    chosen = find_recipe(recipe).override(shape_scale=shape_scale)
    name = "Muon" if chosen.neuron_norm is None else "NorMuon"
    routes = route(model, layouts)
    sections = [leaf_table(_HEADER, [_row(each, found, chosen, name) for each, found in routes])]
    if asked := question(routes):
        sections.append(asked)
    keywords |= {"recipe": recipe, "shape_scale": shape_scale}
    sections.append(totals_table(_totals(routes, name, rates, keywords)))
    return "\n\n".join(sections)


def _row(each: Owned, found: Route, recipe: Recipe, name: str) -> list[str]:
    cells = ["", optimizer_of(found, name), ""]
    if found.layout is not None:
        view = found.layout.on(tuple(each.param.shape), each.name)
        cells = [_matrices(view), name, _scale(view, recipe.shape_scale)]
    return [each.name, printed_shape(each.param), *cells, found.why]


def _matrices(view: MatrixView) -> str:
    """`3 x (20, 12)`: how many matrices, output neurons by inputs."""
    return " + ".join(f"{view.matrices(run)} x ({run.size}, {view.inputs})" for run in view.runs)


def _scale(view: MatrixView, rule: ShapeRule) -> str:
    if rule == "rms":
        return rule
    sizes = [run.size for run in view.runs]
    factors = [f"{shape_factor(rule, size, view.inputs):.4g}" for size in sizes]
    return factors[0] if len({*factors}) == 1 else ", ".join(factors)


def _totals(
    routes: list[tuple[Owned, Route]], name: str, rates: dict[str, Any], keywords: dict[str, Any]
) -> list[Total]:
    """The bytes are those of the state that a step makes, taken where nothing is computed or kept."""
    members: dict[str, list[torch.Tensor]] = {}
    without_data: list[tuple[Owned, Route]] = []
    for each, found in routes:
        param = nn.Parameter(torch.empty(each.param.shape, dtype=each.param.dtype, device="meta"))
        param.grad = torch.empty_like(param)
        members.setdefault(optimizer_of(found, name), []).append(param)
        without_data.append((each._replace(param=param), found))
    # The state is the same whatever orthogonalizes, and however.
    keywords = {**keywords, "backend": "eager", "orthogonalizer": lambda stack: stack}
    groups = grouped(without_data, **rates, keywords=keywords)
    made: Mapping[torch.Tensor, Mapping[str, Any]] = {}
    if groups:
        optimizer = NorMuon(groups, lr=1.0)
        optimizer.step()
        made = optimizer.state
    totals = []
    for kind, params in members.items():
        state: dict[str, int] = {}
        for key, value in chain.from_iterable(made[p].items() for p in params if p in made):
            for array in value if isinstance(value, list) else [value]:
                if key != "step":
                    part = _state_kind(key)
                    state[part] = state.get(part, 0) + array.numel() * array.element_size()
        totals.append(Total(kind, len(params), sum(p.numel() for p in params), state))
    return totals


def _state_kind(key: str) -> str:
    key = key.partition(".")[0]
    return _KINDS.get(key, key.replace("_", " "))
