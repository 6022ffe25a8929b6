"""What a weight of matrices keeps between steps: its momentum and its second moments."""

from typing import Any, Protocol

import torch

from normuon_core import MatrixView, NeuronNorm
from torch_ref.dtypes import working_dtype
from torch_ref.groups import Group
from torch_ref.neuron_norm import statistic_shape


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
    """Fills in what the state lacks: "momentum", and "second_moment" if `rule` is not None.

    Args:
      view: of the whole weight. dtype: the parameter's.
    """
    dtype = working_dtype(dtype)
    if "momentum" not in state:
        state["momentum"] = zeros(view.shape, group["momentum_dtype"] or dtype)
    if rule is not None and "second_moment" not in state:
        moments = [zeros(shape, dtype) for shape in moment_shapes(view, rule)]
        state["second_moment"] = moments if view.is_split else moments[0]
