"""Checkpoints of other optimizers, translated so that the run goes on as it would have there.

`torch.optim.Muon` and Keller Jordan's Muon keep the same momentum as recipes with `lerp`; the
`torch.optim.AdamW` and Keller's auxiliary Adam keep the same moments as AdamW here. microsoft/dion's
Muon and NorMuon keep a heavy ball, `momentum`, in every group, and count steps by group.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from normuon_core import RECIPES, MatrixLayout, NeuronNorm, Recipe
from normuon_core.shape_rules import ShapeRule, shape_factor
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.leaves.group_keys import ADAMW, MATRIX, NOTES, Group
from torch_ref.leaves.groups import group_recipe, parameter_name, parameter_view, whole_part
from torch_ref.matrices.quantization import quantized

_TORCH_MUON = {"lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "ns_steps"}
_KELLER = {"lr", "weight_decay", "momentum"}
_KELLER_ADAM = {"lr", "weight_decay", "betas", "eps"}
_DION = {"algorithm", "lr", "mu", "beta1", "beta2", "weight_decay", "epsilon"}
_DION_RULES: dict[str | None, ShapeRule] = {
    "spectral_norm": "spectral",
    "rms_norm": "match_rms_adamw",
    None: "none",
}


def origin(saved: Group) -> str | None:
    """Whose group this is: "torch.optim.Muon", "Keller Jordan's Muon", "dion's Muon", "dion's NorMuon",
    "dion's AdamW", "AdamW", or None."""
    keys = {*saved} - NOTES - {"use_muon"}
    if keys >= _DION:
        names = {"muon": "Muon", "normuon": "NorMuon", "adamw": "AdamW"}
        found = names.get(saved["algorithm"])
        return None if found is None else f"dion's {found}"
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
            " neither this optimizer's nor those of torch.optim.Muon, of Keller Jordan's or dion's Muon,"
            " or of AdamW. Its state cannot be continued here; start with a new optimizer state."
        )
    wanted = ADAMW if whose.endswith("AdamW") else MATRIX
    if own["optimizer"] != wanted:
        raise ValueError(
            f"group {index}: the file's group is of {whose}, this one has"
            f" optimizer={own['optimizer']!r}; write the groups in the file's order, this one with"
            f" optimizer={wanted!r}."
        )
    if whose == "dion's AdamW":
        if saved.get("cautious_wd", False) and saved["weight_decay"] != 0:
            raise ValueError(
                f"group {index}: the file's group of AdamW has cautious_wd=True, and AdamW's decay here"
                " is plain; go on there, or with weight_decay=0 in both."
            )
        betas = (saved["beta1"], saved["beta2"])
        options = {"lr": saved["lr"], "weight_decay": saved["weight_decay"]}
        return {**own, **notes, **options, "betas": betas, "eps": saved["epsilon"]}
    if whose == "AdamW":
        _check_adamw(saved, index)
        return {**own, **notes, **{key: saved[key] for key in sorted(_KELLER_ADAM)}}
    options = _dion_options if whose.startswith("dion") else _muon_options
    return {**own, **notes, **options(whose, saved, own, index)}


def _dion_options(whose: str, saved: Group, own: Group, index: int) -> Group:
    """Of a group of matrices of dion's; its polynomial is in no file, and so the own group's."""
    if saved.get("split_sizes") is not None:
        raise ValueError(
            f"group {index}: the file's group has split_sizes={saved['split_sizes']}. dion scales a"
            " block before its second moment is taken, which therefore is another one than that of"
            " separate weights here, and its eps stands beside it: go on there, or start with new state."
        )
    name = "dion_normuon" if whose == "dion's NorMuon" else "dion_muon"
    published, ours = RECIPES[name], group_recipe(own)
    polar = replace(ours.polar, eps=saved["epsilon"])
    decay = replace(published.decay, cautious=saved.get("cautious_wd", False))
    norm = published.neuron_norm
    if norm is not None:
        norm = replace(norm, beta2=saved["muon_beta2"])
    recipe = replace(
        published,
        polar=polar,
        decay=decay,
        neuron_norm=norm,
        shape_scale=_DION_RULES[saved.get("adjust_lr")],
    )
    place = f"group {index}: the file is of {whose}"
    _check_recipe(
        replace(ours, neuron_norm=_with_beta2(ours, norm), decay=decay), recipe, place, name
    )
    for position, param in enumerate(own["params"]):
        where = parameter_name(own, index, position)
        _check_dion_matrix(param, own, saved, where, whose)
    return {
        **{key: saved[key] for key in ("lr", "weight_decay", "nesterov")},
        "recipe": recipe,
        "momentum": saved["mu"],
        **dict.fromkeys(("shape_scale", "beta2", "coefficients", "steps", "eps")),
    }


def _with_beta2(recipe: Recipe, norm: NeuronNorm | None) -> NeuronNorm | None:
    """The recipe's neuron normalization with the file's number in it."""
    own = recipe.neuron_norm
    return own if own is None or norm is None else replace(own, beta2=norm.beta2)


def _check_dion_matrix(
    param: torch.Tensor, own: Group, saved: Group, name: str, whose: str
) -> None:
    """Refuses a weight that dion read as other matrices."""
    heads = saved.get("num_heads")
    flat = saved.get("flatten", False) and param.ndim > 2
    if flat and whose == "dion's NorMuon":
        raise ValueError(
            f"{name}: with flatten=True dion's NorMuon normalizes the weight as it is stored and"
            " orthogonalizes it flattened, which no layout here does: go on there."
        )
    inputs = tuple(range(1, param.ndim)) if flat else -1
    layout = MatrixLayout(inputs, 0 if flat else -2, None if heads is None else int(heads))
    if parameter_view(own, param, name) != layout.on(tuple(param.shape), name):
        raise ValueError(
            f"{name}: {whose} took it for matrices of layout={layout}, and the group has"
            f" layout={own['layout']}; give it the former to continue that run."
        )


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
    state: Mapping[str, torch.Tensor],
    param: torch.Tensor,
    group: Group,
    name: str,
    *,
    saved: Group,
) -> dict[str, torch.Tensor]:
    """A parameter's state under this optimizer's names, in its dtypes.

    Args:
      state: of the file. group: as translated. saved: the file's, of which dion's counts the steps.

    Raises:
      ValueError: state that the file's own optimizer does not keep.
    """
    dtype = working_dtype(param.dtype)
    of_dion = "algorithm" in saved
    if group["optimizer"] == MATRIX:
        own = group["momentum_dtype"] or dtype
        buffer = "momentum" if of_dion else "momentum_buffer"
        kept = {buffer: ("momentum", dtype if own == torch.int8 else own)}
        if group_recipe(group).neuron_norm is not None:
            kept["variance_neuron"] = ("second_moment", dtype)
    else:
        theirs = ("momentum", "variance") if of_dion else ("exp_avg", "exp_avg_sq")
        moment = group.get("adam_moment_dtype") or dtype
        kept = {theirs[0]: ("exp_avg", moment), theirs[1]: ("exp_avg_sq", dtype)}
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
    steps = saved["step"] if of_dion else state.get("step")
    if state and steps is not None:
        result["step"] = torch.as_tensor(steps).to(torch.int64)
    return result
