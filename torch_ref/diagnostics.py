"""How large and how even a step was: numbers for each matrix, to log while a model trains."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from normuon_core import MatrixView
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.leaves.group_keys import ADAMW, Group
from torch_ref.leaves.groups import group_recipe, parameter_view, whole_part
from torch_ref.matrices.plan import plan
from torch_ref.matrices.quantization import dequantized
from torch_ref.matrices.views import to_blocks
from torch_ref.optimizer import NorMuon
from torch_ref.stages.momentum import bias_corrected_momentum, heavy_ball_momentum, lerp_momentum
from torch_ref.stages.orthogonalization import polar_factor
from torch_ref.stages.row_equilibration import equilibrate_rows
from torch_ref.stages.stack import StackStages
from torch_ref.steps.plan import GroupSpec, WeightSpec


class MatrixDiagnostics(NamedTuple):
    """Of each matrix of a weight, tensors (matrices,) in the weight's working dtype.

    Attributes:
      update_rms: the root mean square of the update's entries.
      update_to_weight: the update's Frobenius norm over the weight's, before the step.
      neuron_norm_spread: the standard deviation of the norms of the update's output neurons, over their
        mean. NorMuon makes it small; Muon leaves what the polar factor has.
      masked_decay: the share of entries that cautious weight decay leaves out, because the update
        without decay moves them away from zero.
    """

    update_rms: torch.Tensor
    update_to_weight: torch.Tensor
    neuron_norm_spread: torch.Tensor
    masked_decay: torch.Tensor


def matrix_weights(optimizer: NorMuon) -> dict[str, torch.Tensor]:
    """Copies of the matrices that an optimizer trains, by name, for `update_diagnostics`.

    The names are those of the model where the groups have them (`param_groups` gives them), else
    "group.position".
    """
    return {name: param.detach().clone() for name, _, param in _matrices(optimizer)}


def update_diagnostics(
    optimizer: NorMuon, before: Mapping[str, torch.Tensor]
) -> dict[str, MatrixDiagnostics]:
    """What the last step did to every matrix.

        before = torch_ref.matrix_weights(optimizer)
        optimizer.step()
        numbers = torch_ref.update_diagnostics(optimizer, before)

    The copies and a pass over them are all that it costs. For weights that are whole on this process.

    Args:
      before: `matrix_weights` before the step.

    Returns:
      By name the numbers of each of the weight's matrices: layers of a stack, blocks of a fused
      projection.
    """
    return {
        name: _of_weight(param.detach(), before[name], parameter_view(group, param))
        for name, group, param in _matrices(optimizer)
    }


@torch.no_grad()
def orthogonality_errors(optimizer: NorMuon) -> dict[str, torch.Tensor]:
    """How far from orthogonal the polar factors of the next step are, before neurons are normalized.

    To be called between the backward pass and the step. Momentum and polar factor are done once more, in
    stacks as the step does them, so that this costs about as much as the step: ask for it every tenth or
    hundredth. See `orthogonality_error` for the number. For weights that are whole on this process.

    Returns:
      By name the errors of the weight's matrices, (matrices,); weights without a gradient are left out.
    """
    weights = {
        name: (group, param)
        for name, group, param in _matrices(optimizer)
        if param.grad is not None
    }
    members = [
        (factors, (name, number), count)
        for name, weight in weights.items()
        for number, (factors, count) in enumerate(_polar_factors(*weight))
    ]
    errors: dict[str, dict[int, list[torch.Tensor]]] = {name: defaultdict(list) for name in weights}
    for factors, pieces in plan(members):
        parts = []
        for (name, number), start, stop in pieces:
            group, param = weights[name]
            blocks = to_blocks(_direction(optimizer, group, param), parameter_view(group, param))
            parts.append(blocks[number][start:stop])
        found = orthogonality_error(factors(torch.cat(parts)))
        for piece, own in zip(pieces, found.split([len(part) for part in parts]), strict=True):
            name, number = piece.run
            errors[name][number].append(own)
    return {
        name: torch.cat([part for _, parts in sorted(runs.items()) for part in parts])
        for name, runs in errors.items()
    }


@dataclass(frozen=True)
class _PolarFactors:
    """Stage 2 on a stack, as the step does it: an engine of `torch_ref.matrices.plan`."""

    stages: StackStages
    by_kernels: bool

    @property
    def bytes_a_matrix(self) -> int:
        return self.stages.bytes_a_matrix

    @property
    def max_bytes(self) -> int:
        return self.stages.max_bytes

    def __call__(self, u: torch.Tensor) -> torch.Tensor:
        stages, rows = self.stages, self.stages.row_equilibration
        if not self.by_kernels:
            return stages(u, None, 0.0)[0]
        if rows is not None:
            u = equilibrate_rows(u, **vars(rows), output_is_rows=stages.output_is_rows)
        return polar_factor(
            u,
            **vars(stages.polar),
            compute_dtype=stages.compute_dtype,
            algorithm=stages.algorithm,
            backend="triton",
        )


def _polar_factors(group: Group, param: torch.Tensor) -> Iterator[tuple[_PolarFactors, int]]:
    """For each run of a weight's output blocks: what makes the factors, and of how many matrices."""
    assert param.grad is not None
    view = parameter_view(group, param)
    recipe = replace(group_recipe(group), norm_setting=None, neuron_norm=None)
    momentum_dtype = group["momentum_dtype"] or working_dtype(param.dtype)
    dtypes = param.dtype, param.grad.dtype, momentum_dtype
    weight = WeightSpec(whole_part(view), *dtypes, param.device)
    spec = GroupSpec.of(group, recipe, [weight])
    for run, stages in zip(view.runs, spec.eager_stages(weight), strict=True):
        yield _PolarFactors(stages, spec.takes_kernels(weight)), view.matrices(run)


