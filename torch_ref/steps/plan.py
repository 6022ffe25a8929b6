"""The plan of an optimizer's step: which engine steps which matrices, in which stacks and which form.

It is made from specs alone, which hold no array and no number that changes from step to step. So one
plan serves every step until a group, or the set of parameters that have a gradient, changes; an
optimizer keeps its plans by their specs (`torch_ref.optimizer`). `torch_ref.describe` prints it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from normuon_core import Recipe
from normuon_core.cost import Algorithm, Iteration
from normuon_core.polynomials import cubic_steps
from torch_ref.kernels.backend import Backend, takes_kernels
from torch_ref.leaves.dtypes import dtype_name, working_dtype
from torch_ref.leaves.groups import Group
from torch_ref.leaves.part import Part
from torch_ref.matrices.plan import PlannedStack, plan
from torch_ref.stages.stack import Orthogonalizer, StackStages

if TYPE_CHECKING:
    from torch_ref.kernels.engine import KernelStages
    from torch_ref.steps.kernel_layout import KernelLayout

DEFAULT_STACK_BYTES = 2**30

Run = tuple[int, int]
"""A run of output blocks: (the number of its weight in the plan, the run's number in the weight)."""


class WeightSpec(NamedTuple):
    """What of a weight decides how it is stepped.

    Attributes:
      part: what this process has of the weight.
      dtype, gradient_dtype, momentum_dtype: of the parameter, its gradient and its momentum buffer.
      device: where they are.
    """

    part: Part
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    momentum_dtype: torch.dtype
    device: torch.device


class GroupSpec(NamedTuple):
    """What of a parameter group decides how its weights are stepped, and these weights.

    Attributes:
      recipe: with momentum and beta2 set to zero, which the plan does not depend on.
      compute_dtype, algorithm, backend, orthogonalizer: the group's.
      max_bytes: the temporary memory that a stack may take.
      weights: those that have a gradient.
    """

    recipe: Recipe
    compute_dtype: torch.dtype | None
    algorithm: Algorithm
    backend: Backend
    orthogonalizer: Orthogonalizer | None
    max_bytes: int
    weights: tuple[WeightSpec, ...]

    @classmethod
    def of(cls, group: Group, recipe: Recipe, weights: Sequence[WeightSpec]) -> "GroupSpec":
        """Of a group, and its recipe with the group's keywords put in."""
        beta2 = None if recipe.neuron_norm is None else 0.0
        return cls(
            recipe.override(momentum=0.0, beta2=beta2),
            group["compute_dtype"],
            group["algorithm"],
            group["backend"],
            group["orthogonalizer"],
            group["max_stack_bytes"] or DEFAULT_STACK_BYTES,
            tuple(weights),
        )

    @property
    def iteration(self) -> Iteration:
        """What the group asks of the iteration where the kernels run it."""
        coefficients = self.recipe.polar.coefficients
        return Iteration(
            len(coefficients),
            self.algorithm,
            dtype_name(self.compute_dtype),
            cubics=cubic_steps(coefficients),
        )

    def takes_kernels(self, weight: WeightSpec) -> bool:
        """Whether the kernels step a weight.

        Raises:
          ValueError: the group asks for them, and they cannot.
        """
        if self.orthogonalizer is not None:
            return False
        dtypes = [weight.dtype, weight.gradient_dtype, weight.momentum_dtype]
        if self.compute_dtype is not None:
            dtypes.append(self.compute_dtype)
        return takes_kernels(self.backend, self.recipe, weight.device, dtypes)

    def eager_stages(self, weight: WeightSpec) -> tuple[StackStages, ...]:
        """What the matrices of each run of output blocks go through in PyTorch's own operations."""
        view = weight.part.view
        return tuple(
            StackStages(
                *view.block_stack_shape(run.size)[1:],
                output_is_rows=view.output_is_rows,
                dtype=working_dtype(weight.dtype),
                device=weight.device,
                polar=self.recipe.polar,
                neuron_norm=self.recipe.neuron_norm,
                compute_dtype=self.compute_dtype,
                algorithm=self.algorithm,
                orthogonalizer=self.orthogonalizer,
                max_bytes=self.max_bytes,
                row_equilibration=self.recipe.row_equilibration,
                norm_setting=self.recipe.norm_setting,
            )
            for run in view.runs
        )


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The stacks of a step, by the engine that steps them; equal to itself alone.

    Attributes:
      eager: those of PyTorch's own operations.
      triton: those of the kernels.
      layouts: how the kernels find the matrices of each weight that they step, by its number.
    """

    eager: tuple[PlannedStack[StackStages, Run], ...]
    triton: "tuple[PlannedStack[KernelStages, Run], ...]"
    layouts: "Mapping[int, KernelLayout]"


Planner = Callable[[tuple[GroupSpec, ...]], StepPlan]


def plan_step(groups: tuple[GroupSpec, ...]) -> StepPlan:
    """The plan of one step of all weights of the groups; they are numbered from 0 in their order.

    Raises:
      ValueError: a group asks for the kernels, and they cannot step one of its weights.
    """
    eager: list[tuple[StackStages, Run, int]] = []
    triton: list[tuple[KernelStages, Run, int]] = []
    layouts: dict[int, KernelLayout] = {}
    for number, (group, weight) in enumerate(_weights(groups)):
        view = weight.part.local
        counts = [((number, i), view.matrices(run)) for i, run in enumerate(view.runs)]
        if group.takes_kernels(weight):
            # Where no kernel runs, Triton need not be there.
            from torch_ref.steps.kernel_layout import kernel_layout

            layout = layouts[number] = kernel_layout(view, group.recipe)
            stages = layout.stages(group.recipe, group.iteration, weight.device, group.max_bytes)
            triton += [(own, *run) for own, run in zip(stages, counts, strict=True)]
        else:
            stages = group.eager_stages(weight)
            eager += [(own, *run) for own, run in zip(stages, counts, strict=True)]
    return StepPlan(tuple(plan(eager)), tuple(plan(triton)), layouts)


def _weights(groups: Sequence[GroupSpec]) -> Iterator[tuple[GroupSpec, WeightSpec]]:
    for group in groups:
        for weight in group.weights:
            yield group, weight
