"""A float32 weight kept as a bfloat16 parameter and the 16 bits below it.

The parameter is the weight's upper half, truncated and not rounded, so that the two halves put
together are the weight bit for bit: training in bfloat16 memory with float32 weights.
"""

import torch

from torch_ref.leaves.dtypes import working_dtype


def join_remainder(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The float32 weight of a bfloat16 upper half and a uint16 lower half of one shape."""
    upper = high.view(torch.int16).to(torch.int32) << 16
    return (upper | low.to(torch.int32)).view(torch.float32)


def split_remainder(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The (bfloat16 upper half, uint16 lower half) of a float32 weight."""
    bits = weight.view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16), (bits & 0xFFFF).to(torch.uint16)


def read_weight(param: torch.Tensor, remainder: torch.Tensor | None) -> torch.Tensor:
    """The weight in its working dtype; the parameter itself where that is its dtype already."""
    if remainder is None:
        return param.to(working_dtype(param.dtype))
    return join_remainder(param, remainder)


def add_to_weight(
    param: torch.Tensor, remainder: torch.Tensor | None, increment: torch.Tensor
) -> None:
    """Adds an increment in the working dtype to a parameter in place, and to its remainder.

    Without a remainder the increment is rounded to the parameter's dtype before it is added, as
    Optax does it.
    """
    if remainder is None:
        param.add_(increment.to(param.dtype))
        return
    write_weight(param, remainder, join_remainder(param, remainder) + increment)


def write_weight(param: torch.Tensor, remainder: torch.Tensor, weight: torch.Tensor) -> None:
    """Puts the two halves of a float32 weight into a bfloat16 parameter and its remainder."""
    high, low = split_remainder(weight)
    param.copy_(high)
    remainder.copy_(low)
