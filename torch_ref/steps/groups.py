"""One step of all groups: AdamW's parameters, then the matrices, wherever they lie."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from normuon_core import Recipe
from torch_ref.leaves.dtensor import local, local_state
from torch_ref.leaves.dtypes import rounded_product, working_dtype
from torch_ref.leaves.group_keys import ADAMW, Group, adamw_keywords, settle_adamw
from torch_ref.leaves.groups import group_recipe, parameter_view, whole_part
from torch_ref.leaves.part import cut
from torch_ref.stages.adamw import adamw
from torch_ref.stages.remainder import add_to_weight, read_weight
from torch_ref.steps.capture import check_capture
from torch_ref.steps.plan import Planner
from torch_ref.steps.state import KeptState, has_remainder
from torch_ref.steps.weight import MatrixWeight, group_specs, step_matrices

if TYPE_CHECKING:
    from torch_ref.mesh.rectangles import Sharding
    from torch_ref.steps.data_parallel import DataParallel

Given = tuple[Group, list[tuple[torch.Tensor, torch.Tensor]]]
"""A group, and (parameter, gradient) of those of its parameters that have a gradient."""


def step_groups(groups: Sequence[Group], kept: KeptState, planner: Planner) -> None:
    """One step of every parameter that has a gradient.

    Args:
      planner: makes the plan of a step, or finds the one that it has made before.
    """
    _count_steps(groups, kept)
    adamw_groups, matrix_groups = [], []
    for group in groups:
        chosen = adamw_groups if group["optimizer"] == ADAMW else matrix_groups
        chosen.append((group, _with_gradient(group)))
    _step_adamw_groups(adamw_groups, kept)
    if kept.parallel is None:
        _step_matrix_groups(matrix_groups, kept, planner)
    else:
        _step_replicated(matrix_groups, kept, kept.parallel, planner)


def _count_steps(groups: Sequence[Group], kept: KeptState) -> None:
    """Counts a step of every parameter that has a gradient, on the parameter's own device."""
    counters: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for group in groups:
        for param, _ in _with_gradient(group):
            state = kept.state[param]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.int64, device=param.device)
            counters[state["step"].device].append(state["step"])
    check_capture(counters)
    for steps in counters.values():
        torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]


def _step_matrix_groups(groups: list[Given], kept: KeptState, planner: Planner) -> None:
    """Matrices that are whole on this process, or DTensors."""
    whole: list[MatrixWeight] = []
    sharded: list[tuple[MatrixWeight, Sharding]] = []
    for group, given in groups:
        recipe = group_recipe(group)
        for param, gradient in given:
            view, sharding = parameter_view(group, param), kept.sharding(param)
            kept.create(param, view, group, recipe)
            if sharding is None:
                whole.append(kept.weight(param, gradient, whole_part(view), group, recipe))
                continue
            from torch_ref.mesh.rectangles import local_gradient

            shard, gradient = local(param), local_gradient(param, gradient)
            weight = kept.weight(param, gradient, sharding.part(view), group, recipe, shard=shard)
            sharded.append((weight, sharding))
    _step_whole(whole, planner)
    if sharded:
        from torch_ref.steps.sharded import step_sharded_matrices

        step_sharded_matrices(sharded, planner)


def _step_replicated(
    groups: list[Given], kept: KeptState, parallel: "DataParallel", planner: Planner
) -> None:
    """Matrices of plain data parallelism, one buffer after the other.

    While one is stepped, the gradients of the next one and the parameters of the one before are on their
    way; no other has memory then.
    """
    gradients: dict[torch.Tensor, torch.Tensor] = {}
    settings: dict[torch.Tensor, tuple[Group, Recipe]] = {}
    for group, given in groups:
        recipe = group_recipe(group)
        for param, gradient in given:
            gradients[param], settings[param] = gradient, (group, recipe)
            kept.create(param, parameter_view(group, param), group, recipe)
    stacks = parallel.stacks(gradients, lambda param: settings[param][0]["max_stack_bytes"])
    neighbours = zip([None, *stacks[:-1]], stacks, [*stacks[1:], None], strict=True)
    for before, stack, following in neighbours:
        if before is None:
            stack.reduce()
        if following is not None:
            following.reduce()
        _step_whole(
            [
                kept.weight(param, gradient, part, *settings[param], shard=cut(param, part.region))
                for param, part, gradient in stack.own_gradients()
            ],
            planner,
        )
        if before is not None:
            before.finish()
        stack.gather()
    if stacks:
        stacks[-1].finish()


