"""Which rectangle of an array each rank of a mesh holds, and arrays that are kept that way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from normuon_core import MatrixView
from normuon_core.quantization import BLOCK, block_axis, blocks, scale_shape
from torch_ref.leaves.part import Part, Region, cut, region_shape, unfolded_region, whole_region


class UnsupportedPlacementError(ValueError):
    """A placement by which what a rank holds of an array is no rectangle."""


@lru_cache(maxsize=4096)
def regions(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> tuple[Region, ...]:
    """The rectangle of an array of `shape` that each coordinate of a mesh holds, in row-major order.

    `Shard` divides as `torch.chunk` does: the last ranks may hold less, or nothing. Mesh dimensions
    that divide one axis do so in their order; but FSDP2 divides what tensor parallelism has divided
    already although its mesh dimension comes first, and PyTorch calls that `_StridedShard`.

    Raises:
      UnsupportedPlacementError: another placement; a `_StridedShard` that does not divide evenly or that
        was not made by such a nesting.
    """
    coordinates = [()]
    for size in mesh_shape:
        coordinates = [(*done, i) for done in coordinates for i in range(size)]
    order = _nesting(shape, mesh_shape, placements)
    result = []
    for coordinate in coordinates:
        bounds = list(whole_region(shape))
        for mesh_axis, axis in order:
            start, stop = bounds[axis]
            chunk = -(-(stop - start) // mesh_shape[mesh_axis])
            first = min(stop, start + chunk * coordinate[mesh_axis])
            bounds[axis] = (first, min(stop, first + chunk))
        result.append(tuple(bounds))
    return tuple(result)


def _nesting(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[tuple[int, int]]:
    """(mesh axis, axis of the array) of each division, outermost first."""
    outer, inner = [], []
    for mesh_axis, placement in enumerate(placements):
        if isinstance(placement, _StridedShard):
            _check_strided(shape, mesh_shape, placements, mesh_axis)
            inner.insert(0, (mesh_axis, placement.dim))
        elif isinstance(placement, Shard) and type(placement) is Shard:
            outer.append((mesh_axis, placement.dim))
        elif not isinstance(placement, Replicate):
            raise UnsupportedPlacementError(
                f"the placement {placement} is neither Shard nor Replicate"
            )
    return outer + inner


def _check_strided(
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    mesh_axis: int,
) -> None:
    placement = placements[mesh_axis]
    assert isinstance(placement, _StridedShard)
    inside, ways = 1, mesh_shape[mesh_axis]
    for later in range(mesh_axis + 1, len(placements)):
        other = placements[later]
        if isinstance(other, Shard | _StridedShard) and other.dim == placement.dim:
            inside *= mesh_shape[later]
    if inside != placement.split_factor or shape[placement.dim] % (inside * ways) != 0:
        raise UnsupportedPlacementError(
            f"{placement} leaves no contiguous shards of an axis of {shape[placement.dim]} on a mesh of"
            f" {tuple(mesh_shape)}, whose sizes must divide it"
        )


@dataclass(frozen=True)
class Sharding:
    """How an array lies on a mesh.

    Attributes:
      mesh: of the ranks that hold it. placements: one for each axis of the mesh.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def regions(self, shape: Sequence[int]) -> tuple[Region, ...]:
        """As the function, for each rank of the mesh in row-major order."""
        return regions(tuple(shape), tuple(self.mesh.shape), self.placements)

    def own_region(self, shape: Sequence[int]) -> Region:
        """What this rank holds of an array of `shape`; empty if the rank is not of the mesh."""
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            return ((0, 0),) * len(shape)
        place = 0
        for size, i in zip(self.mesh.shape, coordinate, strict=True):
            place = place * size + i
        return self.regions(shape)[place]

    def part(self, view: MatrixView) -> Part:
        """What this rank holds of a weight.

        Its blocks are no runs, since another rank's part may be cut elsewhere within them.
        """
        return Part(replace(view, apart=True), self.own_region(view.stored_shape))

    def wrap(self, shard: torch.Tensor, shape: Sequence[int]) -> DTensor:
        """The DTensor of `shape` of which this rank holds `shard`, sharing its memory."""
        whole = torch.Size(shape)
        strides = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(
            shard, self.mesh, self.placements, run_check=False, shape=whole, stride=strides
        )

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> DTensor:
        own = region_shape(self.own_region(shape))
        return self.wrap(torch.zeros(own, dtype=dtype, device=device), shape)

    def shard_of(self, whole: torch.Tensor) -> DTensor:
        """The DTensor of an array that this rank has all of; a copy."""
        own = cut(whole, self.own_region(whole.shape))
        return self.wrap(own.detach().clone().contiguous(), whole.shape)

    def has_whole_blocks(self, view: MatrixView) -> bool:
        """Whether each rank holds whole blocks of int8, and by the same placements their scales."""
        axis = block_axis(view)
        stored, length = view.stored_axis(axis), view.shape[axis]
        try:
            of_weight, of_scales = (
                [region[stored] for region in self.regions(shape)]
                for shape in (view.stored_shape, scale_shape(view))
            )
        except UnsupportedPlacementError:
            return False
        if all(bounds == (0, view.stored_shape[stored]) for bounds in of_weight):
            return True
        if view.folded is not None and stored == view.folded[0]:
            return False
        return all(
            start % BLOCK == 0
            and (stop % BLOCK == 0 or stop == length)
            and first == start // BLOCK
            and last == blocks(stop)
            for (start, stop), (first, last) in zip(of_weight, of_scales, strict=True)
            if start < stop or first < last
        )

    def of_moment(self, view: MatrixView, shape: Sequence[int]) -> "Sharding":
        """How a second moment of `shape` lies beside its weight.

        As the weight does on the axes that both have; whole on the axes that the moment reduces, and on
        the output axis where that has one number for each block.
        """
        has, whole = view.unfolded(tuple(shape)), view.shape
        of_view = 0 if view.folded is None else view.folded[1] - 1

        def unfolded(axis: int) -> int:
            return axis if view.folded is None or axis <= view.folded[0] else axis + of_view

        return Sharding(
            self.mesh,
            tuple(
                Replicate()
                if isinstance(placement, Shard | _StridedShard)
                and has[unfolded(placement.dim)] != whole[unfolded(placement.dim)]
                else placement
                for placement in self.placements
            ),
        )


