"""What a weight of matrices keeps between steps: its momentum and its second moments."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from normuon_core import MatrixView, NeuronNorm
from torch_ref.dtypes import working_dtype
from torch_ref.groups import Group
from torch_ref.neuron_norm import statistic_shape
from torch_ref.stacking import from_stack, to_stack


class Zeros(Protocol):
    """Makes an array of zeros where a parameter's state is kept; `shape` is the whole array's."""

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...


def moment_shapes(view: MatrixView, rule: NeuronNorm) -> list[tuple[int, ...]]:
    """The shape of the second moment: the weight's rank, reduced axes kept as 1.

    The output blocks' stand side by side on the output axis. One for each block only where some blocks'
    belong to the outputs and others' to the inputs, as those of unequal blocks may in the `longer` rule.
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


def join_second_moments(blocks: Sequence[torch.Tensor], view: MatrixView, rule: NeuronNorm) -> Any:
    """The second moment as it is kept, from one array for each output block, as it was kept before."""
    if len(moment_shapes(view, rule)) > 1:
        return list(blocks)
    stacks = [to_stack(block, view) for block in blocks]
    return from_stack(torch.cat(stacks, dim=view.output_stack_axis), view)


def create_matrix_state(
    state: dict[str, Any],
    view: MatrixView,
    group: Group,
    dtype: torch.dtype,
    rule: NeuronNorm | None,
    *,
    zeros: Zeros,
) -> None:
    """Fills in what the state lacks: "momentum", and "second_moment" if `rule` is not None.

    Args:
      view: of the whole weight. dtype: the parameter's.
    """
    dtype = working_dtype(dtype)
    if "momentum" not in state:
        state["momentum"] = zeros(view.stored_shape, group["momentum_dtype"] or dtype)
    if rule is not None and "second_moment" not in state:
        moments = [zeros(shape, dtype) for shape in moment_shapes(view, rule)]
        state["second_moment"] = moments if len(moments) > 1 else moments[0]
