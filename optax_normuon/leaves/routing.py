"""Which leaves are matrices, by path and shape, and which go to AdamW.

A name suggests a role (`normuon_core.names`), the role suggests readings (`readings`), and the leaf's
neighbours say which of them can be (`evidence`). Where more than one is left the leaf is in doubt: it
is asked about, because a guess would train the wrong thing.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from optax.contrib import MuonDimensionNumbers

from normuon_core.layout import MatrixLayout
from normuon_core.names import OUTPUTS, QUERIES, Role
from optax_normuon.leaves.evidence import Leaf, Neighbours, without
from optax_normuon.leaves.paths import KeyPath, named_leaves, path_parts, unmet_pattern
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

LeafLayout = MatrixLayout | MuonDimensionNumbers | None


class Route(NamedTuple):
    """What becomes of a leaf: a layout, or None for AdamW, and why; the readings that are left if any
    doubt is."""

    layout: MatrixLayout | None
    why: str
    readings: tuple[Reading, ...] = ()

    @property
    def in_doubt(self) -> bool:
        return bool(self.readings)


NO_ENTRIES = Route(None, "no entries")
_TABLE = "an embedding, or another table of vectors"
# A window over time that each channel has to itself is short: Mamba's and RecurrentGemma's have 4.
_LONGEST_WINDOW = 16


def route(params, overrides: Mapping[str, LeafLayout] | None = None) -> dict[KeyPath, Route]:
    """What becomes of every leaf; leaves that can be read in two ways are `in_doubt`.

    Args:
      params: arrays or abstract arrays.
      overrides: layouts by path pattern (`fnmatch`), for the leaves that the rules should not decide.

    Raises:
      ValueError: a pattern that meets no leaf.
    """
    overrides = overrides or {}
    leaves = named_leaves(params)
    unmet = unmet_pattern(overrides, params)
    if unmet is not None:
        raise ValueError(
            f"layout_by_path: the pattern {unmet!r} meets no leaf; the leaves are"
            f" {', '.join(name for _, name, _ in leaves)}."
        )
    if not leaves:
        return {}
    neighbours = Neighbours(
        (name, path_parts(path), tuple(np.shape(leaf))) for path, name, leaf in leaves
    )
    routes = {}
    for (path, name, _), leaf in zip(leaves, neighbours.leaves, strict=True):
        pattern = next((p for p in overrides if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            routes[path] = _route_leaf(leaf, neighbours)
        else:
            chosen = overrides[pattern]
            layout = None if chosen is None else as_matrix_layout(name, chosen)
            routes[path] = Route(layout, f"layout given for {pattern}")
    return routes


def _route_leaf(leaf: Leaf, neighbours: Neighbours) -> Route:
    role, shape = leaf.name.role, leaf.shape
    if len(shape) < 2:
        return Route(None, "no matrix")
    if math.prod(shape) == 0:
        return NO_ENTRIES
    if role is Role.EMBEDDING:
        return Route(None, "embedding")
    if role is Role.HEAD:
        return Route(None, "output head")
    if role is Role.VECTOR:
        return Route(None, f"a stack of vectors: {leaf.name.parts[-1]}")
    if role in (Role.NORM, Role.STATE_SPACE):
        return Route(None, role.value)
    if math.prod(shape) == max(shape):
        return Route(None, "a vector: one side is 1")
    if leaf.name.is_raw and shape[0] == 1 and role is Role.UNKNOWN:
        return Route(None, "a learned token or position: its first axis is 1")
    readings = _readings(leaf, neighbours)
    if len(readings) > 1:
        return _asked(readings)
    (reading,) = readings
    if reading.layout is None or reading.form is None:
        return Route(None, reading.meaning)
    found = _matrix_unless_vector(shape, reading)
    if found.layout is None or len(shape) != 2:
        return found
    return _at_the_outside(leaf, reading, neighbours)


def _asked(readings: Sequence[Reading]) -> Route:
    # More layers than a matrix has rows or columns are the less likely reading.
    readings = sorted(readings, key=lambda r: r.has_more_layers_than_sides)
    return Route(None, " | ".join(reading.meaning for reading in readings), tuple(readings))


def _matrix_unless_vector(shape: Shape, reading: Reading) -> Route:
    layout, form = reading.layout, reading.form
    assert layout is not None
    assert form is not None
    if form.one_input_channel is not None:
        own = without(shape, reading.layer_axes)
        if own[form.one_input_channel] == 1:
            return Route(None, "convolution with one input channel a group")
    _, rows, columns = layout.on(shape).stack_shape
    if min(rows, columns) == 1:
        return Route(None, "a vector: one side is 1")
    return Route(layout, reading.meaning)


# Heads and embeddings that no name gives away


def _at_the_outside(leaf: Leaf, reading: Reading, neighbours: Neighbours) -> Route:
    """A matrix, unless its outputs or inputs are the model's own: words, labels, a vocabulary."""
    linear_layer = Route(reading.layout, reading.meaning)
    role = leaf.name.role
    if role in (Role.ADAPTER, Role.LINEAR, Role.ATTENTION_IN) or neighbours.is_repeated(leaf):
        return linear_layer
    if role is Role.ATTENTION_OUT and neighbours.beside(leaf, QUERIES) is not None:
        return linear_layer
    if (
        leaf.name.owner_place == len(leaf.parts) - 1
        and not leaf.name.is_raw
        and role is Role.UNKNOWN
    ):
        # One of the weights that a layer has by names of its own, as a recurrent cell.
        return linear_layer
    inputs, outputs = _sides(leaf.shape, reading)
    vocabulary = {table.shape for table in neighbours.tables if table is not leaf}
    taken = neighbours.taken(leaf, outputs)
    outermost = neighbours.is_outermost(leaf)
    if any(outputs == words for words, _ in vocabulary) and (outermost or not taken):
        return Route(None, f"output head: {outputs} out, as many as the embedding has rows")
    if outermost and leaf.name.owner == ["output"] and not leaf.name.is_listed:
        return Route(None, "output head")
    if neighbours.matrices < 2:
        return _head_or(reading) if leaf.name.is_head_like else linear_layer
    plain = role in (Role.PLAIN, Role.ATTENTION_OUT)
    chained = neighbours.follows(leaf, inputs)
    if not taken and neighbours.is_last(leaf):
        if leaf.name.is_in_head or (plain and (outermost or chained)):
            return Route(None, f"output head: no layer takes its {outputs} outputs")
        if outermost or plain:
            return _head_or(reading)
    if taken == "in parts" and outermost and plain and neighbours.is_last(leaf) and chained:
        return _head_or(reading)
    bare = outermost and leaf.name.is_raw and role is Role.UNKNOWN
    if bare and inputs > outputs and not neighbours.makes(leaf, inputs):
        return _asked([Reading(_TABLE, None), reading])
    return linear_layer


