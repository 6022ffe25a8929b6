"""Which readings of a leaf are left: those that its name suggests, held against its neighbours."""

import math
from collections.abc import Callable, Sequence

from normuon_core.layout import MatrixView
from normuon_core.names import OUTPUTS, QUERIES, Role
from optax_normuon.leaves.evidence import Leaf, Neighbours, without
from optax_normuon.leaves.readings import (
    LayerForm,
    Reading,
    Shape,
    all_forms,
    convolution,
    convolutions,
    heads_first,
    heads_in,
    heads_out,
    linear,
    read,
    transposed_convolution,
)

LayerAxes = tuple[int, ...]
"""The axes of a leaf that count layers."""

_LONGEST_WINDOW = 16
"""The longest window over time that each channel has to itself. Mamba's and RecurrentGemma's have 4."""


def readings_left(leaf: Leaf, neighbours: Neighbours) -> list[Reading]:
    """The readings that the neighbours leave of those that the name suggests; if they leave none of
    these, of all that the shape allows."""
    choices = _layer_axes(leaf, neighbours)
    if len(leaf.shape) == 2:
        return _flat(leaf, neighbours, choices)
    suggested = _candidates(leaf, neighbours, choices, _suggested)
    everything = _candidates(leaf, neighbours, choices, _any_form)
    bias = neighbours.bias(leaf)
    if bias is not None and math.prod(bias) not in leaf.shape and len(bias) == 1:
        bias = None if not _fits(everything, bias) else bias
    for readings in (suggested, everything):
        fitting = readings if bias is None else _fits(readings, bias)
        if fitting:
            return _settled(leaf, neighbours, fitting, with_bias=bias is not None)
    return everything


def _fits(readings: Sequence[Reading], bias: Shape) -> list[Reading]:
    return [reading for reading in readings if reading.bias_shape == bias]


def _layer_axes(leaf: Leaf, neighbours: Neighbours) -> tuple[LayerAxes, ...]:
    """Which axes may count layers. A convolution is one layer, unless neighbours or name say more."""
    choices = neighbours.layer_axes(leaf)
    if len(choices) == 1 or neighbours.bias(leaf) is not None or len(leaf.shape) == 2:
        return choices
    is_convolution = leaf.name.role in (Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION)
    return ((),) if is_convolution and not leaf.name.is_scanned else choices


def _flat(leaf: Leaf, neighbours: Neighbours, choices: Sequence[LayerAxes]) -> list[Reading]:
    """Readings of a leaf with two axes: a linear layer, or as many vectors as there are layers."""
    bias = neighbours.bias(leaf)
    if len(choices) == 1 and choices[0] and bias != leaf.shape[-1:]:
        (axis,) = choices[0][:1]
        return [Reading(f"a stack of {leaf.shape[axis]} vectors", None)]
    if leaf.name.role is Role.CONVOLUTION and min(leaf.shape) <= _LONGEST_WINDOW:
        return [Reading("convolution with one input channel a group", None)]
    out_in = neighbours.stored_out_in(leaf)
    if bias is not None and len(bias) == 1 and leaf.shape[0] != leaf.shape[1]:
        out_in = bias[0] == leaf.shape[0] if bias[0] in leaf.shape else out_in
    reading = read(leaf.shape, linear(2, out_in=out_in))
    if leaf.name.is_part_of_complex:
        # State-space models keep their matrices by hand, in either order.
        return [read(leaf.shape, linear(2, out_in=True)), reading]
    stacked = [
        other
        for other in neighbours.within(leaf.parts[:-1])
        if len(other.shape) == 3 and other.shape[0] == leaf.shape[0] and other.name.is_linear
    ]
    if leaf.name.is_raw and leaf.name.role is Role.UNKNOWN and stacked:
        return [reading, Reading(f"a stack of {leaf.shape[0]} vectors", None)]
    return [reading]


def _candidates(
    leaf: Leaf,
    neighbours: Neighbours,
    choices: Sequence[LayerAxes],
    forms: Callable[[Leaf, Neighbours, Shape], list[LayerForm]],
) -> list[Reading]:
    """The different readings that every choice of layers' axes and every form of one layer give."""
    found: dict[MatrixView | None, Reading] = {}
    for axes in choices:
        own = without(leaf.shape, axes)
        if len(own) < 2:
            reading = Reading(
                f"a stack of {math.prod(leaf.shape[axis] for axis in axes)} vectors", None
            )
            found.setdefault(None, reading)
            continue
        for form in forms(leaf, neighbours, own):
            reading = read(leaf.shape, form, axes)
            assert reading.layout is not None
            found.setdefault(reading.layout.on(leaf.shape), reading)
    return list(found.values())


def _any_form(leaf: Leaf, neighbours: Neighbours, own: Shape) -> list[LayerForm]:
    return all_forms(len(own), out_in=neighbours.stored_out_in(leaf))