def orthogonality_error(x: torch.Tensor) -> torch.Tensor:
    """|G - I| / sqrt(k), G the Gram matrix of the shorter side, of k rows or columns.

    It is the root mean square of s^2 - 1 over the k singular values s: 0 for an orthogonal matrix, 1 for
    zero.

    Args:
      x: (..., rows, columns), floating point.

    Returns:
      (...), in the working dtype.
    """
    x = x.to(working_dtype(x.dtype))
    short = x if x.shape[-2] <= x.shape[-1] else x.mT
    size = short.shape[-2]
    off = short @ short.mT - torch.eye(size, dtype=x.dtype, device=x.device)
    return (off.square().sum((-2, -1)) / size).sqrt()


def _matrices(optimizer: NorMuon) -> Iterator[tuple[str, Group, torch.Tensor]]:
    for index, group in enumerate(optimizer.param_groups):
        if group["optimizer"] == ADAMW:
            continue
        for position, param in enumerate(group["params"]):
            names = group.get("param_names")
            yield (names[position] if names else f"{index}.{position}"), group, param


def _direction(optimizer: NorMuon, group: Group, param: torch.Tensor) -> torch.Tensor:
    """Stage 1 of the next step, without its effect on the state."""
    assert param.grad is not None
    gradient = param.grad.to(working_dtype(param.dtype))
    state = optimizer.state.get(param, {})
    buffer = state.get("momentum", torch.zeros_like(gradient))
    if buffer.dtype == torch.int8:
        part = whole_part(parameter_view(group, param))
        buffer = dequantized(buffer, state["momentum_scale"], part, gradient.dtype)
    rule = group_recipe(group).momentum
    keywords = {"momentum": rule.momentum, "nesterov": rule.nesterov}
    match rule.rule:
        case "lerp":
            return lerp_momentum(gradient, buffer, **keywords)[0]
        case "heavy_ball":
            return heavy_ball_momentum(gradient, buffer, **keywords)[0]
        case "bias_corrected":
            step = state.get("step", 0) + 1
            return bias_corrected_momentum(gradient, buffer, **keywords, step=step)[0]


def _of_weight(after: torch.Tensor, before: torch.Tensor, view: MatrixView) -> MatrixDiagnostics:
    dtype = working_dtype(after.dtype)
    weight = before.to(dtype)
    pairs = zip(to_blocks(after.to(dtype) - weight, view), to_blocks(weight, view), strict=True)
    runs = [_of_blocks(step, block, view.output_stack_axis) for step, block in pairs]
    return MatrixDiagnostics(*(torch.cat(numbers) for numbers in zip(*runs, strict=True)))


def _of_blocks(step: torch.Tensor, weight: torch.Tensor, output_axis: int) -> MatrixDiagnostics:
    """Of (matrices, rows, columns)."""
    matrix, inputs = (-2, -1), -1 if output_axis == -2 else -2
    squares = step.square()
    total = squares.sum(matrix)
    norms = squares.sum(inputs).sqrt()
    # The update is added to the weight, so one sign of both leads away from zero.
    away = step.sign() * weight.sign() > 0
    return MatrixDiagnostics(
        update_rms=(total / (step.shape[-2] * step.shape[-1])).sqrt(),
        update_to_weight=_over(total.sqrt(), weight.square().sum(matrix).sqrt()),
        neuron_norm_spread=_over(norms.std(-1, correction=0), norms.mean(-1)),
        masked_decay=away.to(step.dtype).mean(matrix),
    )


def _over(above: torch.Tensor, below: torch.Tensor) -> torch.Tensor:
    """The ratio; 0 where both are."""
    return torch.where((above == 0) & (below == 0), 0.0, above / below)