def _sides(shape: Shape, reading: Reading) -> tuple[int, int]:
    layout = reading.layout
    assert layout is not None
    view = layout.on(shape)
    return view.inputs, view.output_sizes[0]


def _head_or(reading: Reading) -> Route:
    return _asked([Reading("an output head", None), reading])


# How a leaf can be read


def _readings(leaf: Leaf, neighbours: Neighbours) -> list[Reading]:
    """What is left of the name's suggestions by the neighbours, else of everything."""
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


def _layer_axes(leaf: Leaf, neighbours: Neighbours) -> tuple[tuple[int, ...], ...]:
    choices = neighbours.layer_axes(leaf)
    if len(choices) == 1 or neighbours.bias(leaf) is not None or len(leaf.shape) == 2:
        return choices
    is_convolution = leaf.name.role in (Role.CONVOLUTION, Role.TRANSPOSED_CONVOLUTION)
    return ((),) if is_convolution and not leaf.name.is_scanned else choices


def _flat(leaf: Leaf, neighbours: Neighbours, choices) -> list[Reading]:
    """Two axes: a linear layer, or as many vectors as there are layers."""
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


def _candidates(leaf: Leaf, neighbours: Neighbours, choices, forms) -> list[Reading]:
    found: dict[Any, Reading] = {}
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


def _settled(leaf: Leaf, neighbours: Neighbours, readings: list[Reading], *, with_bias: bool):
    """The readings that agree with the attention around them, the width and how stacks look."""
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
        # Layers along the middle axis, of which there is no sign but the shape, and not even that.
        readings = [
            r for r in readings if r.layer_axes != (1,) or not r.has_more_layers_than_sides
        ] or readings
    return readings


def _of_the_width(leaf: Leaf, neighbours: Neighbours, readings: list[Reading]) -> list[Reading]:
    """Those with a side that is as long as the normalizations beside the leaf, where any has."""
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


def _fitting_attention(leaf: Leaf, neighbours: Neighbours, readings: list[Reading]):
    """With heads as axes, out is (heads, head_dim, d) where query is (d, heads, head_dim); a plain
    linear layer has query (d, k) and out (k, d)."""
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


def _fitting_factor(leaf: Leaf, neighbours: Neighbours, readings: list[Reading]):
    """The two factors of an adapter share its rank: the last axis of one, the first of the other."""
    ranks = neighbours.adapter_ranks(leaf)
    fitting = []
    for reading in readings:
        assert reading.layout is not None
        view = reading.layout.on(leaf.shape)
        if ranks & {view.inputs, *view.output_sizes}:
            fitting.append(reading)
    return fitting or readings


def as_matrix_layout(name: str, layout) -> MatrixLayout:
    """A leaf's layout as a `MatrixLayout`; `name` is what an error calls the leaf."""
    if isinstance(layout, MatrixLayout):
        return layout
    if isinstance(layout, MuonDimensionNumbers):
        reduction, output = (
            axes if isinstance(axes, int) else tuple(axes)
            for axes in (layout.reduction_axis, layout.output_axis)
        )
        return MatrixLayout(reduction, output)
    raise ValueError(
        f"{name}: a layout must be a MatrixLayout, an optax.contrib.MuonDimensionNumbers or None"
        f" (AdamW), got {layout!r}."
    )
