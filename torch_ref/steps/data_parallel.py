"""Plain data parallelism: parameters are replicated, and their gradients are not summed yet.

Each matrix has an owner, which alone keeps its momentum and second moment. Parameters whose matrices
have one shape travel together: one reduce-scatter brings every owner the sum of its matrices'
gradients, the owner makes the whole step, and one all-gather brings the new parameters to all ranks, as
in modded-nanogpt's DistMuon.

What a rank owns of a buffer is stepped by a plan as on a single process (`steps.plan`). The buffers
themselves are not of that plan: its stacks cut one process's matrices wherever its memory ends, while a
buffer holds whole parameters and must be the same on every rank, whichever engine steps its matrices.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from normuon_core import MatrixView
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.leaves.part import Part, Region, cut
from torch_ref.matrices.views import from_stack, to_stack
from torch_ref.mesh.rectangles import Sharding
from torch_ref.steps.plan import DEFAULT_STACK_BYTES

StackKey = tuple[tuple[int, int], torch.dtype, torch.device]


class DataParallel:
    """The ranks among which the matrices are divided, and who owns which.

    The owners of a parameter are chosen when it is added, and stay: adding more parameters moves none.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        self.rank = dist.get_rank(group)
        self.owned: dict[torch.Tensor, Ownership] = {}
        self._counts: dict[StackKey, list[int]] = defaultdict(lambda: [0] * len(self.ranks))
        self._load = [0] * len(self.ranks)
        self._meshes: dict[tuple[int, ...], DeviceMesh] = {}

    def assign(self, param: torch.Tensor, view: MatrixView) -> None:
        """Gives a parameter's matrices to the ranks that have the least of their kind so far.

        The batch is divided along its largest axis, as that of a DTensor on the owners would be. So the
        state can be a DTensor, which `torch.distributed.checkpoint` can save.
        """
        _, rows, columns = view.stack_shape
        ranks = len(self.ranks)
        unfolded = () if view.folded is None else range(view.folded[0], sum(view.folded))
        candidates = [axis for axis in view.batch_axes if axis not in unfolded]
        axis = max(candidates, key=lambda axis: view.shape[axis], default=None)
        length = 1 if axis is None else max(1, view.shape[axis])
        chunk = -(-length // ranks)
        owners = -(-length // chunk)
        others = view.stack_shape[0] // length
        shares = [min(chunk, length - i * chunk) * others for i in range(owners)]
        counts = self._counts[(rows, columns), param.dtype, param.device]

        def crowding(first: int) -> tuple[int, int]:
            places = [((first + i) % ranks, share) for i, share in enumerate(shares)]
            return (
                max(counts[place] + share for place, share in places),
                max(self._load[place] for place, _ in places),
            )

        first = min(range(ranks), key=crowding)
        places = tuple((first + i) % ranks for i in range(owners))
        for place, share in zip(places, shares, strict=True):
            counts[place] += share
            self._load[place] += share * rows * columns * min(rows, columns)
        placement = Replicate()
        if axis is not None and owners > 1:
            placement = Shard(view.stored_axis(axis))
        sharding = Sharding(self._mesh(places, param.device), (placement,))
        regions = dict(zip(places, sharding.regions(view.stored_shape), strict=True))
        self.owned[param] = Ownership(view, sharding, regions)

    def _mesh(self, places: tuple[int, ...], device: torch.device) -> DeviceMesh:
        ranks = tuple(self.ranks[place] for place in places)
        if ranks not in self._meshes:
            # Nothing is ever sent along this mesh, so it needs no process groups; making them would be a
            # collective of all ranks.
            self._meshes[ranks] = DeviceMesh(device.type, list(ranks), _init_backend=False)
        return self._meshes[ranks]

    def mean(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The mean of each gradient over the ranks, in its working dtype; one all-reduce a dtype."""
        result: dict[int, torch.Tensor] = {}
        for places in _by(
            range(len(gradients)), lambda i: (gradients[i].dtype, gradients[i].device)
        ):
            flat = torch.cat([gradients[i].reshape(-1) for i in places])
            dist.all_reduce(flat, group=self.group)
            flat = _divided(flat, len(self.ranks))
            sizes = [gradients[i].numel() for i in places]
            for i, part in zip(places, flat.split(sizes), strict=True):
                result[i] = part.view(gradients[i].shape)
        return [result[i] for i in range(len(gradients))]

    def stacks(
        self, gradients: dict[torch.Tensor, torch.Tensor], max_bytes: Callable[..., int | None]
    ) -> list["ReplicatedStack"]:
        """The parameters of the gradients in buffers: those with matrices of one shape, up to a bound.

        Args:
          gradients: by parameter; on every rank those of the same parameters.
          max_bytes: of a parameter, what its group allows a stack to take, or None.
        """
        result = []
        for params in _by(gradients, lambda p: (*self._key(p), gradients[p].dtype)):
            (rows, columns), dtype, _ = self._key(params[0])
            bounds = [max_bytes(p) or DEFAULT_STACK_BYTES for p in params]
            limit = min(bounds) // (rows * columns * dtype.itemsize * len(self.ranks))
            members: list[torch.Tensor] = []
            counts = [0] * len(self.ranks)
            for param in params:
                shares = self.owned[param].counts(len(self.ranks))
                filled = [a + b for a, b in zip(counts, shares, strict=True)]
                if members and max(filled) > max(1, limit):
                    result.append(ReplicatedStack(self, members, gradients))
                    members, filled = [], shares
                members.append(param)
                counts = filled
            result.append(ReplicatedStack(self, members, gradients))
        return result

    def _key(self, param: torch.Tensor) -> StackKey:
        _, rows, columns = self.owned[param].view.stack_shape
        return (rows, columns), param.dtype, param.device


@dataclass(frozen=True)
class Ownership:
    """Which ranks own which matrices of a parameter.

    Attributes:
      view: of the parameter.
      sharding: how its state lies: over the ranks that own some of it.
      regions: by place in the group, what each of them owns.
    """

    view: MatrixView
    sharding: Sharding
    regions: dict[int, Region]

    @cached_property
    def parts(self) -> dict[int, Part]:
        """What each of the owners owns, by its place in the group."""
        return {place: Part(self.view, region) for place, region in self.regions.items()}

    def counts(self, ranks: int) -> list[int]:
        """How many matrices each rank of the group owns."""
        parts = [self.parts.get(place) for place in range(ranks)]
        return [0 if part is None else part.local.stack_shape[0] for part in parts]


class ReplicatedStack:
    """Same-shape matrices of several replicated parameters during one step.

    Their buffers are (ranks, matrices of the fullest rank, rows, columns), padded with zeros.
    """

    def __init__(
        self,
        parallel: DataParallel,
        params: Sequence[torch.Tensor],
        gradients: dict[torch.Tensor, torch.Tensor],
    ):
        self.parallel, self.params, self.gradients = parallel, params, gradients
        each = [parallel.owned[param].counts(len(parallel.ranks)) for param in params]
        self.most = max(map(sum, zip(*each, strict=True)))
        _, self.rows, self.columns = parallel.owned[params[0]].view.stack_shape

    def reduce(self) -> None:
        """Starts to bring each owner the sum of its matrices' gradients."""
        sent = self._buffer(self.gradients[self.params[0]], len(self.parallel.ranks))
        for place, param, part, bounds in self._parts():
            view = part.local
            sent[place, bounds] = to_stack(cut(self.gradients[param], part.region), view)
        self.received = self._buffer(sent, 1, zero=False)
        self.pending = dist.reduce_scatter_tensor(
            self.received, sent, group=self.parallel.group, async_op=True
        )

    def own_gradients(self) -> list[tuple[torch.Tensor, Part, torch.Tensor]]:
        """(parameter, part, mean gradient of the part) of what this rank owns."""
        self._wait()
        mean = _divided(self.received[0], len(self.parallel.ranks))
        return [
            (param, part, from_stack(mean[bounds], part.local))
            for place, param, part, bounds in self._parts()
            if place == self.parallel.rank
        ]

    def gather(self) -> None:
        """Starts to bring every rank the parameters, once the owners have stepped theirs."""
        own = self._buffer(self.params[0], 1)
        for place, param, part, bounds in self._parts():
            if place == self.parallel.rank:
                own[0, bounds] = to_stack(cut(param, part.region), part.local)
        self.received = self._buffer(own, len(self.parallel.ranks), zero=False)
        # Sent as bytes: not every backend takes every dtype.
        self.pending = dist.all_gather_into_tensor(
            self.received.view(torch.uint8),
            own.view(torch.uint8),
            group=self.parallel.group,
            async_op=True,
        )

    def finish(self) -> None:
        """Puts the parameters that others have stepped in their places."""
        self._wait()
        for place, param, part, bounds in self._parts():
            if place != self.parallel.rank:
                stepped = from_stack(self.received[place, bounds], part.local)
                cut(param, part.region).copy_(stepped)
        del self.received

    def _wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            # The handle keeps what was sent alive.
            self.pending = None

    def _buffer(self, like: torch.Tensor, ranks: int, *, zero: bool = True) -> torch.Tensor:
        make = like.new_zeros if zero else like.new_empty
        return make(ranks, self.most, self.rows, self.columns)

    def _parts(self):
        """(place in the group, parameter, part, where in that rank's matrices) of all parts."""
        done = [0] * len(self.parallel.ranks)
        for param in self.params:
            owned = self.parallel.owned[param]
            for place, part in owned.parts.items():
                start = done[place]
                done[place] += part.local.stack_shape[0]
                yield place, param, part, slice(start, done[place])


def _divided(total: torch.Tensor, ranks: int) -> torch.Tensor:
    """The mean of a sum over ranks, in the working dtype, so that half precision is rounded once.

    (gloo has no collective that averages.)
    """
    return total.to(working_dtype(total.dtype)) / ranks


def _by(items, key):
    """The items in lists of those with one key, in the order of their first appearance."""
    result = defaultdict(list)
    for item in items:
        result[key(item)].append(item)
    return list(result.values())
