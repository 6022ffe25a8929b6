"""One step of the weights that hold matrices.

Momentum, decay, scaling and rate are elementwise and run weight by weight; `StackStages` run on
stacks of many weights' matrices. A weight's momentum is computed when its first matrix is needed, and
its step is finished when its last matrix has come back, so that only the weights between these two
moments take temporary memory.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import groupby

import torch

from normuon_core import Recipe
from normuon_core.neurons import neurons_on_rows
from torch_ref.leaves.dtypes import Scalar, rounded, rounded_product, working_dtype
from torch_ref.leaves.groups import Group
from torch_ref.leaves.part import Part
from torch_ref.matrices.plan import PlannedStack
from torch_ref.matrices.quantization import dequantized, quantized
from torch_ref.matrices.state import second_moments
from torch_ref.matrices.views import from_blocks, from_stack, to_blocks, to_stack
from torch_ref.stages.hyperball import HyperballStep
from torch_ref.stages.momentum import bias_corrected_momentum, heavy_ball_momentum, lerp_momentum
from torch_ref.stages.remainder import add_to_weight, read_weight
from torch_ref.stages.shape_scaling import scale_by_shape
from torch_ref.stages.stack import StackStages
from torch_ref.stages.weight_decay import add_cautious_weight_decay
from torch_ref.steps.plan import GroupSpec, Run, WeightSpec


class MatrixWeight:
    """One weight, or the part of it that this process holds, during one step.

    Args:
      param: the part, updated in place.
      gradient: of the part's shape, not modified.
      remainder: the lower half of the weight that a bfloat16 parameter stands for, or None.
      state: the part's "momentum" and its scales, second moments and radii, see `KeptState.create`;
        updated in place.
      part: which part of the weight it is.
      group: the parameter's group. recipe: the group's, with the group's keywords put in.
      step: counted from 1, an integer tensor without axes.
    """

    def __init__(
        self,
        param: torch.Tensor,
        gradient: torch.Tensor,
        remainder: torch.Tensor | None,
        state: dict[str, torch.Tensor],
        *,
        part: Part,
        group: Group,
        recipe: Recipe,
        step: torch.Tensor,
    ):
        self.param, self.gradient, self.remainder, self.state = param, gradient, remainder, state
        self.group, self.recipe, self.step = group, recipe, step
        self.dtype = working_dtype(param.dtype)
        self.part, self.whole, self.view = part, part.view, part.local
        self.lr_mul = part.multiplier(group["lr_mul"])
        self.wd_mul = part.multiplier(group["wd_mul"])
        self.directions: list[torch.Tensor] | None = None
        self.runs = self.view.runs
        # Of each run of blocks, what has come back.
        self.updates: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self.moments: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self.norms: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self.missing = sum(map(self.view.matrices, self.runs))
        # Set where other ranks have parts of the same matrices: a hyperball's step then waits for them.
        self.is_divided = False
        self.hyperball_steps: list[HyperballStep] = []

    @property
    def beta2(self) -> float:
        """The decay of the second moments; zero where there are none."""
        return 0.0 if self.recipe.neuron_norm is None else self.recipe.neuron_norm.beta2

    @property
    def spec(self) -> WeightSpec:
        """What of this weight the plan of the step depends on."""
        return WeightSpec(
            self.part,
            self.param.dtype,
            self.gradient.dtype,
            self.state["momentum"].dtype,
            self.param.device,
        )

    def sides(self, block: int) -> tuple[int, int]:
        """(rows, columns) of the whole matrices of a run of blocks."""
        _, rows, columns = self.whole.block_stack_shape(self.whole.runs[block].size)
        return rows, columns

    def direction(self, block: int) -> torch.Tensor:
        """What stage 1 returns as u for a run of blocks, (matrices, rows, columns).

        It is computed for all runs at the first call.
        """
        if self.directions is None:
            rule, buffer = self.recipe.momentum, self._momentum()
            gradient = self.gradient.to(self.dtype)
            keywords = {"momentum": rule.momentum, "nesterov": rule.nesterov}
            match rule.rule:
                case "lerp":
                    u, m = lerp_momentum(gradient, buffer, **keywords)
                case "heavy_ball":
                    u, m = heavy_ball_momentum(gradient, buffer, **keywords)
                case "bias_corrected":
                    u, m = bias_corrected_momentum(gradient, buffer, **keywords, step=self.step)
            self._keep_momentum(m)
            self.directions = to_blocks(u, self.view)
        return self.directions[block]

    def _momentum(self) -> torch.Tensor:
        """What stage 1 starts from, in any floating dtype."""
        kept = self.state["momentum"]
        if kept.dtype != torch.int8:
            return kept
        return dequantized(kept, self.state["momentum_scale"], self.part, self.dtype)

    def _keep_momentum(self, m: torch.Tensor) -> None:
        kept = self.state["momentum"]
        if kept.dtype == torch.int8:
            m, scale = quantized(m, self.part)
            self.state["momentum_scale"].copy_(scale)
        kept.copy_(m)

    def moment_parts(self) -> list[torch.Tensor]:
        """The second moment of each run of blocks, (matrices, rows, 1) or (matrices, 1, columns).

        Views of what is kept wherever its memory allows.
        """
        kept = second_moments(self.state)
        if len(kept) > 1:
            blocks, parts = iter([to_stack(each, self.view) for each in kept]), []
            for run in self.runs:
                own = [next(blocks) for _ in range(run.blocks)]
                parts.append(own[0] if len(own) == 1 else torch.stack(own, dim=1).flatten(0, 1))
            return parts
        if not self.view.is_split:
            return [to_stack(kept[0], self.view)]
        # All blocks' neurons are on one side, or they would not be in one array.
        assert self.recipe.neuron_norm is not None
        output_is_rows = self.view.output_is_rows
        on_rows = neurons_on_rows(self.recipe.neuron_norm.axis, *self.sides(0), output_is_rows)
        on_outputs = on_rows == output_is_rows
        return to_blocks(kept[0], self.view, [run.size if on_outputs else 1 for run in self.runs])

    def second_moment(self, block: int) -> torch.Tensor | None:
        """The second moment of a run of blocks, (matrices, rows, 1) or (matrices, 1, columns)."""
        return None if self.recipe.neuron_norm is None else self.moment_parts()[block]

    def keep_moments(self, parts: Sequence[torch.Tensor]) -> None:
        """Keeps the new second moments, which are like `moment_parts`."""
        kept = second_moments(self.state)
        if len(kept) == 1:
            kept[0].copy_(from_blocks(parts, self.view).reshape(kept[0].shape))
            return
        blocks = [
            block
            for part, run in zip(parts, self.runs, strict=True)
            for block in part.unflatten(0, (-1, run.blocks)).unbind(1)
        ]
        for each, block in zip(kept, blocks, strict=True):
            each.copy_(from_stack(block, self.view).reshape(each.shape))

    def receive(
        self,
        block: int,
        update: torch.Tensor,
        moment: torch.Tensor | None,
        norm: torch.Tensor | None = None,
    ) -> None:
        """Takes a run's next matrices back. Those that come last finish the step of the weight, but for
        the norms that a hyperball takes over ranks (`torch_ref.steps.hyperball`).

        Args:
          update: (matrices, rows, columns). moment: (matrices, rows, 1) or (matrices, 1, columns).
          norm: of each whole matrix's update, (matrices, 1, 1), where a part is not enough.
        """
        self.updates[block].append(update)
        if moment is not None:
            self.moments[block].append(moment)
        if norm is not None:
            self.norms[block].append(norm)
        self.missing -= len(update)
        if self.missing == 0:
            self._finish()

    def _finish(self) -> None:
        if self.recipe.neuron_norm is not None:
            self.keep_moments([torch.cat(self.moments[block]) for block in range(len(self.runs))])
        weights = to_blocks(read_weight(self.param, self.remainder), self.view)
        updates = [
            self._update(block, torch.cat(self.updates[block]).to(self.dtype), weight)
            for block, weight in enumerate(weights)
        ]
        self.directions = None
        for arrays in (self.updates, self.moments):
            arrays.clear()
        lr = rounded(self.group["lr"], self.dtype)
        if self.recipe.hyperball is None:
            self.add([update * -lr for update in updates])
            return
        steps = [
            HyperballStep.of(
                update,
                weight,
                lr=lr,
                radius=self._radius(block),
                lr_mul=self._over_stack(self.lr_mul, block),
            )
            for block, (update, weight) in enumerate(zip(updates, weights, strict=True))
        ]
        if self.is_divided:
            self.hyperball_steps = steps
        else:
            self.add([step.alone() for step in steps])

    def add(self, increments: Sequence[torch.Tensor]) -> None:
        """Ends the step by what is added to each run's matrices, (matrices, rows, columns)."""
        self.hyperball_steps = []
        add_to_weight(self.param, self.remainder, from_blocks(increments, self.view))

    def _update(self, block: int, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Stages 4 and 5 on a run of blocks, (matrices, rows, columns) in the working dtype."""
        rule = self.recipe.decay
        weight_decay = rounded(self.group["weight_decay"], self.dtype)
        if rule.rate_power == 2:
            weight_decay = rounded_product(self.group["lr"], weight_decay, self.dtype)
        decay = partial(
            add_cautious_weight_decay,
            param=weight,
            weight_decay=weight_decay,
            wd_mul=self._over_stack(self.wd_mul, block),
            cautious=rule.cautious,
            direction=v,
        )
        scale = partial(
            scale_by_shape,
            rule=self.recipe.shape_scale,
            output_is_rows=self.view.output_is_rows,
            # On a hyperball the size of an update is nothing, and lr_mul a factor of the rate.
            lr_mul=1.0 if self.recipe.hyperball else self._over_stack(self.lr_mul, block),
            direction=v,
            sides=self.sides(block),
            norm=torch.cat(self.norms[block]) if self.norms[block] else None,
        )
        return scale(decay(v)) if rule.inside_scale else decay(scale(v))

    def _radius(self, block: int) -> float | torch.Tensor:
        """The norms that a run's matrices keep: a number, or (matrices, 1, 1) as at the start."""
        assert self.recipe.hyperball is not None
        if self.recipe.hyperball.radius is not None:
            return self.recipe.hyperball.radius
        return to_blocks(self.state["radius"], self.view, [1] * len(self.runs))[block]

    def _over_stack(self, value: float | torch.Tensor, block: int) -> float | torch.Tensor:
        """A multiplier over the batch axes as (matrices, 1, 1) of a run of blocks."""
        if not isinstance(value, torch.Tensor):
            return value
        return value.reshape(-1).repeat_interleave(self.runs[block].blocks).reshape(-1, 1, 1)


def group_specs(weights: Iterable[MatrixWeight]) -> tuple[GroupSpec, ...]:
    """What the plan of a step of these weights depends on; those of one group follow each other."""
    result = []
    for _, members in groupby(weights, key=lambda weight: id(weight.group)):
        first, *others = members
        specs = (first.spec, *(weight.spec for weight in others))
        result.append(GroupSpec.of(first.group, first.recipe, specs))
    return tuple(result)


def beta2_of(weights: Sequence[MatrixWeight], counts: Sequence[int], dtype: torch.dtype) -> Scalar:
    """The decay of the second moments in a stack; zero where there are none.

    Args:
      weights: those whose matrices follow each other in the stack. counts: how many are each one's.
      dtype: the working dtype.

    Returns:
      A number where all weights are of one group, else one for each matrix, (matrices, 1, 1).
    """
    if len({id(weight.group) for weight in weights}) == 1:
        return weights[0].beta2
    each = [
        torch.full((count, 1, 1), weight.beta2, dtype=dtype, device=weight.param.device)
        for weight, count in zip(weights, counts, strict=True)
    ]
    return torch.cat(each)


def step_matrices(
    stacks: Iterable[PlannedStack[StackStages, Run]], weights: Sequence[MatrixWeight]
) -> None:
    """One step of the weights that the stacks are of, by PyTorch's own operations.

    Args:
      weights: by their numbers in the plan.
    """
    for stages, pieces in stacks:
        _step_stack(stages, [(weights[i], block, slice(a, b)) for (i, block), a, b in pieces])


def _step_stack(stages: StackStages, pieces: Sequence[tuple[MatrixWeight, int, slice]]) -> None:
    """One stack, as (weight, run of blocks, which of its matrices)."""
    u = torch.cat([weight.direction(block)[part] for weight, block, part in pieces])
    moments = [
        moment[part]
        for weight, block, part in pieces
        if (moment := weight.second_moment(block)) is not None
    ]
    sizes = [part.stop - part.start for _, _, part in pieces]
    beta2 = beta2_of([weight for weight, _, _ in pieces], sizes, stages.dtype)
    v, updated = stages(u, torch.cat(moments) if moments else None, beta2)
    new_moments = [None] * len(pieces) if updated is None else updated.split(sizes)
    for (weight, block, _), update, moment in zip(pieces, v.split(sizes), new_moments, strict=True):
        weight.receive(block, update, moment)
