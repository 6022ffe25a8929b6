"""State dicts are checked before they are loaded: what is missing is filled in, what is wrong refused.

`torch.optim.Optimizer.load_state_dict` itself takes any keys and shapes. The files of other optimizers
are translated (`foreign_state`).
"""

from collections.abc import Callable

import torch
from torch.optim.optimizer import StateDict

from torch_ref.checkpoint import ParameterState, restore_state
from torch_ref.foreign_state import translated_group, translated_state
from torch_ref.group_checks import settle_group
from torch_ref.leaves.group_keys import (
    ADAMW,
    ADAMW_KEYS,
    MATRIX,
    NOTES,
    Group,
    settle_adamw,
    unknown_key,
)
from torch_ref.leaves.groups import group_recipe, parameter_name, parameter_view
from torch_ref.matrices.state import with_moments_joined
from torch_ref.steps.state import KeptState

_KEPT = {
    MATRIX: ("momentum", "momentum_scale", "second_moment", "radius", "remainder", "step"),
    ADAMW: ("exp_avg", "exp_avg_sq", "gradient_sum", "remainder", "step"),
}
_SHAPED = ("momentum", "exp_avg", "exp_avg_sq", "gradient_sum", "remainder")


def read_state_dict(groups: list[Group], saved: StateDict, defaults: Group) -> StateDict:
    """A state dict as this version would have saved it, checked against the optimizer's groups.

    Options that the file lacks are the group's own: it is an older version's. The files of
    `torch.optim.Muon`, of Keller Jordan's and of dion's Muon and of AdamW are translated, see
    `foreign_state`.

    Args:
      groups: the optimizer's.
      saved: not modified.
      defaults: the constructor's.

    Raises:
      ValueError: groups, options or state that do not fit, by name.
    """
    sizes, saved_sizes = (
        [len(group["params"]) for group in each] for each in (groups, saved["param_groups"])
    )
    if sizes != saved_sizes:
        raise ValueError(
            f"the file has groups of {saved_sizes} parameters, the optimizer has groups of {sizes};"
            " write the groups as the run that made the file did. If two optimizers made it (Muon and"
            " AdamW, say), join their state dicts into one first: the groups of both, the second's"
            " parameters numbered on, and the state of both."
        )
    read = {**saved, "param_groups": [], "state": dict(saved["state"])}
    for index, (group, own) in enumerate(zip(saved["param_groups"], groups, strict=True)):
        is_ours = "optimizer" in group
        if is_ours:
            options = _filled(group, own, index, defaults)
        else:
            options = translated_group(group, own, index)
        options["params"] = own["params"]
        given = ADAMW_KEYS if options["optimizer"] == ADAMW else ()
        settle_group(options, index, given)
        for position, number in enumerate(group["params"]):
            param, name = own["params"][position], parameter_name(options, index, position)
            state = saved["state"].get(number, {})
            if state and not is_ours:
                state = read["state"][number] = translated_state(
                    state, param, options, name, saved=group
                )
            _check_state(state, param, options["optimizer"], name)
        # The orthogonalizer is code: it is put back, not copied.
        read["param_groups"].append({**options, "params": group["params"], "orthogonalizer": None})
    return read


def _filled(saved: Group, own: Group, index: int, defaults: Group) -> Group:
    """The options of a file of this optimizer, of whichever version."""
    known = {*own, *defaults, *NOTES}
    for key in saved:
        if key not in known:
            raise ValueError(
                unknown_key(key, known, f"group {index} of the file")
                + " If a newer version made the file, load it there."
            )
    if saved["optimizer"] != own["optimizer"]:
        raise ValueError(
            f"group {index}: the file has optimizer={saved['optimizer']!r}, the optimizer has"
            f" {own['optimizer']!r} there; write the groups as the run that made the file did."
        )
    own = {**own}
    if own["optimizer"] == ADAMW:
        settle_adamw(own)
    filled = {**own, **saved, "orthogonalizer": own["orthogonalizer"]}
    if own["optimizer"] == ADAMW:
        # An older file has the constructor's keywords, which take the place of AdamW's own here.
        settle_adamw(filled)
    return filled


def _check_state(state: ParameterState, param: torch.Tensor, optimizer: str, name: str) -> None:
    kept = _KEPT[optimizer]
    for key, value in state.items():
        if key.partition(".")[0] not in kept:
            raise ValueError(
                f"{name}: the file's state has {', '.join(sorted(state))}, and"
                f" optimizer={optimizer!r} keeps {', '.join(kept)}; write the groups as the run that"
                " made the file did."
            )
        if key in _SHAPED and tuple(value.shape) != tuple(param.shape):
            raise ValueError(
                f"{name}: the file's {key} has shape {tuple(value.shape)}; write the groups, and the"
                " parameters in them, in the order of the run that made the file."
            )


def loading_hooks(
    optimizer: torch.optim.Optimizer, kept_state: Callable[..., KeptState]
) -> tuple[Callable, Callable]:
    """What runs before and after `torch.optim.Optimizer.load_state_dict`.

    Args:
      kept_state: from the optimizer's state to what knows where it lies.
    """
    orthogonalizers = [group["orthogonalizer"] for group in optimizer.param_groups]
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    loaded: StateDict = {}

    def shard(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        sharding = kept_state(optimizer.state).placed(param, groups[param], tuple(whole.shape))
        return whole if sharding is None else sharding.shard_of(whole)

    def read(optimizer: torch.optim.Optimizer, saved: StateDict) -> StateDict:
        loaded.update(read_state_dict(optimizer.param_groups, saved, optimizer.defaults))
        return loaded

    def join(param: torch.Tensor, state: ParameterState) -> ParameterState:
        group = groups[param]
        rule = None if group["optimizer"] != MATRIX else group_recipe(group).neuron_norm
        if rule is None:
            return state
        return with_moments_joined(state, parameter_view(group, param), rule)

    def restore(optimizer: torch.optim.Optimizer) -> None:
        restore_state(optimizer, loaded, shard, join)
        for group, own in zip(optimizer.param_groups, orthogonalizers, strict=True):
            group["orthogonalizer"] = own

    return read, restore
