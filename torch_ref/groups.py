"""What a parameter group may say, checked when the group is added."""

from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from normuon_core import MatrixLayout, MatrixView, Recipe, find_recipe
from normuon_core.hyperparameters import check_decay, check_rate
from normuon_core.polar_iteration import check_algorithm
from torch_ref.group_keys import ADAMW, MATRIX, Group, read_adamw, settle_adamw
from torch_ref.launcher import check_backend
from torch_ref.local import is_dtensor

OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)
"""How `torch.nn.Linear` stores a weight, or a stack of them."""


def parameter_name(group: Group, group_index: int, position: int) -> str:
    """What an error calls a parameter: its place, its name where the group has names, its shape."""
    place = f"group {group_index}, parameter {position}"
    if "param_names" in group:
        place += f" ({group['param_names'][position]})"
    return f"{place}, of shape {tuple(group['params'][position].shape)}"


def group_recipe(group: Group) -> Recipe:
    """The group's recipe with the group's own keywords put in.

    Raises:
      ValueError: an unknown recipe or shape rule, or `beta2` for a recipe without neuron
        normalization.
    """
    return find_recipe(group["recipe"]).override(
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        beta2=group["beta2"],
        shape_scale=group["shape_scale"],
        coefficients=group["coefficients"],
        steps=group["steps"],
        eps=group["eps"],
    )


def parameter_view(group: Group, param: torch.Tensor, name: str = "parameter") -> MatrixView:
    """Where the group's layout finds the matrices of a parameter.

    Raises:
      ValueError: a parameter of fewer than two axes, or a layout that does not fit its shape.
    """
    if param.ndim < 2:
        raise ValueError(
            f"{name}: a parameter of {param.ndim} axes is no matrix; put it in a group with"
            " optimizer='adamw'."
        )
    if group["layout"] is None and param.ndim > 2:
        inputs = tuple(range(1, param.ndim))
        raise ValueError(
            f"{name}: {param.ndim} axes can be read in two ways; give the group"
            f" layout={MatrixLayout(inputs, 0)} for a convolution, or layout={OUT_IN} for a stack of"
            " (out, in) matrices. torch_ref.param_groups(model) makes groups with their layouts from"
            " the modules' types."
        )
    return (group["layout"] or OUT_IN).on(tuple(param.shape), name)


def settle_group(group: Group, index: int, given: Collection[str]) -> None:
    """Checks a group and fills in what its recipe decides; `group` changes in place.

    `momentum=None` becomes the recipe's, so that a scheduler finds a number there. Multipliers
    given as arrays become float64 tensors. A group of AdamW gets `torch.optim.AdamW`'s keys.

    Args:
      given: the keys that the user wrote into the group.

    Raises:
      ValueError: an unknown recipe, optimizer, algorithm or shape rule; a negative or non-finite
        rate; a decay rate outside [0, 1); a layout, splits or multipliers that do not fit a
        parameter.
      TypeError: a complex or integer parameter.
    """
    if group["optimizer"] == ADAMW:
        read_adamw(group, given, index)
    if group["optimizer"] not in (MATRIX, ADAMW):
        raise ValueError(
            f"group {index}: unknown optimizer {group['optimizer']!r}; use {MATRIX!r} or {ADAMW!r}."
        )
    for key in ("lr", "weight_decay", "adam_weight_decay", "adam_eps", "adam_eps_root"):
        check_rate(f"group {index}: {key}", float(group[key]))
    for key in ("momentum", "beta2", "adam_b1", "adam_b2"):
        if group[key] is not None:
            check_decay(f"group {index}: {key}", float(group[key]))
    if group["max_stack_bytes"] is not None and group["max_stack_bytes"] <= 0:
        raise ValueError(
            f"group {index}: max_stack_bytes={group['max_stack_bytes']}; use a positive number."
        )
    moment = group["adam_moment_dtype"]
    if moment is not None and not moment.is_floating_point:
        raise ValueError(
            f"group {index}: adam_moment_dtype={moment} cannot hold a mean of gradients; use a floating"
            " dtype, such as torch.bfloat16, or None."
        )
    for key in ("lr_mul", "wd_mul"):
        many = np.ndim(group[key]) > 0
        group[key] = _array(group[key]) if many else float(group[key])
    if group["optimizer"] == MATRIX:
        group["momentum"] = group_recipe(group).momentum.momentum
        check_algorithm(group["algorithm"])
        check_backend(group["backend"])
        if group["backend"] == "triton" and group["orthogonalizer"] is not None:
            raise ValueError(
                f"group {index}: backend='triton' has its own orthogonalization; leave the"
                " orthogonalizer out, or use backend='auto'."
            )
    for position, param in enumerate(group["params"]):
        _check_parameter(param, group, parameter_name(group, index, position))
    if group["optimizer"] == ADAMW:
        settle_adamw(group)


def _array(values: Any) -> torch.Tensor:
    """float64, where it is or on the CPU: the user's default device may be one that holds no numbers."""
    if not isinstance(values, torch.Tensor):
        values = torch.as_tensor(values, device="cpu")
    return values.double()


def _check_parameter(param: torch.Tensor, group: Group, name: str) -> None:
    if not param.is_floating_point():
        raise TypeError(
            f"{name}: dtype {param.dtype} cannot be trained here; NorMuon takes real floating-point"
            " parameters. Split a complex parameter with torch.view_as_real."
        )
    if group["bf16_remainder"] and param.dtype == torch.float16:
        raise ValueError(
            f"{name}: bf16_remainder keeps the lower half of a bfloat16 parameter, but this one is"
            " float16; make it bfloat16 or leave bf16_remainder out."
        )
    matrix = group["optimizer"] == MATRIX
    if is_dtensor(param):
        from torch_ref.placement import check_placement

        check_placement(param, name)
        if matrix and group["backend"] == "triton":
            raise ValueError(
                f"{name}: backend='triton' takes plain tensors, and this is a DTensor with placements"
                f" {tuple(param.placements)} on {param.device_mesh}; use backend='auto', or replicated"
                " parameters with NorMuon(..., process_group=...)."
            )
    if matrix and group["backend"] == "triton":
        from torch_ref.kernel_step import check_kernels

        check_kernels(param, group, name)
    batch_shape = ()
    if matrix:
        view = parameter_view(group, param, name)
        batch_shape = view.batch_shape
        if is_dtensor(param):
            from torch_ref.placement import check_unfolding

            check_unfolding(param, view, name)
    for key in ("lr_mul", "wd_mul"):
        shape = tuple(np.shape(group[key]))
        if not _broadcasts(shape, batch_shape):
            raise ValueError(
                f"{name}: {key} of shape {shape} does not fit the batch axes {batch_shape}; give a"
                " number, or one number a matrix."
            )


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return torch.broadcast_shapes(shape, target) == torch.Size(target)
    except RuntimeError:
        return False
