"""Which side of a matrix its neurons are: those with a second moment."""

from typing import Literal

NeuronAxis = Literal["output", "input", "longer"]


def neurons_on_rows(axis: NeuronAxis, rows: int, columns: int, output_is_rows: bool) -> bool:
    """Whether the neurons that have a second moment are the rows of a whole (rows, columns) matrix."""
    if axis == "longer" and rows != columns:
        return rows > columns
    return output_is_rows != (axis == "input")


def statistic_shape(
    axis: NeuronAxis, stack_shape: tuple[int, int, int], *, output_is_rows: bool
) -> tuple[int, int, int]:
    """The shape of the second moment of a (batch, rows, columns) stack: the reduced side is 1."""
    batch, rows, columns = stack_shape
    on_rows = neurons_on_rows(axis, rows, columns, output_is_rows)
    return (batch, rows, 1) if on_rows else (batch, 1, columns)