def _step_adamw_groups(groups: list[Given], kept: KeptState) -> None:
    for group, _ in groups:
        settle_adamw(group)
    given = [(param, gradient, group) for group, pairs in groups for param, gradient in pairs]
    gradients = [gradient for _, gradient, _ in given]
    if kept.parallel is not None:
        gradients = kept.parallel.mean(gradients)
    for (param, _, group), gradient in zip(given, gradients, strict=True):
        _step_adamw(param, gradient, group, kept)


def _step_adamw(param: torch.Tensor, gradient: torch.Tensor, group: Group, kept: KeptState) -> None:
    group = adamw_keywords(group)
    state, sharding = kept.state[param], kept.sharding(param)
    dtype = working_dtype(param.dtype)
    dtypes = {"exp_avg": group["adam_moment_dtype"] or dtype, "exp_avg_sq": dtype}
    every = group["adam_every"] or 1
    if every > 1:
        dtypes["gradient_sum"] = dtype
    if has_remainder(param, group):
        dtypes["remainder"] = torch.uint16
    for key, own in dtypes.items():
        if key not in state:
            state[key] = kept.zeros(param, group, tuple(param.shape), own)
    if sharding is not None:
        from torch_ref.mesh.rectangles import local_gradient

        param, gradient = local(param), local_gradient(param, gradient)
        state = local_state(state)
    remainder = state["remainder"] if "remainder" in dtypes else None
    gradient, step, due = gradient.to(dtype), state["step"], None
    if every > 1:
        # No number is read: which steps are due is known on the parameter's device alone.
        due = step % every == 0
        total = state["gradient_sum"] + gradient
        state["gradient_sum"].copy_(total.masked_fill(due, 0.0))
        gradient, step = total / every, (step // every).clamp(min=1)
    increment, exp_avg, exp_avg_sq = adamw(
        gradient,
        read_weight(param, remainder),
        state["exp_avg"],
        state["exp_avg_sq"],
        lr=rounded_product(group["lr"], group["lr_mul"], dtype),
        b1=group["adam_b1"],
        b2=group["adam_b2"],
        eps=group["adam_eps"],
        weight_decay=rounded_product(group["adam_weight_decay"], group["wd_mul"], dtype),
        nesterov=group["adam_nesterov"],
        eps_root=group["adam_eps_root"],
        cautious=group["adam_cautious"],
        step=step,
    )
    if due is not None:
        increment = increment.masked_fill(~due, 0.0)
        exp_avg = torch.where(due, exp_avg.to(state["exp_avg"].dtype), state["exp_avg"])
        exp_avg_sq = torch.where(due, exp_avg_sq, state["exp_avg_sq"])
    state["exp_avg"].copy_(exp_avg)
    state["exp_avg_sq"].copy_(exp_avg_sq)
    add_to_weight(param, remainder, increment)


def _step_whole(weights: list[MatrixWeight], planner: Planner) -> None:
    """A step of matrices that this process has whole, by kernels or by PyTorch's own operations."""
    plan = planner(group_specs(weights))
    step_matrices(plan.eager, weights)
    if plan.triton:
        from torch_ref.steps.fused import step_matrices_with_kernels

        step_matrices_with_kernels(plan, weights)


def _with_gradient(group: Group) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p, p.grad) for p in group["params"] if p.grad is not None and p.numel() > 0]
