"""Moving matrices between the ranks that hold tiles of them and the one that has them whole.

Each rank works out from the placements alone who sends what to whom. So one all-to-all moves a whole
stack, and no message has to come before it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist

from normuon_core import MatrixView
from torch_ref.leaves.part import Region, stack_indices

Indices = tuple[int, ...]


class Tile(NamedTuple):
    """A rectangle of a matrix, and the ranks that hold it. No two tiles of a matrix overlap."""

    rows: Indices
    columns: Indices
    holders: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    @property
    def entries(self) -> int:
        return len(self.rows) * len(self.columns)

    def source(self, owner: int) -> int:
        """The rank that sends the tile to an owner: the owner itself if it holds it, else a holder.

        Which holder that is differs from owner to owner, so that the work is shared.
        """
        return owner if owner in self.holders else self.holders[owner % len(self.holders)]

    def read(self, matrix: torch.Tensor) -> torch.Tensor:
        """The tile of a whole matrix (rows, columns): a view where its sides are in one piece."""
        return matrix[_index(self.rows)][:, _index(self.columns)]

    def write(self, matrix: torch.Tensor, values: torch.Tensor) -> None:
        rows, columns = _index(self.rows), _index(self.columns)
        if isinstance(rows, slice) and isinstance(columns, slice):
            matrix[rows, columns].copy_(values)
        else:
            matrix[_numbers(self.rows)[:, None], _numbers(self.columns)] = values


def _index(indices: Indices) -> slice | torch.Tensor:
    first, last = indices[0], indices[-1]
    if last - first + 1 == len(indices):
        return slice(first, last + 1)
    return _numbers(indices)


def _numbers(indices: Indices) -> torch.Tensor:
    return torch.tensor(indices, device="cpu")


@lru_cache(maxsize=1024)
def tiles(
    view: MatrixView, regions: tuple[Region, ...], outputs: tuple[int, int]
) -> list[tuple[Tile, ...]]:
    """The tiles of each of a weight's matrices, by its place in the batch.

    Args:
      view: of the whole weight. regions: what each rank holds of it.
      outputs: (first, one after the last) of the output neurons that are the matrix: a block's.
    """
    first, stop = outputs
    held: list[dict[tuple[Indices, Indices], list[int]]] = [
        defaultdict(list) for _ in range(view.stack_shape[0])
    ]
    for rank, region in enumerate(regions):
        batch, rows, columns = stack_indices(view, region)
        side = rows if view.output_is_rows else columns
        side[:] = [i - first for i in side if first <= i < stop]
        if rows and columns:
            for matrix in batch:
                held[matrix][tuple(rows), tuple(columns)].append(rank)
    return [tuple(Tile(*sides, tuple(ranks)) for sides, ranks in each.items()) for each in held]


class Transfer(NamedTuple):
    """A tile of the matrix of that number, from one rank to another."""

    matrix: int
    tile: Tile
    source: int
    destination: int


@dataclass(frozen=True)
class Route:
    """This rank's share of an all-to-all.

    Attributes:
      outgoing, incoming: the transfers from and to this rank, in the order of their buffers.
      sent, received: entries to and from each rank.
      moves: whether any rank sends anything to another; all ranks know.
    """

    outgoing: tuple[Transfer, ...]
    incoming: tuple[Transfer, ...]
    sent: list[int]
    received: list[int]
    moves: bool

    def run(
        self,
        read: Callable[[Transfer], torch.Tensor],
        write: Callable[[Transfer, torch.Tensor], None],
        *,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
    ) -> None:
        """Reads what leaves, moves it, and writes what arrives: each (rows, columns) of a tile."""
        leaving = [read(transfer).reshape(-1) for transfer in self.outgoing]
        buffer = torch.cat([torch.empty(0, dtype=dtype, device=device), *leaving])
        if self.moves:
            arrived = buffer.new_empty(sum(self.received))
            # Sent as bytes, because not every backend takes every dtype.
            size = dtype.itemsize
            dist.all_to_all_single(
                arrived.view(torch.uint8),
                buffer.view(torch.uint8),
                [count * size for count in self.received],
                [count * size for count in self.sent],
                group=group,
            )
            buffer = arrived
        for transfer, values in zip(
            self.incoming, buffer.split([t.tile.entries for t in self.incoming]), strict=True
        ):
            write(transfer, values.view(transfer.tile.shape))


def route(transfers: Iterable[Transfer], *, rank: int, ranks: int) -> Route:
    """The share of `rank` in the transfers of all `ranks`."""
    outgoing, incoming, moves = [], [], False
    sent, received = [0] * ranks, [0] * ranks
    for transfer in transfers:
        moves = moves or transfer.source != transfer.destination
        if transfer.source == rank:
            outgoing.append(transfer)
            sent[transfer.destination] += transfer.tile.entries
        if transfer.destination == rank:
            incoming.append(transfer)
            received[transfer.source] += transfer.tile.entries
    # The sort is stable, so that both ends agree on the order of what goes from one rank to another.
    outgoing.sort(key=lambda transfer: transfer.destination)
    incoming.sort(key=lambda transfer: transfer.source)
    return Route(tuple(outgoing), tuple(incoming), sent, received, moves)


def to_owners(tiles: Sequence[Sequence[Tile]], owners: Sequence[int]) -> Iterable[Transfer]:
    """Every matrix's tiles to its owner, each once."""
    for matrix, (each, owner) in enumerate(zip(tiles, owners, strict=True)):
        for tile in each:
            yield Transfer(matrix, tile, tile.source(owner), owner)


def to_holders(tiles: Sequence[Sequence[Tile]], owners: Sequence[int]) -> Iterable[Transfer]:
    """Every matrix's tiles from its owner to all that hold them."""
    for matrix, (each, owner) in enumerate(zip(tiles, owners, strict=True)):
        for tile in each:
            for holder in tile.holders:
                yield Transfer(matrix, tile, owner, holder)
