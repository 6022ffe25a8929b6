"""The ways in which an array can be read as matrices.

A `LayerForm` says which axes of one layer's array are the two sides. `read` applies it to an array that
may hold many layers, whose axes stand in front or in the middle (`layer_axes`).
"""

import math
from typing import NamedTuple

from normuon_core.layout import MatrixLayout

Shape = tuple[int, ...]
FLAT, HEADS_OUT, HEADS_IN = "linear layer", "attention kernel", "attention output kernel"
GENERAL = "attention or DenseGeneral kernel"


class LayerForm(NamedTuple):
    """How one layer stores its matrices; axes count from 0, those of neither side are a batch.

    Attributes:
      kind: what such a layer is called.
      one_input_channel: an axis that is 1 where the convolution is depthwise.
    """

    kind: str
    reduction: tuple[int, ...]
    output: tuple[int, ...]
    one_input_channel: int | None = None


class Reading(NamedTuple):
    """One way to read a leaf.

    Attributes:
      meaning: for people.
      layout: None where the leaf is no matrix.
      bias_shape: the bias that such a layer would have beside it.
      layer_axes: the axes that count layers.
      form: None where the leaf is no matrix.
      has_more_layers_than_sides: whether it counts as many layers as a matrix has rows or columns.
    """

    meaning: str
    layout: MatrixLayout | None
    bias_shape: Shape = ()
    layer_axes: tuple[int, ...] = ()
    form: LayerForm | None = None
    has_more_layers_than_sides: bool = False


def linear(rank: int, *, out_in: bool = False) -> LayerForm:
    """The last two axes are the sides; those before them count experts, or blocks."""
    inputs, outputs = (rank - 1, rank - 2) if out_in else (rank - 2, rank - 1)
    return LayerForm("linear weight" if out_in else FLAT, (inputs,), (outputs,))


def heads_out(rank: int, kind: str = HEADS_OUT) -> LayerForm:
    """(..., inputs, heads, size): queries, keys and values."""
    return LayerForm(kind, (rank - 3,), (rank - 2, rank - 1))


def heads_first(rank: int) -> LayerForm:
    """(..., heads, inputs, size): queries, keys and values as an einsum stores them."""
    return LayerForm(HEADS_OUT, (rank - 2,), (rank - 3, rank - 1))


def heads_in(rank: int, kind: str = HEADS_IN) -> LayerForm:
    """(..., heads, size, outputs): attention's output."""
    return LayerForm(kind, (rank - 3, rank - 2), (rank - 1,))


def convolution(rank: int, spatial: int, *, out_in: bool = False) -> LayerForm:
    """(..., *window, inputs, outputs), or (..., outputs, inputs, *window)."""
    first = rank - spatial - 2
    if out_in:
        kind = f"{spatial}-D convolution weight"
        return LayerForm(kind, tuple(range(first + 1, rank)), (first,), first + 1)
    return LayerForm(
        f"{spatial}-D convolution", tuple(range(first, rank - 1)), (rank - 1,), rank - 2
    )


def transposed_convolution(rank: int, spatial: int, *, out_in: bool = False) -> LayerForm:
    """(..., *window, outputs, inputs), or (..., inputs, outputs, *window)."""
    first = rank - spatial - 2
    kind = f"transposed {spatial}-D convolution stored output first"
    if out_in:
        kind = f"transposed {spatial}-D convolution weight stored input first"
        window = tuple(range(first + 2, rank))
        return LayerForm(kind, (first, *window), (first + 1,), first + 1)
    window = tuple(range(first, rank - 2))
    return LayerForm(kind, (*window, rank - 1), (rank - 2,), rank - 2)


def convolutions(rank: int, *, out_in: bool = False) -> list[LayerForm]:
    """The plain convolution first, then stacks of convolutions of fewer dimensions."""
    return [convolution(rank, spatial, out_in=out_in) for spatial in range(rank - 2, 0, -1)]


def all_forms(rank: int, *, out_in: bool = False) -> list[LayerForm]:
    """Every form that an array of this rank may have, whatever it is called."""
    flat = linear(rank, out_in=out_in)
    if out_in and rank > 3:
        return convolutions(rank, out_in=True)[:1]
    heads = [heads_out(rank, GENERAL)] if rank >= 3 and not out_in else []
    return [flat, *convolutions(rank, out_in=out_in), *heads]


def read(shape: Shape, form: LayerForm, layer_axes: tuple[int, ...] = ()) -> Reading:
    """`form` on an array of `shape` in which `layer_axes` count layers."""
    rank = len(shape)
    own = [axis for axis in range(rank) if axis not in layer_axes]
    in_front = layer_axes == tuple(range(len(layer_axes)))

    def stored(axes: tuple[int, ...]) -> int | tuple[int, ...]:
        axes = tuple(own[axis] - (rank if in_front else 0) for axis in axes)
        first, *rest = axes
        return axes if rest else first

    sizes = [shape[axis] for axis in own]
    batch = [axis for axis in range(len(own)) if axis not in form.reduction + form.output]
    inputs = math.prod(sizes[axis] for axis in form.reduction)
    outputs = "x".join(str(sizes[axis]) for axis in form.output)
    layers = [shape[axis] for axis in layer_axes]
    counted_by = [*layers, *(sizes[axis] for axis in batch)]
    counted = _counted(counted_by, form.kind)
    if not in_front:
        counted += f" counted by axis {', '.join(map(str, layer_axes))}"
    bias = [sizes[axis] for axis in sorted((*batch, *form.output))]
    for axis, size in zip(layer_axes, layers, strict=True):
        bias.insert(axis, size)
    return Reading(
        f"{counted}, {inputs} in, {outputs} out",
        MatrixLayout(stored(form.reduction), stored(form.output)),
        tuple(bias),
        layer_axes,
        form,
        math.prod(counted_by) >= min(inputs, math.prod(sizes[axis] for axis in form.output)),
    )


def _counted(batch: list[int], kind: str) -> str:
    return f"{math.prod(batch)} {kind}s" if batch else f"{'an' if kind[0] == 'a' else 'a'} {kind}"
