"""A run as named arrays: parameters and the optimizer's state, to be moved to JAX or saved."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from normuon_core.moving.format import Arrays, Kept, matrices_of, written_metadata
from normuon_core.moving.matching import Wanted, matching_parameters, matching_state
from normuon_core.moving.settings import settings_of_adamw, settings_of_int8, settings_of_recipe
from torch_ref.arrays import as_array, as_tensor, numpy_dtype
from torch_ref.leaves.dtensor import is_dtensor
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.leaves.group_keys import MATRIX, Group, adamw_keywords, settle_adamw
from torch_ref.leaves.groups import group_recipe, parameter_name, parameter_view, whole_part
from torch_ref.leaves.part import Part
from torch_ref.matrices.quantization import dequantized, quantized
from torch_ref.matrices.state import moment_keys, moment_shapes
from torch_ref.optimizer import NorMuon
from torch_ref.stages.hyperball import starting_radii_shape
from torch_ref.steps.state import has_remainder, keeps_radius, radii_now

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NamedParameters = Iterable[tuple[str, torch.Tensor]]
"""As `model.named_parameters()` has them."""


def state_to_arrays(optimizer: NorMuon, named_parameters: NamedParameters) -> Arrays:
    """The whole state of an optimizer as named NumPy arrays, for `state_from_arrays` of either package.

        arrays = parameters_to_arrays(model.named_parameters())
        arrays |= state_to_arrays(optimizer, model.named_parameters())
        np.savez("run.npz", **arrays)

    The format is described in `normuon_core.moving.format`. A parameter that has never been stepped has
    the state that it would start from. Learning rates and their schedulers are not part of it.

    Args:
      optimizer: on one process, or on all ranks of a mesh or a process group, which must all call.
      named_parameters: gives every parameter of the optimizer its name.

    Returns:
      Copies on the CPU in their own dtypes, whole where ranks hold parts.

    Raises:
      ValueError: a parameter of the optimizer without a name.
    """
    arrays, kept, steps = {}, {}, [0]
    group = None if optimizer._parallel is None else optimizer._parallel.group
    for each in _owned(optimizer, named_parameters):
        state, wanted = optimizer.state.get(each.param, {}), _wanted(each)
        kept[each.name] = wanted.kept
        for kind, (shape, dtype) in wanted.arrays.items():
            arrays[f"{kind}/{each.name}"] = (
                _written(each, kind, state, group)
                if kind in state
                else _fresh(each, kind, shape, dtype)
            )
        steps.append(int(state.get("step", 0)))
        arrays[f"step/{each.name}"] = np.array(steps[-1], np.int64)
    return {"metadata": written_metadata(kept), "count": np.array(max(steps), np.int64), **arrays}


def state_from_arrays(
    optimizer: NorMuon,
    arrays: Mapping[str, np.ndarray],
    named_parameters: NamedParameters,
    *,
    changed: Collection[str] = (),
) -> None:
    """Puts a state into an optimizer, so that the run of `state_to_arrays` goes on.

    Each array lies as the parameter's state does: on its device, divided over its mesh, or with the
    owner of its matrix. Groups keep their options: give `lr`, and what a scheduler sets, their values of
    that step.

    Args:
      optimizer: made with that run's settings; its state is replaced.
      arrays: what `state_to_arrays` of either package made, or `numpy.load` has read; arrays of
        parameters among them are left out. The names must be those of `named_parameters`:
        `normuon_core.moving.NameTable` renames.
      named_parameters: as in `state_to_arrays`.
      changed: settings that may differ from that run's, by the names that the error gives.

    Raises:
      ValueError: names that one side lacks, a parameter that the other run stepped by another optimizer,
        other settings, other matrices, or an array of another shape or dtype; nothing is then changed.
    """
    owned = list(_owned(optimizer, named_parameters))
    found = matching_state(arrays, {each.name: _wanted(each) for each in owned}, changed)
    saved = optimizer.state_dict()
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    state = {
        number: _read(each, found[each.name]) for number, each in zip(numbers, owned, strict=True)
    }
    optimizer.load_state_dict({**saved, "state": state})


def parameters_to_arrays(named_parameters: NamedParameters) -> Arrays:
    """Parameters as NumPy arrays `parameter/NAME`, beside the state's in one file.

    Args:
      named_parameters: `model.named_parameters()`. All ranks of a DTensor's mesh must call.
    """
    return {f"parameter/{name}": as_array(param) for name, param in named_parameters}


@torch.no_grad()
def parameters_from_arrays(
    arrays: Mapping[str, np.ndarray], named_parameters: NamedParameters
) -> None:
    """Puts the arrays `parameter/NAME` into parameters, divided as these are.

    Args:
      arrays: others than parameters are left out.
      named_parameters: `model.named_parameters()`; changed in place.

    Raises:
      ValueError: names that one side lacks, or an array of another shape or dtype; nothing is then
        changed.
    """
    params = dict(named_parameters)
    wanted = {name: (tuple(p.shape), numpy_dtype(p.dtype)) for name, p in params.items()}
    for name, array in matching_parameters(arrays, wanted).items():
        param, value = params[name], as_tensor(array, params[name].device)
        if is_dtensor(param):
            from torch_ref.mesh.rectangles import sharding_of

            value = sharding_of(param).shard_of(value)
        param.copy_(value)


class _Owned(NamedTuple):
    """A parameter of the optimizer."""

    name: str
    param: torch.Tensor
    group: Group


def _owned(optimizer: NorMuon, named_parameters: NamedParameters) -> Iterator[_Owned]:
    """Every parameter of the optimizer with its name, in the groups' order."""
    names = {param: name for name, param in named_parameters}
    for index, group in enumerate(optimizer.param_groups):
        for position, param in enumerate(group["params"]):
            if param not in names:
                raise ValueError(
                    f"{parameter_name(group, index, position)}: the named parameters do not have it;"
                    " hand over model.named_parameters() of the model that the optimizer steps."
                )
            yield _Owned(names[param], param, group)


