"""What a weight of matrices keeps between steps: its momentum and its second moments."""

from itertools import count, takewhile
from typing import Any, Protocol

import torch

from normuon_core import MatrixView, NeuronNorm
from torch_ref.dtypes import working_dtype
from torch_ref.groups import Group
from torch_ref.neuron_norm import statistic_shape


def _moment_key(block: int | None) -> str:
    """Under which key a second moment is kept; `block` of a split weight.

    Each block's is an array with a key of its own, which every form of checkpoint takes. The keys are
    what `torch.distributed.checkpoint` calls the entries of a list, which was kept here before.
    """
    return "second_moment" if block is None else f"second_moment.{block}"


def second_moments(state: dict[str, Any]) -> list[torch.Tensor]:
    """A weight's second moments, one for each output block; none where it has no such state."""
    if _moment_key(None) in state:
        return [state[_moment_key(None)]]
    keys = takewhile(lambda key: key in state, map(_moment_key, count()))
    return [state[key] for key in keys]


def with_moments_apart(state: dict[str, Any]) -> dict[str, Any]:
    """A weight's state, of an older file perhaps, in which the second moments are a list."""
    moments = state.get("second_moment")
    if not isinstance(moments, list | tuple):
        return state
    rest = {key: value for key, value in state.items() if key != "second_moment"}
    return rest | {_moment_key(block): moment for block, moment in enumerate(moments)}


class Zeros(Protocol):
    """Makes an array of zeros where a parameter's state is kept; `shape` is the whole array's."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


def moment_shapes(view: MatrixView, rule: NeuronNorm) -> list[tuple[int, ...]]:
    """The shape of each output block's second moment: the weight's rank, reduced axes kept as 1."""
    shapes = []
    for size in view.output_sizes:
        statistic = statistic_shape(
            rule.axis, view.block_stack_shape(size), output_is_rows=view.output_is_rows
        )
        ordered = dict(zip(view.order, view.statistic_shape(statistic), strict=True))
        shapes.append(tuple(ordered[axis] for axis in range(len(view.order))))
    return shapes


def create_matrix_state(
    state: dict[str, Any],
    view: MatrixView,
    group: Group,
    dtype: torch.dtype,
    rule: NeuronNorm | None,
    *,
    zeros: Zeros,
) -> None:
    """Fills in what the state lacks: "momentum", and the second moments if `rule` is not None.

    Args:
      view: of the whole weight. dtype: the parameter's.
    """
    dtype = working_dtype(dtype)
    if "momentum" not in state:
        state["momentum"] = zeros(view.shape, group["momentum_dtype"] or dtype)
    if rule is None:
        return
    for block, shape in enumerate(moment_shapes(view, rule)):
        key = _moment_key(block if view.is_split else None)
        if key not in state:
            state[key] = zeros(shape, dtype)
