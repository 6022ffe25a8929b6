"""The state of an optimizer's parameters: how it lies over ranks, and how it is made."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from normuon_core import MatrixView, Recipe
from normuon_core.quantization import scale_shape
from torch_ref.leaves.dtensor import is_dtensor, local_state
from torch_ref.leaves.group_keys import Group
from torch_ref.leaves.groups import parameter_view
from torch_ref.leaves.part import Part
from torch_ref.matrices.state import create_matrix_state
from torch_ref.stages.hyperball import starting_radii
from torch_ref.steps.weight import MatrixWeight

if TYPE_CHECKING:
    from torch_ref.mesh.rectangles import Sharding
    from torch_ref.steps.data_parallel import DataParallel


@dataclass(frozen=True)
class KeptState:
    """What an optimizer keeps of its parameters.

    Attributes:
      state: the optimizer's own, changed in place.
      parallel: who owns which matrix, in plain data parallelism; None elsewhere.
    """

    state: Mapping[torch.Tensor, dict[str, torch.Tensor]]
    parallel: "DataParallel | None"

    def sharding(self, param: torch.Tensor) -> "Sharding | None":
        """How a parameter's state lies over ranks; None where one process has all of it."""
        if self.parallel is not None and param in self.parallel.owned:
            return self.parallel.owned[param].sharding
        if not is_dtensor(param):
            return None
        from torch_ref.mesh.rectangles import sharding_of

        return sharding_of(param)

    def placed(
        self, param: torch.Tensor, group: Group, shape: tuple[int, ...]
    ) -> "Sharding | None":
        """How an array of a parameter's state lies; None where one process has all of it."""
        sharding = self.sharding(param)
        if sharding is None or shape == tuple(param.shape):
            return sharding
        view = parameter_view(group, param)
        if shape == scale_shape(view) and sharding.has_whole_blocks(view):
            return sharding
        return sharding.of_moment(view, shape)

    def zeros(
        self, param: torch.Tensor, group: Group, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        """An array of a parameter's state, where it lies."""
        placed = self.placed(param, group, shape)
        if placed is not None:
            return placed.zeros(shape, dtype, param.device)
        if shape == tuple(param.shape):
            return torch.zeros_like(param, dtype=dtype)
        return param.new_zeros(shape, dtype=dtype)

    def create(self, param: torch.Tensor, view: MatrixView, group: Group, recipe: Recipe) -> None:
        """The state of a matrix, if there is none yet."""
        state, zeros = self.state[param], partial(self.zeros, param, group)
        create_matrix_state(state, view, group, param.dtype, recipe.neuron_norm, zeros=zeros)
        if has_remainder(param, group) and "remainder" not in state:
            state["remainder"] = zeros(view.stored_shape, torch.uint16)
        if keeps_radius(recipe) and "radius" not in state:
            state["radius"] = self._radii(param, view, group)

    def _radii(self, param: torch.Tensor, view: MatrixView, group: Group) -> torch.Tensor:
        """`radii_now`, where the state lies."""
        radii = radii_now(param, view)
        placed = self.placed(param, group, tuple(radii.shape))
        return radii if placed is None or is_dtensor(radii) else placed.shard_of(radii)

    def weight(
        self,
        param: torch.Tensor,
        gradient: torch.Tensor,
        part: Part,
        group: Group,
        recipe: Recipe,
        *,
        shard: torch.Tensor | None = None,
    ) -> MatrixWeight:
        """The parameter during one step; `shard` is this process's part of it, None all."""
        state = self.state[param]
        if shard is not None:
            state = local_state(state)
        return MatrixWeight(
            param if shard is None else shard,
            gradient,
            state["remainder"] if has_remainder(param, group) else None,
            state,
            part=part,
            group=group,
            recipe=recipe,
            step=state["step"],
        )


def radii_now(param: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """The norms that a weight's matrices have; all ranks of a DTensor's mesh must call."""
    if not is_dtensor(param):
        return starting_radii(param, view)
    from torch_ref.steps.hyperball import starting_radii_over_ranks

    return starting_radii_over_ranks(param, view)


def keeps_radius(recipe: Recipe) -> bool:
    """Whether the norms that the matrices had at the start are kept."""
    return recipe.hyperball is not None and recipe.hyperball.radius is None


def has_remainder(param: torch.Tensor, group: Group) -> bool:
    """Whether the lower half of a float32 weight is kept beside the parameter."""
    return group["bf16_remainder"] and param.dtype == torch.bfloat16
