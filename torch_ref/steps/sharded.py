"""One step of weights that are DTensors.

Momentum, decay, scale and rate are elementwise: each rank does them on its shards. For the stages
between, each matrix has an owner (`torch_ref.steps.owners`). The parts' squares are summed to the
matrix's norm, X is rounded to the compute dtype where it lies and sent to the owner, which has the
second moment sent as well; what comes out goes back the same way. For a stack of matrices that is one
all-reduce of a number a matrix (a number a row, where rows are equilibrated), two all-to-alls of
matrices and two of statistics, and nothing within the iteration. A hyperball adds two all-reduces, of
two numbers a matrix and of one, for all stacks that a rank has memory for at once.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from torch_ref.leaves.dtypes import Scalar
from torch_ref.matrices.state import moment_shapes
from torch_ref.mesh.exchange import Transfer
from torch_ref.mesh.rectangles import Sharding, mesh_group
from torch_ref.stages.norms import frobenius_norm
from torch_ref.stages.stack import StackStages
from torch_ref.steps.hyperball import HyperballsOnRanks
from torch_ref.steps.owners import StackOnRanks, WeightOnRanks, plan_on_ranks
from torch_ref.steps.plan import GroupSpec, Planner, WeightSpec
from torch_ref.steps.weight import MatrixWeight, beta2_of, group_specs, step_matrices


@dataclass(frozen=True)
class ShardedWeight:
    """A weight during one step: this rank's shard, and how the whole of it lies."""

    shard: MatrixWeight
    sharding: Sharding

    def on_ranks(self, order: tuple[int, ...]) -> WeightOnRanks:
        """Over the ranks of the mesh's group; `order` is each one's place in the mesh."""
        shard = self.shard
        group = GroupSpec.of(shard.group, shard.recipe, ())
        return _on_ranks(shard.spec, group, self.sharding, order)


@lru_cache(maxsize=4096)
def _on_ranks(
    weight: WeightSpec, group: GroupSpec, sharding: Sharding, order: tuple[int, ...]
) -> WeightOnRanks:
    view, rule = weight.part.view, group.recipe.neuron_norm
    shapes = [] if rule is None else moment_shapes(view, rule)
    placed = [(sharding, view.stored_shape)]
    placed += [(sharding.of_moment(view, shape), shape) for shape in shapes]
    regions, *moments = (
        tuple(each.regions(shape)[place] for place in order) for each, shape in placed
    )
    return WeightOnRanks(
        view=view,
        regions=regions,
        stages=group.eager_stages(weight),
        moment_shapes=tuple(shapes),
        moment_regions=tuple(moments),
        needs_norm=group.recipe.shape_scale == "rms",
    )


def step_sharded_matrices(
    weights: Iterable[tuple[MatrixWeight, Sharding]], planner: Planner
) -> None:
    """One step of all weights: this rank's shard of each, and how the whole of it lies.

    Those of one mesh go together. Every rank of a mesh must take part, whether it holds anything or not;
    a rank outside of it has nothing to do.
    """
    meshes: dict[DeviceMesh, list[ShardedWeight]] = defaultdict(list)
    for shard, sharding in weights:
        if sharding.mesh.get_coordinate() is not None:
            meshes[sharding.mesh].append(ShardedWeight(shard, sharding))
    for mesh, members in meshes.items():
        group, order = mesh_group(mesh)
        on_ranks = [weight.on_ranks(order) for weight in members]
        moving, resting = [], []
        for weight, held in zip(members, on_ranks, strict=True):
            chosen = resting if held.is_whole_where_it_is else moving
            chosen.append((weight.shard, held))
        whole = [shard for shard, _ in resting]
        # The kernels take no DTensors: `backend="auto"` is PyTorch's own operations here.
        specs = tuple(spec._replace(backend="eager") for spec in group_specs(whole))
        step_matrices(planner(specs).eager, whole)
        waves = plan_on_ranks(
            tuple(held for _, held in moving), rank=dist.get_rank(group), ranks=len(order)
        )
        shards = [shard for shard, _ in moving]
        hyperballs = HyperballsOnRanks(moving, group)
        for wave in waves:
            _step_wave(wave, shards, group)
            hyperballs.finish(wave)


