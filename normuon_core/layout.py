"""Which axes of a stored weight are the two sides of its matrices, in whichever framework it lives."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

Axes = int | tuple[int, ...]


@dataclass(frozen=True)
class MatrixLayout:
    """Says how one weight array holds its matrices.

    Axes that are named neither reduction nor output are batch axes: each of their entries is a matrix
    of its own (scanned layers, experts, heads). The order within a tuple is the order in which the
    axes are merged.

    Examples, for an (out, in) matrix of the mathematics: a Flax `Dense` kernel (in, out) is
    `MatrixLayout(0, 1)`, a `torch.nn.Linear` weight `MatrixLayout(1, 0)`, a Flax attention query
    kernel (d_model, heads, head_dim) is `MatrixLayout(0, (1, 2))`, or per head `MatrixLayout(0, 2)`.

    Attributes:
      reduction_axis: the axis or axes summed over in the forward pass (fan-in).
      output_axis: the axis or axes of the output neurons (fan-out).
      output_splits: sizes of the blocks of a fused projection along the merged output axes; each block
        is orthogonalized, normalized and scaled as if it were a parameter of its own.
    """

    reduction_axis: Axes
    output_axis: Axes
    output_splits: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        splits = "" if self.output_splits is None else f", output_splits={self.output_splits}"
        axes = f"reduction_axis={self.reduction_axis}, output_axis={self.output_axis}"
        return f"MatrixLayout({axes}{splits})"

    def on(self, shape: tuple[int, ...], name: str = "array") -> "MatrixView":
        """This layout on an array of `shape`; `name` is what an error calls the array.

        Raises:
          ValueError: an axis past the rank, an axis named twice, no axis on one side, or splits that
            are not positive or do not sum to the output size.
        """
        reduction = _positive(self.reduction_axis, shape, name, "reduction_axis")
        output = _positive(self.output_axis, shape, name, "output_axis")
        named = reduction + output
        if len(set(named)) != len(named):
            raise ValueError(
                f"{name}: the layout's reduction_axis={self.reduction_axis} and output_axis="
                f"{self.output_axis} overlap on shape {shape}; give every axis to one side only."
            )
        view = MatrixView(
            shape=tuple(shape),
            batch_axes=tuple(axis for axis in range(len(shape)) if axis not in named),
            row_axes=min(reduction, output),
            column_axes=max(reduction, output),
            output_is_rows=output < reduction,
            output_sizes=(),
        )
        outputs = math.prod(shape[axis] for axis in output)
        splits = (outputs,) if self.output_splits is None else tuple(self.output_splits)
        if any(size <= 0 for size in splits) or sum(splits) != outputs:
            raise ValueError(
                f"{name}: output_splits={splits} sum to {sum(splits)}, but the output axes of shape"
                f" {tuple(shape)} hold {outputs} neurons; give positive sizes that sum to {outputs}."
            )
        return replace(view, output_sizes=splits)


def _positive(axes: Axes, shape: tuple[int, ...], name: str, side: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    rank = len(shape)
    if not axes:
        raise ValueError(
            f"{name}: the layout's {side} is empty; a matrix needs an axis on each side."
        )
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{name}: the layout's {side}={axis} runs past the rank of shape {tuple(shape)};"
                f" use an axis from {-rank} to {rank - 1}."
            )
    return tuple(axis % rank for axis in axes)


@dataclass(frozen=True)
class MatrixView:
    """A layout resolved on one shape: the array as a stack (batch, rows, columns).

    The side that is stored first gives the rows, so that bringing an array to its stack moves no data
    wherever the two sides and the batch are stored in one piece.

    Attributes:
      shape: the array's own.
      batch_axes, row_axes, column_axes: together every axis once, none negative.
      output_is_rows: whether the rows are the output neurons.
      output_sizes: the sizes of the output blocks; one entry where nothing is split.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    output_is_rows: bool
    output_sizes: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation of axes that brings batch, rows and columns together in that order."""
        return self.batch_axes + self.row_axes + self.column_axes

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @property
    def stack_shape(self) -> tuple[int, int, int]:
        """(batch, rows, columns) of the whole array, splits apart."""
        sides = (self.batch_axes, self.row_axes, self.column_axes)
        batch, rows, columns = (math.prod(self.shape[axis] for axis in side) for side in sides)
        return batch, rows, columns

    @property
    def is_split(self) -> bool:
        return len(self.output_sizes) > 1

    @property
    def output_stack_axis(self) -> int:
        """The axis of the stack that holds the output neurons: -2 or -1."""
        return -2 if self.output_is_rows else -1

    @property
    def inputs(self) -> int:
        _, rows, columns = self.stack_shape
        return columns if self.output_is_rows else rows

    @property
    def blocks(self) -> tuple[tuple[slice, slice, slice], ...]:
        """Where each output block lies in the stack."""
        everything, start, result = slice(None), 0, []
        for size in self.output_sizes:
            block = slice(start, start + size)
            result.append(
                (everything, block, everything)
                if self.output_is_rows
                else (everything, everything, block)
            )
            start += size
        return tuple(result)

    def block_stack_shape(self, size: int) -> tuple[int, int, int]:
        """(batch, rows, columns) of the block with `size` output neurons."""
        batch, rows, columns = self.stack_shape
        return (batch, size, columns) if self.output_is_rows else (batch, rows, size)

    @property
    def stacked(self) -> "MatrixView":
        """The view of the same matrices once they are a stack, (batch, rows, columns)."""
        return replace(
            self,
            shape=self.stack_shape,
            batch_axes=(0,),
            row_axes=(1,),
            column_axes=(2,),
        )

    def strides(self) -> tuple[int, int, int] | None:
        """Elements from one matrix, row and column to the next, in an array stored row by row.

        None where the axes of one side do not lie in one piece.
        """
        element = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        result = []
        for side in (self.batch_axes, self.row_axes, self.column_axes):
            axes = [axis for axis in side if self.shape[axis] > 1]
            for outer, inner in pairwise(axes):
                if element[outer] != element[inner] * self.shape[inner]:
                    return None
            result.append(element[axes[-1]] if axes else math.prod(self.shape))
        batch, rows, columns = result
        return batch, rows, columns

    def statistic_shape(self, stack_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """The array's own rank for a statistic of `stack_shape`, axes ordered as `order` says.

        A side that the statistic reduces keeps ones; a block's output side stands on the first of the
        output axes, with ones on the others.
        """
        _, rows, columns = stack_shape
        return (
            self.batch_shape
            + self._side_shape(self.row_axes, rows)
            + self._side_shape(self.column_axes, columns)
        )

    def _side_shape(self, axes: tuple[int, ...], size: int) -> tuple[int, ...]:
        own = tuple(self.shape[axis] for axis in axes)
        return own if math.prod(own) == size else (size,) + (1,) * (len(axes) - 1)
