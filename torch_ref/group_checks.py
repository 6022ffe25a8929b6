"""What a parameter group may say, checked when the group is added."""

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch

from normuon_core.cost import check_algorithm
from normuon_core.hyperparameters import check_count, check_decay, check_rate
from torch_ref.kernels.backend import check_backend
from torch_ref.leaves.dtensor import is_dtensor
from torch_ref.leaves.group_keys import ADAMW, MATRIX, Group, read_adamw, settle_adamw
from torch_ref.leaves.groups import group_recipe, parameter_name, parameter_view
from torch_ref.steps.plan import GroupSpec


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
    if group["adam_every"] is not None:
        check_count(f"group {index}: adam_every", group["adam_every"])
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
    kept = group["momentum_dtype"]
    if kept is not None and not (kept.is_floating_point or kept == torch.int8):
        raise ValueError(
            f"group {index}: momentum_dtype={kept} cannot hold a mean of gradients; use a floating"
            " dtype, such as torch.bfloat16, or torch.int8, or None."
        )
    for key in ("lr_mul", "wd_mul"):
        many = np.ndim(group[key]) > 0
        group[key] = _array(group[key]) if many else float(group[key])
    if group["optimizer"] == MATRIX:
        recipe = group_recipe(group)
        group["momentum"] = recipe.momentum.momentum
        check_algorithm(group["algorithm"])
        check_backend(group["backend"], recipe, kept)
        if group["backend"] == "triton" and group["orthogonalizer"] is not None:
            raise ValueError(
                f"group {index}: backend='triton' has its own orthogonalization; leave the"
                " orthogonalizer out, or use backend='auto'."
            )
    for position, param in enumerate(group["params"]):
        _check_parameter(param, group, parameter_name(group, index, position))
    if group["optimizer"] == ADAMW:
        settle_adamw(group)


def _array(values: npt.ArrayLike | torch.Tensor) -> torch.Tensor:
    """A float64 tensor: a tensor stays on its device, all else is put on the CPU.

    (The user's default device may be "meta", which holds no numbers.)
    """
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
        from torch_ref.mesh.rectangles import check_placement

        check_placement(param, name)
        if matrix and group["backend"] == "triton":
            raise ValueError(
                f"{name}: backend='triton' takes plain tensors, and this is a DTensor with placements"
                f" {tuple(param.placements)} on {param.device_mesh}; use backend='auto', or replicated"
                " parameters with NorMuon(..., process_group=...)."
            )
    if matrix and group["backend"] == "triton":
        _check_kernels(param, group, name)
    batch_shape = ()
    if matrix:
        view = parameter_view(group, param, name)
        batch_shape = view.batch_shape
        if is_dtensor(param):
            from torch_ref.mesh.rectangles import check_blocks, check_unfolding

            check_unfolding(param, view, name)
            if group["momentum_dtype"] == torch.int8:
                check_blocks(param, view, name)
    for key in ("lr_mul", "wd_mul"):
        shape = tuple(np.shape(group[key]))
        if not _broadcasts(shape, batch_shape):
            raise ValueError(
                f"{name}: {key} of shape {shape} does not fit the batch axes {batch_shape}; give a"
                " number, or one number a matrix."
            )


def _check_kernels(param: torch.Tensor, group: Group, name: str) -> None:
    """Raises a ValueError that names the parameter if the kernels cannot multiply its matrices here."""
    # Triton is an extra, and these import it.
    from normuon_core.kernels.products import check_products
    from torch_ref.kernels.launcher import describe_device

    view = parameter_view(group, param, name)
    iteration = GroupSpec.of(group, group_recipe(group), ()).iteration
    for run in view.runs:
        _, rows, columns = view.block_stack_shape(run.size)
        _, dtype = iteration.form(rows, columns)
        try:
            check_products(describe_device(param.device), dtype, (rows, columns))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    try:
        return torch.broadcast_shapes(shape, target) == torch.Size(target)
    except RuntimeError:
        return False


def check_process_group(group: Group, index: int) -> None:
    """Raises a ValueError for a DTensor in plain data parallelism."""
    for position, param in enumerate(group["params"]):
        if is_dtensor(param):
            raise ValueError(
                f"{parameter_name(group, index, position)}: a DTensor with placements"
                f" {tuple(param.placements)} on {param.device_mesh} is divided already, and its"
                " gradient is summed by whoever made it; leave process_group out."
            )


def check_gradients(groups: Sequence[Group]) -> None:
    """Raises a RuntimeError for a gradient that cannot be stepped by, and names its parameter."""
    for index, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{parameter_name(group, index, position)}: NorMuon does not support a"
                    f" gradient of layout {param.grad.layout}; make it dense (sparse=False in"
                    " torch.nn.Embedding), or give the parameter to torch.optim.SparseAdam."
                )
            if param.grad is not None and is_dtensor(param):
                from torch_ref.mesh.rectangles import check_gradient

                check_gradient(param, param.grad, parameter_name(group, index, position))
