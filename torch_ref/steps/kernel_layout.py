"""How the kernels find the matrices of a weight, as far as the plan of a step decides it."""

from typing import NamedTuple

import torch

from normuon_core import MatrixView, Recipe
from normuon_core.cost import Iteration
from normuon_core.kernels.geometry import Geometry, block_geometries
from torch_ref.kernels.engine import KernelStages


class KernelLayout(NamedTuple):
    """Where the matrices of a weight are that the kernels step.

    Attributes:
      in_place: whether strides reach them where they are stored; if not, the weight is copied into a
        stack first.
      geometries: of each run of output blocks.
    """

    in_place: bool
    geometries: tuple[Geometry, ...]

    def stages(
        self, recipe: Recipe, iteration: Iteration, device: torch.device, max_bytes: int
    ) -> list[KernelStages]:
        """What the matrices of each run of output blocks go through."""
        return [
            KernelStages(recipe, iteration, device, *geometry.whole, max_bytes)
            for geometry in self.geometries
        ]


def kernel_layout(view: MatrixView, recipe: Recipe) -> KernelLayout:
    """The layout of a weight that this process has whole."""
    in_place = view.strides() is not None
    view = view if in_place else view.stacked
    axis = "output" if recipe.neuron_norm is None else recipe.neuron_norm.axis
    equilibrated = recipe.row_equilibration is not None
    geometries = block_geometries(view, axis=axis, equilibrated=equilibrated)
    return KernelLayout(in_place, tuple(geometries))