def _wanted(each: _Owned) -> Wanted:
    """What the optimizer keeps of a parameter."""
    group, param = dict(each.group), each.param
    shape, dtype = tuple(param.shape), working_dtype(param.dtype)
    if group["optimizer"] == MATRIX:
        recipe, view = group_recipe(group), parameter_view(group, param, each.name)
        in_int8 = group["momentum_dtype"] == torch.int8
        kept = Kept(settings_of_recipe(recipe) | settings_of_int8(in_int8), matrices_of(view))
        arrays = {"momentum": (shape, dtype if in_int8 else group["momentum_dtype"] or dtype)}
        if recipe.neuron_norm is not None:
            shapes = moment_shapes(view, recipe.neuron_norm)
            arrays |= {
                key: (own, dtype) for key, own in zip(moment_keys(len(shapes)), shapes, strict=True)
            }
        if keeps_radius(recipe):
            arrays["radius"] = (starting_radii_shape(view), dtype)
    else:
        settle_adamw(group)
        group = adamw_keywords(group)
        names = ("b1", "b2", "eps", "eps_root", "nesterov", "cautious", "every")
        kept = Kept(settings_of_adamw(**{name: group[f"adam_{name}"] for name in names}))
        arrays = {
            "exp_avg": (shape, group["adam_moment_dtype"] or dtype),
            "exp_avg_sq": (shape, dtype),
        }
        if (group["adam_every"] or 1) > 1:
            arrays["gradient_sum"] = (shape, dtype)
    if has_remainder(param, group):
        arrays["remainder"] = (shape, torch.uint16)
    return Wanted(kept, {kind: (own, numpy_dtype(of)) for kind, (own, of) in arrays.items()})


def _written(
    each: _Owned, kind: str, state: Mapping[str, torch.Tensor], group: "ProcessGroup | None"
) -> np.ndarray:
    """An array of a parameter's state as the format has it: an int8 momentum in floats."""
    array = as_array(state[kind], group)
    if state[kind].dtype != torch.int8:
        return array
    # Whole blocks may lie on several ranks, so that both are gathered before they are read.
    scales, cpu = as_array(state["momentum_scale"], group), torch.device("cpu")
    q, scale = as_tensor(array, cpu), as_tensor(scales, cpu)
    return as_array(dequantized(q, scale, _whole(each), working_dtype(each.param.dtype)))


def _read(each: _Owned, arrays: Arrays) -> dict[str, torch.Tensor]:
    """A parameter's state, whole, of the format's arrays."""
    state = {kind: as_tensor(array, each.param.device) for kind, array in arrays.items()}
    if each.group["optimizer"] == MATRIX and each.group["momentum_dtype"] == torch.int8:
        state["momentum"], state["momentum_scale"] = quantized(state["momentum"], _whole(each))
    return state


def _whole(each: _Owned) -> Part:
    return whole_part(parameter_view(each.group, each.param, each.name))


def _fresh(each: _Owned, kind: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """State from which a parameter starts."""
    if kind == "radius":
        return as_array(radii_now(each.param, parameter_view(each.group, each.param)))
    return np.zeros(shape, dtype)
