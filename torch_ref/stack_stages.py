"""Stages 2 and 3 on a stack of same-shape matrices, whichever weights they come from."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from normuon_core import NeuronNorm, Polar
from normuon_core.polar_iteration import Algorithm, choose_form
from torch_ref.neuron_norm import normalize_neurons
from torch_ref.orthogonalization import dtype_name, polar_factor
from torch_ref.stacking import bytes_per_matrix

Orthogonalizer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StackStages:
    """What matrices must share to go through the two stages as one stack.

    Attributes:
      rows, columns: the matrices' stored sides.
      output_is_rows: which of the two the output neurons are.
      dtype: the working dtype.
      device: where the stack is.
      polar, neuron_norm: the recipe's records; `neuron_norm=None` skips stage 3.
      compute_dtype, algorithm: as in `polar_factor`.
      orthogonalizer: takes the place of `polar_factor`; (batch, rows, columns) in the working dtype
        to the same shape in any dtype, which is then the one that the update is rounded to.
      max_bytes: the temporary memory that a stack may take, unless one matrix alone needs more.
    """

    rows: int
    columns: int
    output_is_rows: bool
    dtype: torch.dtype
    device: torch.device
    polar: Polar
    neuron_norm: NeuronNorm | None
    compute_dtype: torch.dtype | None
    algorithm: Algorithm
    orthogonalizer: Orthogonalizer | None
    max_bytes: int

    @property
    def matrices(self) -> int:
        """How many matrices one stack may hold; at least one."""
        _, compute_dtype = choose_form(
            self.rows,
            self.columns,
            len(self.polar.coefficients),
            algorithm=self.algorithm,
            compute_dtype=dtype_name(self.compute_dtype),
            on_gpu=self.device.type == "cuda",
            symmetric=False,
        )
        each = bytes_per_matrix(
            self.rows,
            self.columns,
            dtype=self.dtype,
            compute_dtype=getattr(torch, compute_dtype),
        )
        return max(1, self.max_bytes // each)

    def __call__(
        self, u: torch.Tensor, second_moment: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the update, the new second moment) of a stack u, (batch, rows, columns).

        Raises:
          ValueError: the orthogonalizer's result has another shape.
        """
        v = self._orthogonalize(u)
        if self.neuron_norm is None or second_moment is None:
            return v, None
        return normalize_neurons(
            v, second_moment, **vars(self.neuron_norm), output_is_rows=self.output_is_rows
        )

    def _orthogonalize(self, u: torch.Tensor) -> torch.Tensor:
        if self.orthogonalizer is None:
            return polar_factor(
                u,
                **vars(self.polar),
                compute_dtype=self.compute_dtype,
                algorithm=self.algorithm,
                backend="eager",
            )
        v = self.orthogonalizer(u)
        if v.shape != u.shape:
            raise ValueError(
                f"the orthogonalizer returned shape {tuple(v.shape)} for a stack of shape"
                f" {tuple(u.shape)}; return one matrix for each, of the same shape."
            )
        return v
