"""Sums over the parts of each matrix, which lie on several ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist

from normuon_core import MatrixView
from torch_ref.leaves.part import Region, stack_indices


@dataclass(frozen=True)
class HeldMatrices:
    """Of which matrices of a weight this rank holds parts.

    Attributes:
      blocks: how many output blocks the weight has.
      count: how many matrices each of them is. here: those of which this rank holds parts, ascending.
      adds: whether this rank's parts count; of several replicas one's do.
    """

    blocks: int
    count: int
    here: tuple[int, ...]
    adds: bool


@lru_cache(maxsize=4096)
def held_matrices(view: MatrixView, regions: tuple[Region, ...], rank: int) -> HeldMatrices:
    """Those of a whole weight of which ranks hold these regions, as one of them sees it."""
    here, _, _ = stack_indices(view, regions[rank])
    first_replica = regions.index(regions[rank])
    return HeldMatrices(
        len(view.output_sizes), view.stack_shape[0], tuple(here), adds=first_replica == rank
    )


def sums_over_ranks(
    weights: Sequence[HeldMatrices],
    parts: Sequence[Sequence[torch.Tensor]],
    *,
    numbers: int,
    device: torch.device,
    group: dist.ProcessGroup,
) -> list[list[torch.Tensor]]:
    """The sums of numbers of which each rank has its part, for all matrices in one all-reduce.

    Every rank of the group must call with the same weights, whether it holds anything of them or not.

    Args:
      parts: of each weight, of each block, (matrices here, 1, numbers); of a weight of which nothing is
        here, nothing. The dtypes may differ: the sums are float64.
      numbers: how many a matrix has.

    Returns:
      Like `parts`, in their dtypes.
    """
    rows = sum(weight.blocks * weight.count for weight in weights)
    total = torch.zeros(rows, numbers, dtype=torch.float64, device=device)
    first, places = 0, []
    for weight, own in zip(weights, parts, strict=True):
        here = torch.tensor(weight.here, dtype=torch.long, device=device)
        places.append([first + block * weight.count + here for block in range(len(own))])
        first += weight.blocks * weight.count
        if weight.adds:
            for place, part in zip(places[-1], own, strict=True):
                total[place] = part.squeeze(1).to(total.dtype)
    dist.all_reduce(total, group=group)
    return [
        [
            total[place].unsqueeze(1).to(part.dtype)
            for place, part in zip(own_places, own, strict=True)
        ]
        for own_places, own in zip(places, parts, strict=True)
    ]
