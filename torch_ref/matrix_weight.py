"""One step of the weights that hold matrices.

Momentum, decay, scaling and rate are elementwise and run weight by weight; `StackStages` run on
stacks of many weights' matrices. A weight's momentum is done when its first matrix is due and its
step is finished when its last one is back, so that only the weights in flight take temporary
memory.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from normuon_core import Recipe
from normuon_core.stacks import even_stacks
from torch_ref.dtypes import rounded, rounded_product, working_dtype
from torch_ref.groups import Group
from torch_ref.launcher import takes_kernels
from torch_ref.matrix_state import second_moments
from torch_ref.momentum import bias_corrected_momentum, heavy_ball_momentum, lerp_momentum
from torch_ref.part import Part
from torch_ref.remainder import add_to_weight, read_weight
from torch_ref.shape_scaling import scale_by_shape
from torch_ref.stack_stages import StackStages
from torch_ref.stacking import from_blocks, from_stack, to_blocks, to_stack
from torch_ref.weight_decay import add_cautious_weight_decay

DEFAULT_STACK_BYTES = 2**30


class MatrixWeight:
    """One weight, or the part of it that this process holds, during one step.

    Args:
      param: the part, updated in place.
      gradient: of the part's shape, not modified.
      remainder: the lower half of the weight that a bfloat16 parameter stands for, or None.
      state: the part's "momentum" and second moments, see `matrix_state`; updated in place.
      part: which part of the weight it is.
      group: the parameter's group. recipe: the group's, with the group's keywords put in.
      step: counted from 1, an integer tensor without axes.
    """

    def __init__(
        self,
        param: torch.Tensor,
        gradient: torch.Tensor,
        remainder: torch.Tensor | None,
        state: dict[str, Any],
        *,
        part: Part,
        group: Group,
        recipe: Recipe,
        step: torch.Tensor,
    ):
        self.param, self.gradient, self.remainder, self.state = param, gradient, remainder, state
        self.group, self.recipe, self.step = group, recipe, step
        self.dtype = working_dtype(param.dtype)
        self.whole, self.view = part.view, part.local
        self.lr_mul = part.multiplier(group["lr_mul"])
        self.wd_mul = part.multiplier(group["wd_mul"])
        self.directions: list[torch.Tensor] | None = None
        self.updates: list[list[torch.Tensor]] = [[] for _ in self.view.output_sizes]
        self.moments: list[list[torch.Tensor]] = [[] for _ in self.view.output_sizes]
        self.norms: list[list[torch.Tensor]] = [[] for _ in self.view.output_sizes]
        self.missing = self.matrices * len(self.view.output_sizes)

    @property
    def takes_kernels(self) -> bool:
        """Whether `kernel_step` does this step.

        Raises:
          ValueError: it was asked for and cannot.
        """
        group = self.group
        if group["orthogonalizer"] is not None:
            return False
        dtypes = [self.param.dtype, self.gradient.dtype, self.state["momentum"].dtype]
        if group["compute_dtype"] is not None:
            dtypes.append(group["compute_dtype"])
        return takes_kernels(group["backend"], self.param.device, dtypes)

    @property
    def matrices(self) -> int:
        """How many matrices each block holds here."""
        return self.view.stack_shape[0]

    def sides(self, block: int) -> tuple[int, int]:
        """(rows, columns) of the block's whole matrices."""
        _, rows, columns = self.whole.block_stack_shape(self.whole.output_sizes[block])
        return rows, columns

    def stages(self, block: int) -> StackStages:
        """What the block's matrices go through in a stack."""
        rows, columns = self.sides(block)
        return StackStages(
            rows=rows,
            columns=columns,
            output_is_rows=self.view.output_is_rows,
            dtype=self.dtype,
            device=self.param.device,
            polar=self.recipe.polar,
            neuron_norm=self.recipe.neuron_norm,
            compute_dtype=self.group["compute_dtype"],
            algorithm=self.group["algorithm"],
            orthogonalizer=self.group["orthogonalizer"],
            max_bytes=self.group["max_stack_bytes"] or DEFAULT_STACK_BYTES,
        )

    def direction(self, block: int) -> torch.Tensor:
        """Stage 1, done once for all blocks: the block's part of u, (batch, rows, columns)."""
        if self.directions is None:
            rule, buffer = self.recipe.momentum, self.state["momentum"]
            gradient = self.gradient.to(self.dtype)
            keywords = {"momentum": rule.momentum, "nesterov": rule.nesterov}
            match rule.rule:
                case "lerp":
                    u, m = lerp_momentum(gradient, buffer, **keywords)
                case "heavy_ball":
                    u, m = heavy_ball_momentum(gradient, buffer, **keywords)
                case "bias_corrected":
                    u, m = bias_corrected_momentum(gradient, buffer, **keywords, step=self.step)
            buffer.copy_(m)
            self.directions = to_blocks(u, self.view)
        return self.directions[block]

    def moment_state(self) -> list[torch.Tensor]:
        """The second moment of each output block, as it is kept."""
        return second_moments(self.state)

    def second_moment(self, block: int) -> torch.Tensor | None:
        """The block's second moment, (batch, rows, 1) or (batch, 1, columns)."""
        if self.recipe.neuron_norm is None:
            return None
        return to_stack(self.moment_state()[block], self.view)

    def receive(
        self,
        block: int,
        update: torch.Tensor,
        moment: torch.Tensor | None,
        norm: torch.Tensor | None = None,
    ) -> None:
        """Takes the next of a block's matrices back; the last of the weight's finishes its step.

        Args:
          update: (batch, rows, columns). moment: (batch, rows, 1) or (batch, 1, columns).
          norm: of each whole matrix's update, (batch, 1, 1), where parts do not tell it.
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
            for moment, parts in zip(self.moment_state(), self.moments, strict=True):
                as_kept = replace(self.view, shape=tuple(moment.shape))
                moment.copy_(from_stack(torch.cat(parts), as_kept))
        weights = to_blocks(read_weight(self.param, self.remainder), self.view)
        increments = [
            self._increment(block, torch.cat(parts).to(self.dtype), weight)
            for block, (parts, weight) in enumerate(zip(self.updates, weights, strict=True))
        ]
        self.directions, self.updates, self.moments = None, [], []
        add_to_weight(self.param, self.remainder, from_blocks(increments, self.view))

    def _increment(self, block: int, v: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Stages 4 to 6 on one block, (batch, rows, columns) in the working dtype."""
        rule = self.recipe.decay
        lr = rounded(self.group["lr"], self.dtype)
        weight_decay = rounded(self.group["weight_decay"], self.dtype)
        if rule.rate_power == 2:
            weight_decay = rounded_product(lr, weight_decay, self.dtype)
        decay = partial(
            add_cautious_weight_decay,
            param=weight,
            weight_decay=weight_decay,
            wd_mul=_over_stack(self.wd_mul),
            cautious=rule.cautious,
            direction=v,
        )
        scale = partial(
            scale_by_shape,
            rule=self.recipe.shape_scale,
            output_is_rows=self.view.output_is_rows,
            lr_mul=_over_stack(self.lr_mul),
            direction=v,
            sides=self.sides(block),
            norm=torch.cat(self.norms[block]) if self.norms[block] else None,
        )
        return (scale(decay(v)) if rule.inside_scale else decay(scale(v))) * -lr


