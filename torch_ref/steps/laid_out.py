"""One weight as the kernels take it, row by row, and the way back."""

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from normuon_core import shape_factor
from normuon_core.fused_step import Block, Leaf
from normuon_core.kernels.source import RATES
from normuon_core.layout import Run
from torch_ref.kernels.polar import output_of
from torch_ref.leaves.dtypes import Scalar, rounded_product
from torch_ref.matrices.state import second_moments
from torch_ref.matrices.views import from_stack, to_stack
from torch_ref.stages.remainder import add_to_weight, join_remainder
from torch_ref.steps.kernel_layout import KernelLayout
from torch_ref.steps.weight import MatrixWeight


class LaidOut:
    """A weight as the kernels take it, row by row, and the way back.

    Args:
      rates: (1, RATES) float32, see `rates_of`.
    """

    def __init__(self, weight: MatrixWeight, layout: KernelLayout, rates: torch.Tensor):
        self.weight, self.in_place = weight, layout.in_place
        self.missing = weight.missing
        parameter, gradient = weight.param, weight.gradient
        if weight.remainder is not None:
            parameter = join_remainder(parameter, weight.remainder)
            # The order of a sum depends on the dtype that is read, and JAX passes float32 here.
            gradient = gradient.float()
        parameter = self._laid_out(parameter)
        self.momentum = self._laid_out(weight.state["momentum"])
        self.leaf = Leaf(
            gradient=self._laid_out(gradient),
            parameter=parameter,
            momentum=self.momentum,
            rates=rates,
            momentum_output=output_of(self.momentum),
            delta_output=output_of(parameter),
        )
        self.given = [] if weight.recipe.neuron_norm is None else weight.moment_parts()
        moments = [part.flatten(1).contiguous() for part in self.given]
        self.blocks = [
            Block(
                self.leaf,
                geometry,
                weight.view.matrices(run),
                moment,
                _scale(weight, number, run),
                _each(weight.wd_mul, weight, run, ("decay", number)),
            )
            for number, (geometry, moment, run) in enumerate(
                zip(
                    layout.geometries,
                    moments or [None] * len(weight.runs),
                    weight.runs,
                    strict=True,
                )
            )
        ]

    def receive(self, matrices: int) -> None:
        """So many more matrices are done. The last of them finish the weight, and free its update."""
        self.missing -= matrices
        if self.missing == 0:
            self._finish()

    def _finish(self) -> None:
        weight = self.weight
        _copy_unless_same(weight.state["momentum"], self._as_weight(self.momentum))
        if not all(map(self._is_kept, self.blocks)):
            weight.keep_moments(
                [
                    block.second_moment.view_as(part)
                    for block, part in zip(self.blocks, self.given, strict=True)
                ]
            )
        increment = self._as_weight(self.leaf.delta)
        add_to_weight(weight.param, weight.remainder, increment)
        self.leaf.delta = None

    def _laid_out(self, array: torch.Tensor) -> torch.Tensor:
        own = array if self.in_place else to_stack(array, self.weight.view)
        return own.contiguous()

    def _as_weight(self, array: torch.Tensor) -> torch.Tensor:
        return array if self.in_place else from_stack(array, self.weight.view)

    def _is_kept(self, block: Block) -> bool:
        """Whether the kernels have written a second moment where it is kept, or there is none."""
        if block.second_moment is None:
            return True
        own = block.second_moment.untyped_storage().data_ptr()
        kept = second_moments(self.weight.state)
        return any(own == each.untyped_storage().data_ptr() for each in kept)


def _copy_unless_same(target: torch.Tensor, source: torch.Tensor) -> None:
    if target.data_ptr() != source.data_ptr():
        target.copy_(source)


def rates_of(weight: MatrixWeight) -> torch.Tensor:
    """(1, RATES) float32 on the parameter's device, filled without waiting for it."""
    group, recipe = weight.group, weight.recipe
    decay = group["weight_decay"]
    if recipe.decay.rate_power == 2:
        decay = rounded_product(group["lr"], decay, torch.float32)
    beta2 = 0.0 if recipe.neuron_norm is None else recipe.neuron_norm.beta2
    rates = torch.empty(1, RATES, device=weight.param.device)
    values = (recipe.momentum.momentum, weight.step, beta2, decay, group["lr"])
    for place, value in zip(rates[0], values, strict=True):
        _fill(place, value)
    return rates


def _fill(place: torch.Tensor, value: Scalar) -> None:
    if isinstance(value, torch.Tensor) and value.device == place.device:
        place.copy_(value.reshape(()))
    else:
        # A number, or a tensor on the CPU: passed to the fill, where a copy would wait for the GPU.
        place.fill_(value)


def _scale(weight: MatrixWeight, number: int, run: Run) -> torch.Tensor:
    """k lr_mul for each matrix of a run of blocks, rounded once."""
    factor = shape_factor(weight.recipe.shape_scale, run.size, weight.view.inputs)
    return _each(weight.lr_mul * factor, weight, run, ("scale", number))


def _each(
    value: float | torch.Tensor, weight: MatrixWeight, run: Run, name: tuple[str, int]
) -> torch.Tensor:
    """A multiplier as (matrices,) float32, for a run of blocks; `name`: which of the weight's it is."""
    device, matrices = weight.param.device, weight.view.matrices(run)
    if not isinstance(value, torch.Tensor):
        return _constant((value,), matrices, weight, name)
    each = value.broadcast_to(weight.view.batch_shape).reshape(-1)
    if value.device == device:
        return each.to(torch.float32).repeat_interleave(run.blocks).contiguous()
    numbers = tuple(number for number in each.tolist() for _ in range(run.blocks))
    return _constant(numbers, matrices, weight, name)


def _constant(
    numbers: tuple[float, ...], matrices: int, weight: MatrixWeight, name: tuple[str, int]
) -> torch.Tensor:
    """(matrices,) float32 of one number, or of one for each matrix."""
    kept: dict = _CONSTANTS.setdefault(weight.state["momentum"], {})  # pyright: ignore
    known, constant = kept.get(name, (None, None))
    if known == numbers:
        return constant
    device = weight.param.device
    # Not from a list of numbers: that would be copied from the CPU, which waits and cannot be captured.
    each = [torch.full((1,), one, dtype=torch.float32, device=device) for one in numbers]
    made = torch.cat(each).expand(matrices).contiguous()
    # What a graph captures holds no number before the graph has run.
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return made
    # In its place: a graph may have captured where it lies.
    kept[name] = numbers, made if constant is None else constant.copy_(made)
    return kept[name][1]


_CONSTANTS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Scales and decays of a weight that are not on its device, kept there from step to step: by its
momentum, with which they go, and by name, as (the numbers, (matrices,) float32)."""
