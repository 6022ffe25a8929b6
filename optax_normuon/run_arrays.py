"""A run as named arrays: parameters and the optimizer's state, to be moved to PyTorch or saved."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from optax.contrib import MuonState

from normuon_core.layout import MatrixView
from normuon_core.moving.format import ADAMW, MATRIX, Arrays, Kept, matrices_of, written_metadata
from normuon_core.moving.matching import Wanted, matching_parameters, matching_state
from normuon_core.moving.settings import settings_of_int8
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.quantization import dequantized, quantized
from optax_normuon.mesh.found_views import Found, found
from optax_normuon.mesh.scales import SCALE
from optax_normuon.mesh.state_specs import state_specs
from optax_normuon.state_entries import Entry, parameter_names, state_entries

_OF_OPTAX = {
    "momentum": {"rule": "bias_corrected"},
    "row_equilibration": None,
    "norm_setting": None,
    "neuron_norm": None,
    "hyperball": None,
}
"""What `optax.contrib.muon`'s state tells of its settings; its other keywords are in no array."""


def state_to_arrays(
    tx: optax.GradientTransformation, state: optax.OptState, params: optax.Params
) -> Arrays:
    """The whole state of an optimizer as named NumPy arrays, for `state_from_arrays` of either package.

        arrays = parameters_to_arrays(params) | state_to_arrays(tx, state, params)
        np.savez("run.npz", **arrays)

    The format is described in `normuon_core.moving.format`.

    Args:
      tx: `normuon`, `muon`, `with_bf16_remainder` of one, a chain or partition of such, a stage alone,
        or `optax.contrib.muon`.
      state: of `tx`; arrays that are divided over processes are gathered, and all of them must call.
      params: arrays or abstract arrays; they give the state its names, those of `describe`.

    Returns:
      Copies on the host in their own dtypes.

    Raises:
      ValueError: state that the format has no name for, as that of `optax.MultiSteps`, schedules that
        have counted differently, or AdamW's updates of another `adam_every` than that of `tx`.
    """
    _, noted = found(tx, params)
    entries = state_entries(state, params)
    arrays: Arrays = {}
    counts, updates = {}, {}
    for each in entries:
        value = _on_host(each.value)
        if each.kind == "count":
            counts[jax.tree_util.keystr(each.path)] = int(value)
            continue
        if each.kind == "update":
            updates |= dict.fromkeys(each.names, int(value))
            continue
        for name in each.names:
            arrays[f"{each.kind}/{name}"] = (
                np.array(value, np.int64) if each.kind == "step" else value
            )
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"the schedules of the state have counted differently, and the common format has one count:"
            f" {counts}. Move each optimizer's part of the state by itself."
        )
    wanted = _wanted(entries, noted, params)
    _check_updates(updates, arrays, wanted)
    views = _views_of_int8(entries, noted, params)
    for name, view in views.items():
        q, scale = (arrays.pop(f"{kind}/{name}") for kind in ("momentum", SCALE))
        _, dtype = wanted[name].arrays["momentum"]
        arrays[f"momentum/{name}"] = _on_host(_in_floats(q, scale, view, dtype))
    steps = [int(array) for key, array in arrays.items() if key.startswith("step/")]
    count = next(iter(counts.values()), max(steps, default=0))
    kept = {name: each.kept for name, each in wanted.items()}
    return {"metadata": written_metadata(kept), "count": np.array(count, np.int64), **arrays}


