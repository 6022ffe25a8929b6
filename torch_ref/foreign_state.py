"""Checkpoints of other optimizers, translated so that the run goes on as it would have there.

`torch.optim.Muon` and Keller Jordan's Muon keep the same momentum as recipes with `lerp`; the
`torch.optim.AdamW` and Keller's auxiliary Adam keep the same moments as AdamW here.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from normuon_core import RECIPES, MatrixLayout, Recipe
from normuon_core.shape_rules import ShapeRule, shape_factor
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.leaves.group_keys import ADAMW, MATRIX, NOTES, Group
from torch_ref.leaves.groups import group_recipe, parameter_name, parameter_view, whole_part
from torch_ref.matrices.quantization import quantized

_TORCH_MUON = {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "ns_steps"}
_KELLER = {"lr", "weight_decay", "momentum"}
_KELLER_ADAM = {"lr", "weight_decay", "betas", "eps"}


def origin(saved: Group) -> str | None:
    """Whose group this is: "torch.optim.Muon", "Keller Jordan's Muon", "AdamW", or None."""
    keys = {*saved} - NOTES - {"use_muon"}
    if keys > _TORCH_MUON:
        return "torch.optim.Muon"
    if keys == _KELLER and saved.get("use_muon", True):
        return "Keller Jordan's Muon"
    if keys == _KELLER_ADAM or (keys > _KELLER_ADAM and "amsgrad" in keys):
        return "AdamW"
    return None


def translated_group(saved: Group, own: Group, index: int) -> Group:
    """The saved group's options in the words of this optimizer, those that it lacks from `own`.

    Raises:
      ValueError: a group that no translation exists for, or one whose run the own group's recipe,
        layout or kind of optimizer would not continue.
    """
    whose = origin(saved)
    notes = {key: saved[key] for key in NOTES & {*saved}}
    if whose is None:
        raise ValueError(
            f"group {index}: the file has the keys {', '.join(sorted({*saved} - NOTES))}, which are"
            " neither this optimizer's nor those of torch.optim.Muon, Keller Jordan's Muon or AdamW."
            " Its state cannot be continued here; start with a new optimizer state."
        )
    wanted = ADAMW if whose == "AdamW" else MATRIX
    if own["optimizer"] != wanted:
        raise ValueError(
            f"group {index}: the file's group is of {whose}, this one has"
            f" optimizer={own['optimizer']!r}; write the groups in the file's order, this one with"
            f" optimizer={wanted!r}."
        )
    if whose == "AdamW":
        _check_adamw(saved, index)
        return {**own, **notes, **{key: saved[key] for key in sorted(_KELLER_ADAM)}}
    return {**own, **notes, **_muon_options(whose, saved, own, index)}


def _muon_options(whose: str, saved: Group, own: Group, index: int) -> Group:
    if whose == "torch.optim.Muon":
        name, rule = "torch_muon", saved.get("adjust_lr_fn") or "original"
        published = RECIPES[name]
        coefficients = (tuple(saved["ns_coefficients"]),) * saved["ns_steps"]
        polar = replace(published.polar, coefficients=coefficients, eps=saved.get("eps", 1e-7))
        recipe = replace(published, polar=polar, shape_scale=rule)
        nesterov = saved["nesterov"]
    else:
        name, nesterov = "muon_keller", True
        recipe = RECIPES[name]
    _check_recipe(group_recipe(own), recipe, f"group {index}: the file is of {whose}", name)
    options = {
        "recipe": name if recipe == RECIPES[name] else recipe,
        "nesterov": nesterov,
        "shape_scale": None,
        "beta2": None,
    }
    # The recipe is the file's as a whole: the group's own coefficients, steps and eps do not change it.
    options |= {key: None for key in ("coefficients", "steps", "eps") if key in own}
    for position, param in enumerate(own["params"]):
        _check_matrix(param, own, recipe.shape_scale, parameter_name(own, index, position), whose)
    return options | {key: saved[key] for key in sorted(_KELLER)}


def _check_recipe(own: Recipe, of_file: Recipe, place: str, name: str) -> None:
    """Refuses a group whose stages do something else than the file's; numbers may differ."""
    kinds = [
        (
            r.momentum.rule,
            r.polar.eps_rule,
            r.polar.norm_scale,
            r.polar.preconditioning,
            r.row_equilibration,
            r.norm_setting,
            r.neuron_norm,
            r.decay,
        )
        for r in (own, of_file)
    ]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{place}, and the group's recipe is another optimizer; give the group recipe={name!r} to"
            " continue that run, or start with a new optimizer state."
        )


