"""What a weight of matrices keeps between steps: its momentum and its second moments."""

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Protocol

import torch

from normuon_core import MatrixView, NeuronNorm
from normuon_core.neurons import statistic_shape
from normuon_core.quantization import scale_shape
from torch_ref.leaves.dtensor import is_dtensor
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.leaves.groups import Group
from torch_ref.matrices.views import from_stack, to_stack


def moment_keys(count: int) -> list[str]:
    """The keys of a weight's `count` second moments in its state.

    A list under one key is more than some forms of checkpoint take, so that each moment has a key. They
    are those that `torch.distributed.checkpoint` gives the entries of a list.
    """
    if count == 1:
        return ["second_moment"]
    return [f"second_moment.{block}" for block in range(count)]


def second_moments(state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """A weight's second moments: one, or one for each output block; none where it has no such state."""
    if "second_moment" in state:
        return [state["second_moment"]]
    keys = takewhile(lambda key: key in state, (f"second_moment.{block}" for block in count()))
    return [state[key] for key in keys]


class Zeros(Protocol):
    """Makes an array of zeros where a parameter's state is kept; `shape` is the whole array's."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


def moment_shapes(view: MatrixView, rule: NeuronNorm) -> list[tuple[int, ...]]:
    """The shape of the second moment: the weight's rank, reduced axes kept as 1.

    The moments of several output blocks stand side by side on the output axis, as one array. Only where
    some blocks have one number for each output and others one for each input, as the `longer` rule may
    give unequal blocks, each block has an array of its own.
    """
    blocks = [
        statistic_shape(rule.axis, view.block_stack_shape(size), output_is_rows=view.output_is_rows)
        for size in view.output_sizes
    ]
    joined = view.joined_statistic(blocks)
    return [_as_kept(shape, view) for shape in (blocks if joined is None else [joined])]


def _as_kept(statistic: tuple[int, int, int], view: MatrixView) -> tuple[int, ...]:
    ordered = dict(zip(view.order, view.statistic_shape(statistic), strict=True))
    return view.fold(tuple(ordered[axis] for axis in range(len(view.order))))


def with_moments_joined(
    state: Mapping[str, torch.Tensor], view: MatrixView, rule: NeuronNorm
) -> dict[str, torch.Tensor]:
    """A weight's state in which the second moments are kept as they are now.

    An older file may have a list of one array for each output block, or a key for each.
    """
    kept = state.get("second_moment")
    blocks = list(kept) if isinstance(kept, list | tuple) else second_moments(state)
    rest = {key: value for key, value in state.items() if not key.startswith("second_moment")}
    whole = not any(map(is_dtensor, blocks))
    if len(blocks) > 1 and whole and len(moment_shapes(view, rule)) == 1:
        stacks = [to_stack(block, view) for block in blocks]
        blocks = [from_stack(torch.cat(stacks, dim=view.output_stack_axis), view)]
    return rest | dict(zip(moment_keys(len(blocks)), blocks, strict=True)) if blocks else rest


def create_matrix_state(
    state: dict[str, torch.Tensor],
    view: MatrixView,
    group: Group,
    dtype: torch.dtype,
    rule: NeuronNorm | None,
    *,
    zeros: Zeros,
) -> None:
    """Fills in what the state lacks: "momentum", and the second moments if `rule` is not None.

    An int8 momentum has its scales beside it, "momentum_scale".

    Args:
      view: of the whole weight. dtype: the parameter's.
    """
    dtype = working_dtype(dtype)
    if "momentum" not in state:
        state["momentum"] = zeros(view.stored_shape, group["momentum_dtype"] or dtype)
        if state["momentum"].dtype == torch.int8:
            state["momentum_scale"] = zeros(scale_shape(view), torch.bfloat16)
    if rule is None or second_moments(state):
        return
    shapes = moment_shapes(view, rule)
    for key, shape in zip(moment_keys(len(shapes)), shapes, strict=True):
        if key not in state:
            state[key] = zeros(shape, dtype)