def state_from_arrays(
    tx: optax.GradientTransformation,
    arrays: Mapping[str, np.ndarray],
    params: optax.Params,
    *,
    changed: Collection[str] = (),
) -> optax.OptState:
    """A state for `tx`, so that the run of `state_to_arrays` goes on.

    Each array lies as the parameter's state does. Schedules go on at the run's count.

    Args:
      tx: made with that run's settings, see `state_to_arrays`.
      arrays: what `state_to_arrays` of either package made, or `numpy.load` has read; arrays of
        parameters among them are left out. The names must be those of `params`:
        `normuon_core.moving.NameTable` renames.
      params: arrays, or `jax.ShapeDtypeStruct`s with shardings.
      changed: settings that may differ from that run's, by the names that the error gives.

    Raises:
      ValueError: names that one side lacks, a parameter that the other run stepped by another optimizer,
        other settings, other matrices, an array of another shape or dtype, or parameters that have been
        stepped differently often where one counter is kept for them.
    """
    abstract, noted = found(tx, params)
    entries = state_entries(abstract, params)
    wanted = _wanted(entries, noted, params)
    own = matching_state(arrays, wanted, changed)
    for name, view in _views_of_int8(entries, noted, params).items():
        q, scale = _in_int8(own[name]["momentum"], view)
        own[name] |= {"momentum": _on_host(q), SCALE: _on_host(scale)}
    count = int(np.asarray(arrays["count"]))
    settings = {name: each.kept.settings for name, each in wanted.items()}
    values = {each.path: _value(each, own, count, settings) for each in entries}
    sharding_of = _state_shardings(tx, params)

    def place(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path not in values:
            raise ValueError(
                f"the state has a constant at {jax.tree_util.keystr(path)}, which the common format does"
                " not keep; load into optax_normuon.normuon(rate, recipe='optax_muon') to go on with"
                " optax.contrib.muon's run."
            )
        return _placed(np.asarray(values[path], leaf.dtype), sharding_of(path))

    return jax.tree_util.tree_map_with_path(place, abstract)


def parameters_to_arrays(params: optax.Params) -> Arrays:
    """Parameters as NumPy arrays `parameter/NAME`, beside the state's in one file."""
    return {
        f"parameter/{name}": _on_host(leaf) for name, (_, leaf) in parameter_names(params).items()
    }


def parameters_from_arrays(arrays: Mapping[str, np.ndarray], params: optax.Params) -> optax.Params:
    """The arrays `parameter/NAME` as a tree like `params`, divided as these are.

    Args:
      arrays: others than parameters are left out.
      params: arrays, or `jax.ShapeDtypeStruct`s with shardings.

    Raises:
      ValueError: names that one side lacks, or an array of another shape or dtype.
    """
    own = parameter_names(params)
    wanted = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, (_, x) in own.items()}
    found_arrays = matching_parameters(arrays, wanted)
    leaves = {path: found_arrays[name] for name, (path, _) in own.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _placed(leaves[path], _sharding(leaf)), params
    )


