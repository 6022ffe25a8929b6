"""Output heads and embeddings that no name gives away: matrices at the outside of the model."""

from normuon_core.names import QUERIES, Role
from optax_normuon.leaves.evidence import Leaf, Neighbours
from optax_normuon.leaves.readings import Reading, Shape
from optax_normuon.leaves.route import Route, in_doubt_between

_TABLE = "an embedding, or another table of vectors"


def route_at_the_outside(leaf: Leaf, reading: Reading, neighbours: Neighbours) -> Route:
    """What becomes of a leaf that reads as a linear layer: a matrix, unless its outputs or inputs are
    the model's own, such as labels or a vocabulary."""
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
        return in_doubt_between([Reading(_TABLE, None), reading])
    return linear_layer


def _sides(shape: Shape, reading: Reading) -> tuple[int, int]:
    """(inputs, outputs)."""
    layout = reading.layout
    assert layout is not None
    view = layout.on(shape)
    return view.inputs, view.output_sizes[0]


def _head_or(reading: Reading) -> Route:
    return in_doubt_between([Reading("an output head", None), reading])
