"""The kernels as an engine of the plan: matrices of one size, whichever side is stored first."""

from dataclasses import dataclass

import torch

from normuon_core import Recipe
from normuon_core.cost import Form, Iteration
from normuon_core.kernels.geometry import bytes_a_matrix


@dataclass(frozen=True)
class KernelStages:
    """What matrices must have in common to be stepped by kernels as one stack.

    Attributes:
      recipe, iteration: of the weights' group. device: where they are.
      short, long: the sides of a matrix.
      max_bytes: as in `StackStages`.
    """

    recipe: Recipe
    iteration: Iteration
    device: torch.device
    short: int
    long: int
    max_bytes: int

    @property
    def form(self) -> tuple[Form, str]:
        """The form of the iteration and its compute dtype."""
        return self.iteration.form(self.short, self.long)

    @property
    def bytes_a_matrix(self) -> int:
        """The temporary memory that one matrix of a stack takes."""
        _, dtype = self.form
        return bytes_a_matrix((self.short, self.long), dtype)
