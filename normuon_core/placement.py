"""Where the matrices of one shape are orthogonalized on a mesh, and what each place costs a device.

Decided from shapes, mesh and dtype alone, before anything runs: every device of every process comes to
the same answer.
"""

import math
from dataclasses import dataclass
from typing import Literal

from normuon_core.polar_iteration import gram_restarts, operations

Strategy = Literal["whole", "owners", "shards"]

OPERATIONS_A_BYTE = 2000
"""Half-precision operations that a device makes in the time in which it sends one byte.

Two H100s reach 300 TFLOP/s each in a whole step of the 1B Llama, and send 259 GB/s over NVLink
(`python -m benchmarks.sharded`): 1200 over a step, and about twice that in its products alone. Between
hosts a byte costs more: that would only favour what needs none."""

_SLOWNESS = {2: 1, 4: 8, 8: 16}
"""Time of an operation by the compute dtype's bytes, half precision being 1 (float32, not TF32)."""


@dataclass(frozen=True)
class Spread:
    """How the matrices of one stack or group lie on a mesh.

    Attributes:
      count: matrices that a device sees parts of: its share where a batch axis is sharded.
      rows, columns: of a whole matrix.
      row_parts, column_parts: over how many devices each side is divided.
      replicas: how many devices hold the same part.
    """

    count: int
    rows: int
    columns: int
    row_parts: int = 1
    column_parts: int = 1
    replicas: int = 1

    @property
    def parts(self) -> int:
        return self.row_parts * self.column_parts

    @property
    def short(self) -> int:
        return min(self.rows, self.columns)

    @property
    def long(self) -> int:
        return max(self.rows, self.columns)

    @property
    def short_parts(self) -> int:
        """Over how many devices the shorter side is divided; the rows are it on a tie."""
        return self.row_parts if self.rows <= self.columns else self.column_parts


@dataclass(frozen=True)
class Placement:
    """Where a group's matrices are orthogonalized.

    Attributes:
      strategy: "whole": every device has its matrices whole, replicas repeat the work; "owners": each
        matrix goes to one device and comes back; "shards": each stays divided along its long side and
        goes through the Gram form.
      owners: among how many devices a matrix's are found, replicas included where they share the work.
      each: matrices that one device orthogonalizes.
      padding: matrices of zeros among those of all `owners`.
      operations: floating-point operations of the iteration on one device.
      bytes_sent: by one device in a step: matrices and Gram matrices.
    """

    strategy: Strategy
    owners: int
    each: int
    padding: int
    operations: float
    bytes_sent: float

    def seconds(self, itemsize: int) -> float:
        """In a unit of its own, to compare places by."""
        return self.operations * _SLOWNESS[itemsize] + self.bytes_sent * OPERATIONS_A_BYTE


def place(
    spread: Spread,
    steps: int,
    *,
    form: Literal["standard", "gram"],
    itemsize: int,
    symmetric: bool,
    shard_itemsize: int | None,
) -> Placement:
    """The cheapest place for a group of matrices.

    Args:
      steps: of the iteration. form, itemsize: of a matrix with one owner, the bytes of its compute
        dtype. symmetric: whether products that are known to be symmetric cost half there.
      shard_itemsize: bytes of the compute dtype on shards; None rules them out.
    """
    candidates = [(whole_or_owned(spread, steps, form, itemsize, symmetric), itemsize)]
    if spread.replicas > 1:
        shared = owned(spread, steps, form, itemsize, symmetric, sharing=spread.replicas)
        candidates.append((shared, itemsize))
    if shard_itemsize is not None and spread.parts > 1:
        candidates.append((on_shards(spread, steps, shard_itemsize), shard_itemsize))
    return min(candidates, key=lambda pair: pair[0].seconds(pair[1]))[0]


def whole_or_owned(spread: Spread, steps, form, itemsize: int, symmetric: bool) -> Placement:
    """Without the replicas' help: where the matrices are if they are whole, else with owners."""
    if spread.parts > 1:
        return owned(spread, steps, form, itemsize, symmetric, sharing=1)
    each = operations(spread.short, spread.long, steps, form=form, symmetric=symmetric)
    return Placement("whole", 1, spread.count, 0, spread.count * each, 0.0)


def owned(
    spread: Spread, steps, form, itemsize: int, symmetric: bool, *, sharing: int
) -> Placement:
    """With an owner for each matrix, found among its parts and `sharing` of their replicas.

    An all-to-all there and one back; the replicas then gather what each of them has made.
    """
    owners = spread.parts * sharing
    each = math.ceil(spread.count / owners)
    work = operations(spread.short, spread.long, steps, form=form, symmetric=symmetric)
    entries = each * spread.rows * spread.columns
    moved = 2 * (spread.parts - 1) / spread.parts + (sharing - 1)
    return Placement(
        "owners",
        owners,
        each,
        each * owners - spread.count,
        each * work,
        entries * moved * itemsize,
    )


def on_shards(spread: Spread, steps: int, itemsize: int) -> Placement:
    """Divided along the long side, in the Gram form: its Gram matrices are summed, in float32.

    The products with X are shared among the parts, those of Gram matrices made by each.
    """
    parts = spread.parts
    work = operations(spread.short, spread.long / parts, steps, form="gram", symmetric=False)
    gram_matrices = len(gram_restarts(steps, spread.short)) + 1
    reduced = 2 * (parts - 1) / parts * gram_matrices * spread.short**2 * max(4, itemsize)
    turned = 0.0
    if spread.short_parts > 1:
        local = spread.rows * spread.columns / parts
        turned = 2 * local * (1 - 1 / spread.short_parts) * itemsize
    return Placement(
        "shards", 1, spread.count, 0, spread.count * work, spread.count * (reduced + turned)
    )