def _step_wave(
    wave: Sequence[StackOnRanks], shards: Sequence[MatrixWeight], group: dist.ProcessGroup
) -> None:
    exchanges = [_Exchange(stack, shards, group) for stack in wave]
    come = [
        (each.matrices_to_owners(each.prepare()), each.moments_to_owners()) for each in exchanges
    ]
    done = [
        _own_stages(exchange.stack, x, moments, exchange.beta2())
        for exchange, (x, moments) in zip(exchanges, come, strict=True)
    ]
    for exchange, (update, statistics) in zip(exchanges, done, strict=True):
        updates = exchange.matrices_to_holders(update)
        exchange.receive(updates, exchange.statistics_to_holders(statistics))


def _own_stages(
    stack: StackOnRanks, x: torch.Tensor, moments: torch.Tensor, beta2: Scalar
) -> tuple[torch.Tensor, torch.Tensor]:
    """The stages on the matrices that this rank owns: (the update, its statistics).

    The update is in `_traveling_dtype`, the statistics are (owned, 1, statistics).
    """
    stages = stack.stages
    if len(x) == 0:
        return x.to(_traveling_dtype(stages)), moments
    neurons = stages.neurons
    shape = (len(x), neurons, 1) if stages.neurons_are_rows else (len(x), 1, neurons)
    kept = moments[..., :neurons].reshape(shape) if neurons else None
    update, updated = stages.finish(x, kept, beta2)
    parts = [] if updated is None else [updated.reshape(len(x), 1, neurons)]
    if stack.statistics > neurons:
        parts.append(frobenius_norm(update.to(stages.dtype)))
    rows = torch.cat(parts, dim=-1) if parts else moments
    return update.to(_traveling_dtype(stages)), rows


def _traveling_dtype(stages: StackStages) -> torch.dtype:
    """The dtype of the update on its way back. Ranks that own no matrix know it too."""
    return stages.dtype if stages.orthogonalizer is not None else stages.prepared_dtype