def _check_matrix(param: torch.Tensor, own: Group, rule: ShapeRule, name: str, whose: str) -> None:
    """Refuses a weight that the file's optimizer read as other matrices, or scaled otherwise."""
    convolution = param.ndim == 4
    layout = MatrixLayout((1, 2, 3), 0) if convolution else MatrixLayout(-1, -2)
    view = parameter_view(own, param, name)
    if view != layout.on(tuple(param.shape), name):
        raise ValueError(
            f"{name}: {whose} took it for matrices of layout={layout}, and the group has"
            f" layout={own['layout']}; give it the former to continue that run."
        )
    # Keller Jordan scales a filter by its stored shape, by sqrt(max(1, height / width)).
    if convolution:
        theirs = math.sqrt(max(1.0, param.shape[-2] / param.shape[-1]))
        ours = shape_factor(rule, param.shape[0], math.prod(param.shape[1:]))
        multiplier = torch.as_tensor(own["lr_mul"])
        if not torch.allclose(multiplier * ours, torch.as_tensor(theirs).to(multiplier)):
            raise ValueError(
                f"{name}: {whose} scales this convolution by {theirs:.6g}, this recipe by {ours:.6g};"
                f" put it into a group with lr_mul={theirs / ours!r} to continue that run."
            )


def _check_adamw(saved: Group, index: int) -> None:
    for key in ("amsgrad", "maximize"):
        if saved.get(key, False):
            raise ValueError(
                f"group {index}: the file's group has {key}=True, which AdamW here does not do; go on"
                " with torch.optim.AdamW for these parameters."
            )
    if not saved.get("decoupled_weight_decay", True) and saved["weight_decay"] != 0:
        raise ValueError(
            f"group {index}: the file's group is of torch.optim.Adam with"
            f" weight_decay={saved['weight_decay']} added to the gradient, and AdamW's is decoupled; go"
            " on with torch.optim.Adam for these parameters."
        )


def translated_state(
    state: Mapping[str, torch.Tensor], param: torch.Tensor, group: Group, name: str
) -> dict[str, torch.Tensor]:
    """A parameter's state under this optimizer's names, in its dtypes.

    Args:
      state: of the file. group: as translated.

    Raises:
      ValueError: state that the file's own optimizer does not keep.
    """
    dtype = working_dtype(param.dtype)
    if group["optimizer"] == MATRIX:
        own = group["momentum_dtype"] or dtype
        kept = {"momentum_buffer": ("momentum", dtype if own == torch.int8 else own)}
    else:
        moment = group.get("adam_moment_dtype") or dtype
        kept = {"exp_avg": ("exp_avg", moment), "exp_avg_sq": ("exp_avg_sq", dtype)}
    unknown = {*state} - {*kept, "step"}
    missing = {*kept} - {*state}
    if state and (unknown or missing):
        raise ValueError(
            f"{name}: the file's state has {', '.join(sorted(state))}, and"
            f" optimizer={group['optimizer']!r} continues from {', '.join(kept)}; write the groups in"
            " the file's order, or start with a new optimizer state."
        )
    result = {new: state[old].to(own) for old, (new, own) in kept.items() if old in state}
    if group["optimizer"] == MATRIX and group["momentum_dtype"] == torch.int8 and result:
        part = whole_part(parameter_view(group, param, name))
        result["momentum"], result["momentum_scale"] = quantized(result["momentum"], part)
    if "step" in state:
        result["step"] = torch.as_tensor(state["step"]).to(torch.int64)
    return result