def sharding_of(value: DTensor) -> Sharding:
    """How a DTensor lies."""
    return Sharding(value.device_mesh, tuple(value.placements))


def check_placement(param: DTensor, name: str) -> None:
    """Raises a ValueError that names the parameter unless each rank holds a rectangle of it."""
    remedy = "redistribute it to Shard and Replicate placements with param.redistribute(...)"
    if any(isinstance(placement, Partial) for placement in param.placements):
        remedy = "a parameter is no pending sum; make it whole with param.redistribute(...)"
    try:
        sharding_of(param).regions(param.shape)
    except UnsupportedPlacementError as error:
        raise ValueError(
            f"{name}: NorMuon cannot step a DTensor with placements {tuple(param.placements)} on"
            f" {param.device_mesh}: {error}; {remedy}."
        ) from error


def check_unfolding(param: DTensor, view: MatrixView, name: str) -> None:
    """Raises a ValueError that names the parameter unless each rank holds as many whole entries of the
    first of the axes that its layout unfolds one to."""
    if view.folded is None:
        return
    first, count = view.folded
    held = sharding_of(param).regions(param.shape)
    sizes = view.shape[first : first + count]
    try:
        for region in held:
            unfolded_region(view, region)
        lengths = {region[first][1] - region[first][0] for region in held}
        if len(lengths) > 1:
            raise ValueError(f"ranks hold {sorted(lengths)} entries of axis {first}")
    except ValueError as error:
        raise ValueError(
            f"{name}: placements {tuple(param.placements)} on {param.device_mesh} do not divide the"
            f" {sizes[0]} parts of axis {first}, which the layout unfolds to {sizes}, evenly: {error}."
            " Shard another axis, or over a number of ranks that divides the parts."
        ) from error


def check_blocks(param: DTensor, view: MatrixView, name: str) -> None:
    """Raises a ValueError that names the parameter unless each rank holds whole blocks of it."""
    if sharding_of(param).has_whole_blocks(view):
        return
    axis = view.stored_axis(block_axis(view))
    raise ValueError(
        f"{name}: momentum_dtype=torch.int8 keeps a scale for every {BLOCK} entries along axis {axis} of"
        f" {tuple(param.shape)}, and placements {tuple(param.placements)} on {param.device_mesh} divide"
        f" them; shard another axis, or into multiples of {BLOCK}, or use momentum_dtype=torch.bfloat16."
    )


def check_gradient(param: DTensor, gradient: torch.Tensor, name: str) -> None:
    """Raises a RuntimeError that names the parameter unless its gradient is on the same mesh."""
    if not isinstance(gradient, DTensor) or gradient.device_mesh != param.device_mesh:
        where = gradient.device_mesh if isinstance(gradient, DTensor) else "a plain tensor"
        raise RuntimeError(
            f"{name}: the parameter is a DTensor with placements {tuple(param.placements)} on"
            f" {param.device_mesh}, but its gradient is on {where}; make it a DTensor on that mesh, as"
            " backward() does."
        )


def local_gradient(param: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a gradient, brought to the placements of its parameter."""
    assert isinstance(param, DTensor)
    assert isinstance(gradient, DTensor)
    if gradient.placements != param.placements:
        gradient = gradient.redistribute(placements=param.placements)
    return gradient.to_local()


@lru_cache(maxsize=64)
def _new_group(ranks: tuple[int, ...], default: dist.ProcessGroup) -> dist.ProcessGroup:
    del default  # It keys the cache: after another initialization the group is another one.
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)
    return group


def mesh_group(mesh: DeviceMesh) -> tuple[dist.ProcessGroup, tuple[int, ...]]:
    """The process group of all ranks of a mesh, and each one's place in the mesh in row-major order.

    A mesh has a group for each of its axes only; that of several axes is made on first use, by the
    ranks of the mesh alone.
    """
    ranks = mesh.mesh.flatten().tolist()
    default = dist.group.WORLD
    assert default is not None
    if mesh.ndim == 1:
        group = mesh.get_group()
    elif len(ranks) == dist.get_world_size():
        group = default
    else:
        group = _new_group(tuple(sorted(ranks)), default)
    return group, tuple(ranks.index(rank) for rank in dist.get_process_group_ranks(group))
