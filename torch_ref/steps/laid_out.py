"""One weight as the kernels take it, row by row, and the way back."""

import torch

from normuon_core.kernels.pieces import Block, Leaf
from normuon_core.kernels.source import RATES
from torch_ref.kernels.polar import output_of
from torch_ref.leaves.dtypes import Scalar, rounded_product
from torch_ref.matrices.state import second_moments
from torch_ref.matrices.views import from_stack, to_stack
from torch_ref.stages.remainder import join_remainder, write_weight
from torch_ref.steps.kernel_layout import KernelLayout
from torch_ref.steps.kernel_multipliers import KernelMultipliers
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
            # JAX passes float32 here, and the order of a sum depends on the dtype that is read.
            gradient = gradient.float()
        parameter = self._laid_out(parameter)
        self.momentum = self._laid_out(weight.state["momentum"])
        self.leaf = Leaf(
            gradient=self._laid_out(gradient),
            parameter=parameter,
            momentum=self.momentum,
            rates=rates,
            momentum_output=output_of(self.momentum),
            parameter_output=output_of(parameter),
            adds=True,
        )
        self.given = [] if weight.recipe.neuron_norm is None else weight.moment_parts()
        moments = [part.flatten(1).contiguous() for part in self.given]
        multipliers = KernelMultipliers(weight)
        self.blocks = [
            Block(
                self.leaf,
                geometry,
                weight.view.matrices(run),
                moment,
                multipliers.scale(number, run),
                multipliers.decay(number, run),
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
        """Counts matrices that are done. Those that come last finish the weight, and free its update."""
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
        stepped = self._as_weight(self.leaf.result)
        if weight.remainder is None:
            _copy_unless_same(weight.param, stepped)
        else:
            write_weight(weight.param, weight.remainder, stepped)
        self.leaf.result = None

    def _laid_out(self, array: torch.Tensor) -> torch.Tensor:
        own = array if self.in_place else to_stack(array, self.weight.view)
        return own.contiguous()

    def _as_weight(self, array: torch.Tensor) -> torch.Tensor:
        return array if self.in_place else from_stack(array, self.weight.view)

    def _is_kept(self, block: Block) -> bool:
        """Whether the kernels have written the second moment where it is kept, or there is none."""
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
    rates = torch.empty(1, RATES, device=weight.param.device)
    values = (recipe.momentum.momentum, weight.step, weight.beta2, decay, group["lr"])
    for place, value in zip(rates[0], values, strict=True):
        _fill(place, value)
    return rates


def _fill(place: torch.Tensor, value: Scalar) -> None:
    if isinstance(value, torch.Tensor) and value.device == place.device:
        place.copy_(value.reshape(()))
    else:
        # A number, or a tensor on the CPU, is an argument of the fill: a copy would wait for the GPU.
        place.fill_(value)