def _over_stack(value: float | torch.Tensor) -> float | torch.Tensor:
    """A multiplier over the batch axes as (batch, 1, 1)."""
    return value.reshape(-1, 1, 1) if isinstance(value, torch.Tensor) else value


def step_matrices(weights: Iterable[MatrixWeight]) -> None:
    """One step of all weights, their same-shape matrices in one stack, cut to its bound."""
    stacks: dict[StackStages, list[tuple[MatrixWeight, int]]] = defaultdict(list)
    for weight in weights:
        for block in range(len(weight.view.output_sizes)):
            stacks[weight.stages(block)].append((weight, block))
    for stages, members in stacks.items():
        sizes = [weight.matrices for weight, _ in members]
        for cuts in even_stacks(sizes, stages.matrices):
            piece = [(*members[i], slice(start, stop)) for i, start, stop in cuts]
            _step_piece(stages, piece)


def _step_piece(stages: StackStages, piece: list[tuple[MatrixWeight, int, slice]]) -> None:
    """One stack, as (weight, block, which of the block's matrices)."""
    u = torch.cat([weight.direction(block)[part] for weight, block, part in piece])
    moments = [
        moment[part]
        for weight, block, part in piece
        if (moment := weight.second_moment(block)) is not None
    ]
    v, updated = stages(u, torch.cat(moments) if moments else None)
    sizes = [part.stop - part.start for _, _, part in piece]
    new_moments = [None] * len(piece) if updated is None else updated.split(sizes)
    for (weight, block, _), update, moment in zip(piece, v.split(sizes), new_moments, strict=True):
        weight.receive(block, update, moment)
