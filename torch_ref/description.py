"""How every parameter of a model would be trained, as tables to be read before training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import nn

from normuon_core import MatrixView, Recipe, find_recipe
from normuon_core.kernels_support import kernels_support
from normuon_core.shape_rules import ShapeRule, shape_factor
from normuon_core.table import Total, leaf_table, table, totals_table
from torch_ref.checkpoint import ParameterState
from torch_ref.kernels.backend import Backend, check_backend
from torch_ref.leaves.dtensor import is_dtensor
from torch_ref.leaves.dtypes import dtype_name
from torch_ref.leaves.group_keys import MATRIX
from torch_ref.leaves.groups import group_recipe, parameter_view, whole_part
from torch_ref.leaves.routing import Layouts, Owned, Route, question, route
from torch_ref.matrices.plan import E, PlannedStack
from torch_ref.optimizer import NorMuon
from torch_ref.parameter_groups import check_options, grouped, optimizer_of, printed_shape
from torch_ref.stages.stack import StackStages
from torch_ref.steps.plan import GroupSpec, Run, WeightSpec, plan_step

_HEADER = ["path", "shape", "matrices x (out, in)", "optimizer", "scale", "why"]

_PLAN = ["matrices x (rows, columns)", "engine", "form", "dtype", "stacks"]

_ENGINE = {"backend": "auto", "orthogonalizer": None}
"""Keywords that the stand-ins are not stepped with, and their defaults."""

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

    Layers that are alike take one line. The second table is the plan of the step: by matrices that are
    stepped alike how many there are, which engine steps them ("eager", PyTorch's own operations, or
    "triton", the kernels, which take the shorter side as rows), in which form and dtype it
    orthogonalizes them, and in how many stacks. It is the plan of one process that has all matrices,
    each with a gradient of its own dtype. Where "auto" cannot take the kernels for the recipe's sake,
    a line below says what they lack.

    A parameter that can be read in more than one way has a "?", and below the tables stand its readings
    with a dictionary to paste: `param_groups` would raise. Last come totals: for each optimizer its
    parameters and the bytes of its state, over all ranks.

    Args:
      model: its parameters may lie on any device, "meta" too. The engine is the one that runs on that
        device; on "meta" it is what `backend` names, and "auto" is "eager" there.
      layouts, recipe, shape_scale, **keywords: as for `param_groups`; `lr` and `adam_lr` may be among
        them.

    Returns:
      The tables.

    Raises:
      ValueError, TypeError: as `NorMuon(param_groups(...))` and its first step, save for parameters in
        doubt.
    """
    rates = {key: keywords.pop(key, 1.0) for key in ("lr", "adam_lr")}
    check_options(keywords)
    chosen = find_recipe(recipe).override(shape_scale=shape_scale)
    name = "Muon" if chosen.neuron_norm is None else "NorMuon"
    routes = route(model, layouts)
    sections = [leaf_table(_HEADER, [_row(each, found, chosen, name) for each, found in routes])]
    keywords |= {"recipe": recipe, "shape_scale": shape_scale}
    backend, orthogonalizer = (keywords.get(key, default) for key, default in _ENGINE.items())
    check_backend(backend, chosen)
    optimizer, originals = _stepped_on_meta(routes, rates, keywords)
    if planned := _plan(optimizer, originals, keywords):
        sections.append(table([_PLAN, *planned]))
        kept = dtype_name(keywords.get("momentum_dtype"))
        support = kernels_support(chosen, momentum_dtype=kept)
        if backend == "auto" and orthogonalizer is None and not support:
            sections.append(f"Engine eager steps all matrices: {support}.")
    if asked := question(routes):
        sections.append(asked)
    sections.append(totals_table(_totals(routes, name, optimizer, originals)))
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


def _stepped_on_meta(
    routes: list[tuple[Owned, Route]],
    rates: dict[str, float | torch.Tensor],
    keywords: dict[str, Any],
) -> tuple[NorMuon | None, dict[torch.Tensor, torch.Tensor]]:
    """(the optimizer after a step in which nothing is computed, the parameters by their stand-ins).

    There is no optimizer where there is nothing to train.
    """
    originals: dict[torch.Tensor, torch.Tensor] = {}
    without_data: list[tuple[Owned, Route]] = []
    for each, found in routes:
        param = nn.Parameter(torch.empty(each.param.shape, dtype=each.param.dtype, device="meta"))
        param.grad = torch.empty_like(param)
        originals[param] = each.param
        without_data.append((each._replace(param=param), found))
    # The state is the same whatever orthogonalizes, and however.
    keywords = {**keywords, "backend": "eager", "orthogonalizer": lambda stack: stack}
    groups = grouped(without_data, **rates, keywords=keywords)
    if not groups:
        return None, originals
    optimizer = NorMuon(groups, lr=1.0)
    optimizer.step()
    return optimizer, originals


def _plan(
    optimizer: NorMuon | None,
    originals: dict[torch.Tensor, torch.Tensor],
    keywords: dict[str, Any],
) -> list[list[str]]:
    """One line for the matrices of each engine that are stepped alike, from the plan of the step."""
    if optimizer is None:
        return []
    specs = []
    for group in optimizer.param_groups:
        if group["optimizer"] != MATRIX:
            continue
        own = {key: keywords.get(key, default) for key, default in _ENGINE.items()}
        if any(is_dtensor(originals[param]) for param in group["params"]):
            own["backend"] = "eager"
        weights = [
            WeightSpec(
                whole_part(parameter_view(group, param)),
                param.dtype,
                param.dtype,
                optimizer.state[param]["momentum"].dtype,
                _device(originals[param], own["backend"]),
            )
            for param in group["params"]
            if param.numel()
        ]
        specs.append(GroupSpec.of({**group, **own}, group_recipe(group), weights))
    plan = plan_step(tuple(specs))
    eager = _alike("eager", plan.eager, lambda stages: (stages.sides, _form_of(stages)))
    kernels = _alike("triton", plan.triton, lambda own: ((own.short, own.long), own.form))
    return [*eager, *kernels]


def _form_of(stages: StackStages) -> tuple[str, str]:
    if stages.orthogonalizer is None:
        return stages.form
    name = dtype_name(stages.dtype)
    assert name is not None
    return "orthogonalizer", name


def _device(param: torch.Tensor, backend: Backend) -> torch.device:
    """Where the parameter will be stepped: one on "meta" is yet to be moved there."""
    return torch.device("cuda") if param.is_meta and backend == "triton" else param.device


def _alike(
    engine: str,
    stacks: Sequence[PlannedStack[E, Run]],
    of: Callable[[E], tuple[tuple[int, int], tuple[str, str]]],
) -> Iterator[list[str]]:
    """The lines of one engine; `of` gives (the sides of a matrix, (form, compute dtype))."""
    for stages, alike in groupby(stacks, key=lambda stack: stack.engine):
        pieces = [stack.pieces for stack in alike]
        count = sum(piece.stop - piece.start for piece in chain.from_iterable(pieces))
        sides, form = of(stages)
        yield [f"{count} x {sides}", engine, *form, str(len(pieces))]


def _totals(
    routes: list[tuple[Owned, Route]],
    name: str,
    optimizer: NorMuon | None,
    originals: dict[torch.Tensor, torch.Tensor],
) -> list[Total]:
    """The bytes are those of the state that a step makes."""
    members: dict[str, list[torch.Tensor]] = {}
    for param, (_, found) in zip(originals, routes, strict=True):
        members.setdefault(optimizer_of(found, name), []).append(param)
    made: Mapping[torch.Tensor, ParameterState] = {} if optimizer is None else optimizer.state
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