class _Exchange:
    """A stack's matrices and statistics between the shards of this rank and the matrices it owns."""

    def __init__(
        self, stack: StackOnRanks, shards: Sequence[MatrixWeight], group: dist.ProcessGroup
    ):
        self.stack, self.stages, self.shards, self.group = stack, stack.stages, shards, group
        self.place = {number: place for place, number in enumerate(stack.owned)}
        # Where in its slot's arrays each matrix is of which this rank holds a part.
        self.held = {
            number: (index, place)
            for index, slot in enumerate(stack.slots)
            for place, number in enumerate(slot.numbers)
        }

    def prepare(self) -> list[torch.Tensor]:
        """X of every slot, (matrices held, rows here, columns here), in the compute dtype."""
        directions = [
            self.shards[slot.weight].direction(slot.block)[slot.here] for slot in self.stack.slots
        ]
        shape = self.stages.squares_shape
        if shape is None:
            return directions
        zero = torch.zeros(shape, dtype=self.stages.dtype, device=self.stages.device)
        squares = [zero] * sum(slot.count for slot in self.stack.slots)
        for slot, u in zip(self.stack.slots, directions, strict=True):
            own = self.stages.scaled_squares(u)
            assert own is not None
            for number, square in zip(slot.numbers, own.unbind(), strict=True):
                if number in self.stack.counted or not self.stack.is_divided:
                    squares[number] = self._of_all_outputs(square, slot.outputs, zero)
        total = torch.stack(squares)
        if self.stack.is_divided:
            dist.all_reduce(total, group=self.group)
        of_matrix = total.split(1)
        return [
            self.stages.prepare(
                u, torch.cat([of_matrix[number] for number in slot.numbers]), slot.outputs
            )
            if slot.numbers
            else u.to(self.stages.prepared_dtype)
            for slot, u in zip(self.stack.slots, directions, strict=True)
        ]

    def _of_all_outputs(
        self, square: torch.Tensor, outputs: Sequence[int], zero: torch.Tensor
    ) -> torch.Tensor:
        """A matrix's squares from those of this rank's rows, with zeros for the rows of others."""
        if square.shape == zero.shape:
            return square
        axis = 0 if self.stages.output_is_rows else 1
        places = torch.tensor(outputs, dtype=torch.long, device=zero.device)
        return zero.index_copy(axis, places, square)

    def beta2(self) -> Scalar:
        """The decay of the second moments of what this rank owns."""
        slots = self.stack.slots
        numbers = (range(slot.first, slot.first + slot.count) for slot in slots)
        counts = [sum(number in self.place for number in own) for own in numbers]
        return beta2_of([self.shards[slot.weight] for slot in slots], counts, self.stages.dtype)

    def matrices_to_owners(self, slots: Sequence[torch.Tensor]) -> torch.Tensor:
        """The matrices that this rank owns, (owned, rows, columns)."""
        dtype, device = self.stages.prepared_dtype, self.stages.device
        owned = torch.empty(len(self.place), *self.stages.sides, dtype=dtype, device=device)

        def read(transfer: Transfer) -> torch.Tensor:
            slot, place = self.held[transfer.matrix]
            return slots[slot][place]

        def write(transfer: Transfer, values: torch.Tensor) -> None:
            transfer.tile.write(owned[self.place[transfer.matrix]], values)

        self.stack.matrices_to_owners.run(read, write, dtype=dtype, device=device, group=self.group)
        return owned

    def matrices_to_holders(self, owned: torch.Tensor) -> list[torch.Tensor]:
        """The updates of every slot, (matrices held, rows here, columns here)."""
        slots = [
            owned.new_empty(self.shards[slot.weight].direction(slot.block)[slot.here].shape)
            for slot in self.stack.slots
        ]

        def read(transfer: Transfer) -> torch.Tensor:
            return transfer.tile.read(owned[self.place[transfer.matrix]])

        def write(transfer: Transfer, values: torch.Tensor) -> None:
            slot, place = self.held[transfer.matrix]
            slots[slot][place].copy_(values)

        self.stack.matrices_to_holders.run(
            read, write, dtype=owned.dtype, device=owned.device, group=self.group
        )
        return slots

    def moments_to_owners(self) -> torch.Tensor:
        """The second moments of the matrices that this rank owns, (owned, 1, statistics)."""
        dtype, device = self.stages.dtype, self.stages.device
        owned = torch.zeros(len(self.place), 1, self.stack.statistics, dtype=dtype, device=device)
        kept = [self.shards[slot.weight].second_moment(slot.block) for slot in self.stack.slots]

        def read(transfer: Transfer) -> torch.Tensor:
            index, place = self.held[transfer.matrix]
            moment = kept[index]
            assert moment is not None
            return moment[self.stack.slots[index].here][place]

        def write(transfer: Transfer, values: torch.Tensor) -> None:
            transfer.tile.write(owned[self.place[transfer.matrix]], values)

        self.stack.statistics_to_owners.run(
            read, write, dtype=dtype, device=device, group=self.group
        )
        return owned

    def statistics_to_holders(
        self, owned: torch.Tensor
    ) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """(the new second moment, the norms of the updates) of every slot."""
        neurons = self.stages.neurons
        moments = [self.shards[slot.weight].second_moment(slot.block) for slot in self.stack.slots]
        moments = [
            None if moment is None else torch.empty_like(moment[slot.here])
            for moment, slot in zip(moments, self.stack.slots, strict=True)
        ]
        norms = [
            owned.new_zeros(len(slot.numbers), 1, 1) if self.stack.statistics > neurons else None
            for slot in self.stack.slots
        ]

        def read(transfer: Transfer) -> torch.Tensor:
            return transfer.tile.read(owned[self.place[transfer.matrix]])

        def write(transfer: Transfer, values: torch.Tensor) -> None:
            slot, place = self.held[transfer.matrix]
            is_norm = transfer.tile.columns == (neurons,)
            target = norms[slot] if is_norm else moments[slot]
            assert target is not None
            target[place].copy_(values.view(target.shape[1:]))

        self.stack.statistics_to_holders.run(
            read, write, dtype=owned.dtype, device=owned.device, group=self.group
        )
        return list(zip(moments, norms, strict=True))

    def receive(
        self,
        updates: Sequence[torch.Tensor],
        statistics: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]],
    ) -> None:
        """Hands every slot's matrices back to their weight."""
        for slot, update, (moment, norm) in zip(self.stack.slots, updates, statistics, strict=True):
            if slot.numbers:
                self.shards[slot.weight].receive(slot.block, update, moment, norm)