def _suggested(leaf: Leaf, neighbours: Neighbours, own: Shape) -> list[LayerForm]:
    """The forms that the name suggests for one layer of shape `own`."""
    rank, name, role = len(own), leaf.name, leaf.name.role
    out_in = neighbours.stored_out_in(leaf)
    flat = linear(rank, out_in=out_in)
    if rank == 2:
        return [flat]
    if role is Role.TRANSPOSED_CONVOLUTION:
        spatial = rank - 2
        return [
            convolution(rank, spatial, out_in=out_in),
            transposed_convolution(rank, spatial, out_in=out_in),
        ]
    if role is Role.CONVOLUTION:
        forms = convolutions(rank, out_in=out_in)
        is_whole = neighbours.layer_axes(leaf) != ((),) and (
            name.is_scanned or neighbours.bias(leaf) is not None
        )
        return forms if is_whole else forms[:1]
    if out_in:
        return [flat] if name.is_linear else _any_form(leaf, neighbours, own)
    if role is Role.ADAPTER:
        return [heads_out(rank, "low-rank adapter"), heads_in(rank, "low-rank adapter"), flat]
    if role is Role.ATTENTION_IN:
        return [heads_out(rank), heads_first(rank) if name.is_einsum else flat]
    if role is Role.ATTENTION_OUT and neighbours.beside(leaf, QUERIES) is not None:
        return [heads_in(rank)] if name.is_einsum else [heads_in(rank), flat]
    if name.is_einsum or "gating" in name.owner:
        return [flat, linear(rank, out_in=True)]
    if name.is_linear and role is not Role.GENERAL:
        return [flat]
    return all_forms(rank)


def _settled(
    leaf: Leaf, neighbours: Neighbours, readings: list[Reading], *, with_bias: bool
) -> list[Reading]:
    """The readings that agree with the attention around the leaf, with the model's width, and with how
    stacks of layers look."""
    role = leaf.name.role
    if role is Role.TRANSPOSED_CONVOLUTION and not with_bias:
        return readings
    if role in (Role.ATTENTION_IN, Role.ATTENTION_OUT):
        readings = _fitting_attention(leaf, neighbours, readings)
    if role is Role.ADAPTER:
        readings = _fitting_factor(leaf, neighbours, readings)
    if len(readings) > 1 and role is not Role.TRANSPOSED_CONVOLUTION:
        readings = _of_the_width(leaf, neighbours, readings)
    if len(readings) > 1:
        # Nothing but the shape suggests layers along the middle axis, and more layers than a matrix has
        # rows or columns speak against them.
        readings = [
            r for r in readings if r.layer_axes != (1,) or not r.has_more_layers_than_sides
        ] or readings
    return readings


def _of_the_width(leaf: Leaf, neighbours: Neighbours, readings: list[Reading]) -> list[Reading]:
    """Those with a side as long as the normalizations beside the leaf; all, if there is none such."""
    widths = neighbours.widths(leaf)
    role = leaf.name.role
    fitting = []
    for reading in readings:
        assert reading.layout is not None
        view = reading.layout.on(leaf.shape)
        inputs, outputs = view.inputs, sum(view.output_sizes)
        wanted = {inputs, outputs}
        if role is Role.ATTENTION_IN or "gating" in leaf.name.owner or leaf.name.is_einsum:
            wanted = {outputs} if role is Role.ATTENTION_OUT else {inputs}
        if wanted & widths:
            fitting.append(reading)
    return fitting or readings


def _fitting_attention(
    leaf: Leaf, neighbours: Neighbours, readings: list[Reading]
) -> list[Reading]:
    """Those in which the query's and the output's kernel fit together; all, if there is none such.

    Where heads are an axis, the output is (heads, head_dim, d) to a query of (d, heads, head_dim). Of
    plain linear layers it is (k, d) to (d, k).
    """
    query, out = (neighbours.beside(leaf, names) for names in (QUERIES, OUTPUTS))
    if leaf.name.role is Role.ATTENTION_OUT:
        out = leaf
    if query is None or out is None or len(query.shape) != len(out.shape):
        return readings

    def agrees(reading: Reading) -> bool:
        axes = reading.layer_axes
        if any(query.shape[axis] != out.shape[axis] for axis in axes):
            return False
        q, o = without(query.shape, axes), without(out.shape, axes)
        form = reading.form
        assert form is not None
        if not form.kind.startswith("attention"):
            return q[:-2] == o[:-2] and q[-1] == o[-2]
        if len(q) < 3:
            return False
        stands_first = form.output[0] < form.reduction[0] < form.output[-1]
        if form.output == (len(o) - 1,):
            stands_first = query.name.is_einsum and q[-2:] != o[-3:-1]
        return ((q[-3], q[-1]) if stands_first else q[-2:]) == o[-3:-1]

    return [reading for reading in readings if agrees(reading)] or readings


def _fitting_factor(leaf: Leaf, neighbours: Neighbours, readings: list[Reading]) -> list[Reading]:
    """Those with a side as long as the adapter's rank, which its two factors share; all, if there is
    none such."""
    ranks = neighbours.adapter_ranks(leaf)
    fitting = []
    for reading in readings:
        assert reading.layout is not None
        view = reading.layout.on(leaf.shape)
        if ranks & {view.inputs, *view.output_sizes}:
            fitting.append(reading)
    return fitting or readings
