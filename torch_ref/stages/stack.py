"""Stages 2 and 3, orthogonalization and neuron norm, on a stack of matrices of many weights.

With what a recipe has before and between them: rows equilibrated, and the norm set.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from normuon_core import NeuronNorm, NormSetting, Polar, RowEquilibration
from normuon_core.cost import Algorithm, Form, Iteration
from normuon_core.neurons import neurons_on_rows
from normuon_core.polynomials import cubic_steps
from torch_ref.leaves.dtypes import Scalar, dtype_name
from torch_ref.matrices.views import bytes_per_matrix
from torch_ref.stages.neuron_norm import normalize_neurons
from torch_ref.stages.norm_setting import set_norm
from torch_ref.stages.orthogonalization import normalized, polynomial, scaled_squares
from torch_ref.stages.row_equilibration import row_factors, row_squares

Orthogonalizer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class StackStages:
    """The two stages, and what matrices must have in common to go through them as one stack.

    Attributes:
      rows, columns: the matrices' stored sides.
      output_is_rows: which of the two the output neurons are.
      dtype: the working dtype.
      device: where the stack is.
      polar, neuron_norm, row_equilibration, norm_setting: the recipe's records; None skips a stage. The
        beta2 of `neuron_norm` is not read: matrices whose groups differ in it share a stack, and each
        call is given it.
      compute_dtype, algorithm: as in `polar_factor`.
      orthogonalizer: takes the place of `polar_factor`: a function of (batch, rows, columns) in the
        working dtype to the same shape in any dtype, to which the update is then rounded.
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
    row_equilibration: RowEquilibration | None = None
    norm_setting: NormSetting | None = None

    @property
    def sides(self) -> tuple[int, int]:
        return self.rows, self.columns

    @property
    def neurons_are_rows(self) -> bool:
        """Whether the second moment has one number for each row, and not for each column."""
        axis = "output" if self.neuron_norm is None else self.neuron_norm.axis
        return neurons_on_rows(axis, *self.sides, self.output_is_rows)

    @property
    def neurons(self) -> int:
        """How many numbers the second moment of a matrix has; 0 where there is none."""
        if self.neuron_norm is None:
            return 0
        return self.rows if self.neurons_are_rows else self.columns

    @property
    def iteration(self) -> Iteration:
        """What stage 2 is asked to do."""
        return Iteration(
            len(self.polar.coefficients),
            self.algorithm,
            dtype_name(self.compute_dtype),
            on_gpu=self.device.type == "cuda",
            symmetric=False,
            cubics=cubic_steps(self.polar.coefficients),
        )

    @property
    def form(self) -> tuple[Form, str]:
        """The form of the iteration and its compute dtype."""
        return self.iteration.form(self.rows, self.columns)

    @property
    def bytes_a_matrix(self) -> int:
        """The temporary memory that one matrix of a stack takes."""
        _, compute_dtype = self.form
        return bytes_per_matrix(
            self.rows,
            self.columns,
            dtype=self.dtype,
            compute_dtype=getattr(torch, compute_dtype),
        )

    def __call__(
        self, u: torch.Tensor, second_moment: torch.Tensor | None, beta2: Scalar
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the update, the new second moment) of a stack u, (batch, rows, columns).

        Args:
          beta2: as in `finish`.

        Raises:
          ValueError: the orthogonalizer's result has another shape.
        """
        return self.finish(self.prepare(u, self.scaled_squares(u)), second_moment, beta2)

    @property
    def squares_shape(self) -> tuple[int, int] | None:
        """The shape of a whole matrix's `scaled_squares`: (1, 1), or one for each output neuron's row.

        None where an orthogonalizer takes u itself.
        """
        if self.row_equilibration is not None:
            return (self.rows, 1) if self.output_is_rows else (1, self.columns)
        return None if self.orthogonalizer is not None else (1, 1)

    def scaled_squares(self, u: torch.Tensor) -> torch.Tensor | None:
        """The squares that `prepare` takes; those of parts of a matrix, or of a row, add up.

        Of the shape (batch, *`squares_shape`) if u has whole matrices, or None.
        """
        if self.row_equilibration is not None:
            return row_squares(u, output_is_rows=self.output_is_rows)
        return None if self.orthogonalizer is not None else scaled_squares(u)

    def prepare(
        self, u: torch.Tensor, squares: torch.Tensor | None, outputs: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Makes of u what `finish` takes. It is elementwise: u may be whole matrices or parts of them.

        Args:
          u: (batch, rows, columns) in the working dtype.
          squares: `scaled_squares` of the whole matrices.
          outputs: the output neurons that u has; None is all of them.
        """
        if squares is None:
            return u
        if self.row_equilibration is not None:
            factors = row_factors(squares, **vars(self.row_equilibration))
            squares = (squares * factors.square()).sum(dim=(-2, -1), keepdim=True)
            if outputs is not None:
                here = list(outputs)
                factors = factors[:, here] if self.output_is_rows else factors[..., here]
            u = u * factors
        if self.orthogonalizer is not None:
            return u
        _, dtype = self.form
        return normalized(u, squares, self.polar, sides=self.sides, dtype=dtype)

    def finish(
        self, x: torch.Tensor, second_moment: torch.Tensor | None, beta2: Scalar
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(the update, the new second moment) of whole matrices that `prepare` has returned.

        Args:
          beta2: the decay of the second moment: a number, or one for each matrix, (batch, 1, 1).
        """
        v = self._orthogonalize(x)
        if self.norm_setting is not None:
            v = set_norm(v, **vars(self.norm_setting))
        if self.neuron_norm is None or second_moment is None:
            return v, None
        keywords = {**vars(self.neuron_norm), "beta2": beta2}
        return normalize_neurons(v, second_moment, **keywords, output_is_rows=self.output_is_rows)

    @property
    def prepared_dtype(self) -> torch.dtype:
        """The dtype of what `prepare` returns."""
        return self.dtype if self.orthogonalizer is not None else getattr(torch, self.form[1])

    def _orthogonalize(self, x: torch.Tensor) -> torch.Tensor:
        if self.orthogonalizer is None:
            return polynomial(x, self.polar, form=self.form[0])
        v = self.orthogonalizer(x)
        if v.shape != x.shape:
            raise ValueError(
                f"the orthogonalizer returned shape {tuple(v.shape)} for a stack of shape"
                f" {tuple(x.shape)}; return one matrix for each, of the same shape."
            )
        return v
