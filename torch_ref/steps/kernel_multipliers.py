"""Shape scales and decays as the kernels read them: one float32 number for each matrix."""

from collections.abc import MutableMapping

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from normuon_core import shape_factor
from normuon_core.layout import Run
from torch_ref.steps.weight import MatrixWeight

_Name = tuple[str, int]
"""Which multiplier of a weight, and of which of its runs of output blocks."""


class KernelMultipliers:
    """The shape scales and decays of a weight's matrices, one run of output blocks after the other.

    What is no array on the weight's device is made there once, and kept from step to step.
    """

    def __init__(self, weight: MatrixWeight):
        self.weight, self.device = weight, weight.param.device
        self.kept = _MADE.setdefault(weight.state["momentum"], {})

    def scale(self, number: int, run: Run) -> torch.Tensor:
        """(matrices,) float32: the shape rule's factor times `lr_mul`, rounded once."""
        weight = self.weight
        factor = shape_factor(weight.recipe.shape_scale, run.size, weight.view.inputs)
        return self._each(weight.lr_mul * factor, run, ("scale", number))

    def decay(self, number: int, run: Run) -> torch.Tensor:
        """(matrices,) float32: `wd_mul`."""
        return self._each(self.weight.wd_mul, run, ("decay", number))

    def _each(self, value: float | torch.Tensor, run: Run, name: _Name) -> torch.Tensor:
        view = self.weight.view
        if not isinstance(value, torch.Tensor):
            return self._constant((value,), view.matrices(run), name)
        each = value.broadcast_to(view.batch_shape).reshape(-1)
        if value.device == self.device:
            return each.to(torch.float32).repeat_interleave(run.blocks).contiguous()
        numbers = tuple(number for number in each.tolist() for _ in range(run.blocks))
        return self._constant(numbers, view.matrices(run), name)

    def _constant(self, numbers: tuple[float, ...], matrices: int, name: _Name) -> torch.Tensor:
        """(matrices,) float32 of one number, or of one for each matrix."""
        known = self.kept.get(name)
        if known is not None and known[0] == numbers:
            return known[1]
        # Filled one by one: a tensor made from a list is copied from the CPU, which makes the CPU wait
        # for the GPU and cannot be captured in a graph.
        each = [torch.full((1,), one, dtype=torch.float32, device=self.device) for one in numbers]
        made = torch.cat(each).expand(matrices).contiguous()
        # What a graph captures holds no number before the graph has run.
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return made
        # A captured graph may read the array that is kept: new numbers are written into it.
        self.kept[name] = numbers, made if known is None else known[1].copy_(made)
        return self.kept[name][1]


_MADE: MutableMapping[torch.Tensor, dict[_Name, tuple[tuple[float, ...], torch.Tensor]]]
_MADE = WeakTensorKeyDictionary()
"""The constants of each weight as (the numbers, their array), by its momentum, which they do not
outlive."""