def parameter_shapes(params: optax.Params) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by its name, for `normuon_core.moving.derive_table`.

    Args:
      params: arrays or abstract arrays.
    """
    return {name: tuple(leaf.shape) for name, (_, leaf) in parameter_names(params).items()}


def _wanted(entries: list[Entry], noted: Found, params: optax.Params) -> dict[str, Wanted]:
    """What the state keeps of each parameter, by name."""
    arrays: dict[str, dict[str, tuple[tuple[int, ...], np.dtype]]] = {}
    for each in entries:
        if each.kind not in ("step", "update", "count"):
            own = arrays.setdefault(each.names[0], {})
            own[each.kind] = (tuple(each.value.shape), np.dtype(each.value.dtype))
    parameters = parameter_names(params)
    of_optax = {name for each in entries if each.state is MuonState for name in each.names}
    result = {}
    for name, own in arrays.items():
        path, leaf = parameters[name]
        settings = noted.settings.get(path)
        if settings is None:
            settings = {"optimizer": MATRIX if "momentum" in own else ADAMW}
            settings |= _OF_OPTAX if name in of_optax else {}
        in_int8 = own.pop(SCALE, None) is not None
        if in_int8:
            shape, _ = own["momentum"]
            own["momentum"] = (shape, np.dtype(working_dtype(leaf.dtype)))
        if "momentum" in own:
            settings = {**settings, **settings_of_int8(in_int8)}
        matrices = matrices_of(noted.views[path]) if path in noted.views else ()
        result[name] = Wanted(Kept(settings, matrices), own)
    return result


def _check_updates(
    updates: Mapping[str, int], arrays: Arrays, wanted: Mapping[str, Wanted]
) -> None:
    """Refuses numbers of updates, by parameter, that do not follow from its steps: a file has these."""
    for name, done in updates.items():
        steps, every = int(arrays[f"step/{name}"]), wanted[name].kept.settings["every"]
        if done != steps // every:
            raise ValueError(
                f"{name}: AdamW has made {done} updates in {steps} steps, and with adam_every={every}"
                f" they would be {steps // every}; hand over the transformation that made the state. A"
                " run whose adam_every was changed on the way cannot be moved."
            )


def _views_of_int8(
    entries: list[Entry], noted: Found, params: optax.Params
) -> dict[str, MatrixView]:
    """The parameters whose momentum is kept in int8, and their matrices."""
    paths = {name: path for name, (path, _) in parameter_names(params).items()}
    scaled = [each.names[0] for each in entries if each.kind == SCALE]
    return {name: noted.views[paths[name]] for name in scaled}


@partial(jax.jit, static_argnames=("view", "dtype"))
def _in_floats(q: jax.Array, scale: jax.Array, view: MatrixView, dtype: np.dtype) -> jax.Array:
    """What the integers stand for."""
    return dequantized({(): q}, {(): scale}, {(): dtype}, {(): view}, None)[()]


@partial(jax.jit, static_argnames="view")
def _in_int8(momentum: jax.Array, view: MatrixView) -> tuple[jax.Array, jax.Array]:
    """(the integers, their scales)."""
    q, scale = quantized({(): momentum}, {(): view}, None)
    return q[()], scale[()]


def _value(each: Entry, own: Mapping[str, Arrays], count: int, noted: Mapping[str, Any]) -> Any:
    """What the array of an entry becomes.

    Args:
      own: by parameter. noted: the settings by parameter.
    """
    if each.kind == "count":
        return count
    if each.kind not in ("step", "update"):
        return own[each.names[0]][each.kind]
    steps = {name: int(own[name]["step"]) for name in each.names}
    most = max(steps.values(), default=count)
    corrected = any(_reads_its_step(noted.get(name, {})) for name in each.names)
    fewest = min(steps, key=steps.__getitem__, default="")
    if corrected and steps[fewest] < most:
        raise ValueError(
            f"step/{fewest}: it has been stepped {steps[fewest]} times and others {most} times, and JAX"
            " counts once for all that it corrects for their start at zero. Give every parameter a"
            " gradient at every step, zeros where there is none, or leave this one out of both runs."
        )
    if each.kind == "update" and each.names:
        return most // noted[each.names[0]]["every"]
    return most


def _reads_its_step(settings: Mapping[str, Any]) -> bool:
    """Whether an update depends on the number of the step, apart from schedules."""
    momentum = settings.get("momentum", {})
    return settings.get("optimizer") != MATRIX or momentum.get("rule") not in ("lerp", "heavy_ball")


def _state_shardings(
    tx: optax.GradientTransformation, params: optax.Params
) -> Callable[[KeyPath], Any]:
    """Where an array of the state is to lie, by its path; None stands for JAX's default."""
    shardings = [_sharding(leaf) for leaf in jax.tree.leaves(params)]
    if shardings and all(isinstance(each, NamedSharding) for each in shardings):
        specs = state_specs(tx, params, jax.tree.map(_sharding, params))
        by_path = dict(jax.tree_util.tree_flatten_with_path(specs)[0])
        return by_path.__getitem__
    own = shardings[0] if shardings else None
    return lambda _: own


def _sharding(leaf: Any) -> Any:
    return getattr(leaf, "sharding", None)


def _placed(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _on_host(value: Any) -> np.ndarray:
    """A copy of the whole array, row-major, as safetensors takes every array to be."""
    if isinstance(value, jax.Array) and not (
        value.is_fully_addressable or value.is_fully_replicated
    ):
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.array(value, order="C")
