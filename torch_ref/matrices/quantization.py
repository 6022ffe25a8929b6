"""Arrays of matrices as int8 with a scale for each block.

    scale = max |m| over the block / 127, q = round(m / scale), read back as q scale

The scale is rounded to bfloat16 (by way of float32), and q to the nearest integer, half to even. So an
entry is off by half a scale at most, and what was read back is stored as it was. Where an entry of a
block is not finite, its scale is NaN, and the whole block is read back as NaN. A scale is never below
`SMALLEST_SCALE`, so that tiny entries lose digits as they do in float32 near its smallest normal number.
"""

import torch

from normuon_core.quantization import BLOCK, LARGEST, SMALLEST_SCALE, block_axis, blocks
from torch_ref.leaves.part import Part


def quantized(x: torch.Tensor, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 of the shape of x, the scales, bfloat16).

    Args:
      x: a part of a weight that divides no block.
    """
    axis, unfolded = block_axis(part.view), x.reshape(part.local.shape)
    count, rest = blocks(unfolded.shape[axis]), -unfolded.shape[axis] % BLOCK
    last = unfolded.movedim(axis, -1)
    apart = torch.nn.functional.pad(last, (0, rest)).unflatten(-1, (count, BLOCK))
    scale = _scale_of(apart.abs().amax(-1) if count else apart.sum(-1))
    q = (apart / scale.to(x.dtype).unsqueeze(-1)).round()
    # In a block with a NaN the scale says it: no integer can.
    q = q.nan_to_num(0.0, 0.0, 0.0).clamp(-LARGEST, LARGEST).to(torch.int8)
    q = q.flatten(-2)[..., : last.shape[-1]].movedim(-1, axis)
    scale = scale.movedim(-1, axis)
    return q.reshape(x.shape), scale.reshape(part.local.fold(tuple(scale.shape)))


def dequantized(
    q: torch.Tensor, scale: torch.Tensor, part: Part, dtype: torch.dtype
) -> torch.Tensor:
    """What was `quantized`, in `dtype`."""
    axis, shape = block_axis(part.view), part.local.shape
    size = shape[axis]
    scale = scale.reshape(*shape[:axis], blocks(size), *shape[axis + 1 :]).to(dtype)
    of_entries = scale.repeat_interleave(BLOCK, dim=axis).narrow(axis, 0, size)
    return (q.reshape(shape).to(dtype) * of_entries).reshape(q.shape)


def _scale_of(largest: torch.Tensor) -> torch.Tensor:
    """NaN where the largest is infinite or NaN."""
    scale = (largest / LARGEST).float().bfloat16().clamp(min=SMALLEST_SCALE)
    return torch.where(scale.isfinite(), scale, torch.nan)
