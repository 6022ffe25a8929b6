"""An array that ranks hold parts of, put together on each of them."""

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torch_ref.leaves.part import cut, region_shape
from torch_ref.mesh.rectangles import mesh_group, sharding_of


def gathered(value: DTensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The whole array, bit for bit.

    The ranks' parts are added as bytes, zeros elsewhere: that is exact for every dtype, and not every
    backend takes every dtype.

    Args:
      value: it may lie on a mesh of some of the ranks alone, as the state of one owner does.
      group: of all ranks that call; None is the group of the mesh.
    """
    sharding = sharding_of(value)
    whole = torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    own = sharding.own_region(value.shape)
    regions = sharding.regions(value.shape)
    place = _place(value)
    # Of replicas one is added.
    if place is not None and regions.index(own) == place:
        cut(whole, own).copy_(value.to_local().reshape(region_shape(own)))
    if group is None:
        group, _ = mesh_group(value.device_mesh)
    dist.all_reduce(whole.view(torch.uint8), group=group)
    return whole


def _place(value: DTensor) -> int | None:
    """Where this rank stands in the mesh, in row-major order; None where it is not in it."""
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    place = 0
    for size, i in zip(value.device_mesh.shape, coordinate, strict=True):
        place = place * size + i
    return place
