"""What a parameter group says of each of its parameters."""

from functools import lru_cache

import torch

from normuon_core import MatrixLayout, MatrixView, Recipe, find_recipe
from torch_ref.leaves.group_keys import Group
from torch_ref.leaves.part import Part, whole_region

OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)
"""How `torch.nn.Linear` stores a weight, or a stack of them."""


def parameter_name(group: Group, group_index: int, position: int) -> str:
    """What an error calls a parameter: its place, its name if the group has names, and its shape."""
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
    return _view(group["layout"] or OUT_IN, tuple(param.shape), name)


@lru_cache(maxsize=4096)
def _view(layout: MatrixLayout, shape: tuple[int, ...], name: str) -> MatrixView:
    return layout.on(shape, name)


@lru_cache(maxsize=4096)
def whole_part(view: MatrixView) -> Part:
    """All of a weight."""
    return Part(view, whole_region(view.stored_shape))
