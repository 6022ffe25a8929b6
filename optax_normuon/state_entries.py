"""What each array of an optimizer's state is, whoever has wrapped the optimizer."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from optax.contrib import MuonState

from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.remainder import Bf16RemainderState
from optax_normuon.sphere import ProjectionState
from optax_normuon.stages.every_steps import EveryStepsState
from optax_normuon.stages.hyperball import SphereState
from optax_normuon.stages.momentum import Int8MomentumState, MomentumState
from optax_normuon.stages.neuron_norm import NeuronNormState
from optax_normuon.stages.weight_decay import WeightDecayState

_BY_LEAF: dict[type, dict[str, str]] = {
    MomentumState: {"momentum": "momentum"},
    Int8MomentumState: {"momentum": "momentum", "momentum_scale": "momentum_scale"},
    NeuronNormState: {"second_moment": "second_moment"},
    SphereState: {"radius": "radius"},
    ProjectionState: {"radius": "radius"},
    Bf16RemainderState: {"remainder": "remainder"},
    optax.ScaleByAdamState: {"mu": "exp_avg", "nu": "exp_avg_sq"},
    EveryStepsState: {"gradient_sum": "gradient_sum"},
    MuonState: {"mu": "momentum"},
}
"""The fields that are trees like the parameters, and what the common format calls them. It has no
scales: it writes an int8 momentum in floats."""

_COUNTING_STEPS = (
    MomentumState,
    Int8MomentumState,
    optax.ScaleByAdamState,
    EveryStepsState,
    MuonState,
)
"""States whose count is that of the leaves beside it."""

_COUNTING_SCHEDULES = (SphereState, WeightDecayState, optax.ScaleByScheduleState)

_STATES = (*_BY_LEAF, *_COUNTING_SCHEDULES)

_CONSTANTS = {(MuonState, "ns_coeffs")}
"""Fields that are settings of the transformation, the same at every step."""


class Entry(NamedTuple):
    """An array of the state.

    Attributes:
      path: in the state.
      kind: "momentum", ..., as the common format has it; "step", "update" where these are fewer than
        steps, or "count" of a schedule.
      names: of the parameters that it belongs to: one, or of a counter all that it counts for.
      value: the array, or what stands for it.
      state: the class of the state that has it.
    """

    path: KeyPath
    kind: str
    names: tuple[str, ...]
    value: Any
    state: type


def state_entries(state: optax.OptState, params: optax.Params) -> list[Entry]:
    """Every array of a state, in the state's order.

    Args:
      state: of arrays or abstract arrays. params: likewise.

    Raises:
      ValueError: an array of a transformation that the common format has no name for, or two parameters
        of one name.
    """
    return list(_entries(state, (), _names(params)))


def parameter_names(params: optax.Params) -> dict[str, tuple[KeyPath, Any]]:
    """(path, leaf) of every parameter by its name.

    Raises:
      ValueError: two parameters of one name.
    """
    result: dict[str, tuple[KeyPath, Any]] = {}
    for path, name, leaf in named_leaves(params):
        if name in result:
            raise ValueError(
                f"two parameters are called {name!r}: {jax.tree_util.keystr(result[name][0])} and"
                f" {jax.tree_util.keystr(path)}. Rename one of them."
            )
        result[name] = (path, leaf)
    return result


def _names(params: optax.Params) -> dict[KeyPath, str]:
    """The name of each parameter by its path, and by its box's: statistics stand outside of boxes."""
    parameters = unbox(params)
    places = dict(zip(parameters.paths, parameters.places, strict=True))
    names = {path: name for name, (path, _) in parameter_names(params).items()}
    return names | {places[path]: name for path, name in names.items() if path in places}


def _entries(node: Any, path: KeyPath, names: Mapping[KeyPath, str]) -> Iterator[Entry]:
    states, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda each: isinstance(each, _STATES)
    )
    for inner, each in states:
        if not isinstance(each, _STATES):
            raise ValueError(
                f"the state has an array at {jax.tree_util.keystr((*path, *inner))} that is neither"
                " momentum, second moment, radius, remainder, AdamW's moments or sum nor a counter, and"
                " the common format has no place for it. Give the transformation inside of the wrapper,"
                " and its part of the state, such as state.inner_opt_state of optax.MultiSteps."
            )
        yield from _entries_of(each, (*path, *inner), names)


def _entries_of(state: Any, path: KeyPath, names: Mapping[KeyPath, str]) -> Iterator[Entry]:
    """The arrays of one stage's state."""
    trees = _BY_LEAF.get(type(state), {})
    leaves: list[Entry] = []
    for field in state._fields:
        value, place = getattr(state, field), (*path, jax.tree_util.GetAttrKey(field))
        if field in trees:
            leaves += _leaves(value, place, trees[field], names, type(state))
        elif field == "count":
            continue
        elif (type(state), field) not in _CONSTANTS:
            for each in _entries(value, place, names):
                # AdamW steps at its updates only, if it is inside of `every_steps`.
                counts_updates = isinstance(state, EveryStepsState) and each.kind == "step"
                yield each._replace(kind="update") if counts_updates else each
    if "count" in state._fields:
        counts_steps = isinstance(state, _COUNTING_STEPS)
        counted = dict.fromkeys(name for leaf in leaves for name in leaf.names)
        yield Entry(
            (*path, jax.tree_util.GetAttrKey("count")),
            "step" if counts_steps else "count",
            tuple(counted) if counts_steps else (),
            state.count,
            type(state),
        )
    yield from leaves


def _leaves(
    tree: Any, path: KeyPath, kind: str, names: Mapping[KeyPath, str], state: type
) -> Iterator[Entry]:
    for own, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if own in names:
            yield Entry((*path, *own), kind, (names[own],), leaf, state)
        elif own[:-1] in names:
            # The statistics of a split leaf may be a tuple, one array a block.
            block = jax.tree_util.keystr(own[-1:], simple=True)
            yield Entry((*path, *own), f"{kind}.{block}", (names[own[:-1]],), leaf, state)
        else:
            raise ValueError(
                f"the state at {jax.tree_util.keystr((*path, *own))} belongs to none of the parameters;"
                " hand over the parameters that the state was made for."
            )
