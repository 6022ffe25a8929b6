"""Where the matrices of one shape are orthogonalized on a mesh, and what each place costs a device.

Decided from shapes, mesh and dtype alone, before anything runs: every device of every process comes to
the same answer.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

from normuon_core.cost import Form, Iteration, operations
from normuon_core.polar_iteration import gram_restarts

Strategy = Literal["whole", "owners", "shards"]

OPERATIONS_A_BYTE = 2000
"""Half-precision operations that a device makes in the time in which it sends one byte.

Two H100s reach 300 TFLOP/s each in a whole step of the 1B Llama, and send 259 GB/s over NVLink
(`python -m benchmarks.sharded`): 1200 over a step, and about twice that in its products alone. Between
hosts a byte costs more: that would only favour what needs none."""

_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""Bytes of a compute dtype's entry."""

_SLOWNESS = {2: 1, 4: 8, 8: 16}
"""Time of an operation by the compute dtype's bytes, half precision being 1 (float32, not TF32)."""


@dataclass(frozen=True)
class Spread:
    """How the matrices of one stack or group lie on a mesh.

    Attributes:
      count: matrices of which a device has parts; where a batch axis is sharded, its share of them.
      rows, columns: of a whole matrix.
      row_parts, column_parts: over how many devices each side is divided.
      replicas: how many devices hold the same part.
      dtype: in which the matrices come.
      on_mesh: whether it is known where each part lies, so that kernels can run on each device.
    """

    count: int
    rows: int
    columns: int
    row_parts: int = 1
    column_parts: int = 1
    replicas: int = 1
    dtype: str = "float32"
    on_mesh: bool = False

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
      owners: how many devices share the matrices out among them, replicas included where they help.
      each: matrices that one device orthogonalizes.
      padding: matrices of zeros among those of all `owners`.
      operations: floating-point operations of the iteration on one device.
      bytes_sent: by one device in a step: matrices and Gram matrices.
      form, dtype: of the iteration there; None for stages that have none.
    """

    strategy: Strategy
    owners: int
    each: int
    padding: int
    operations: float
    bytes_sent: float
    form: Form | None = None
    dtype: str | None = None

    @property
    def time_a_matrix(self) -> float:
        """Of the iteration on one device, in operations of half precision; 0 where it is not known."""
        if self.dtype is None:
            return 0.0
        return self.operations / max(1, self.each) * _SLOWNESS[_SIZES[self.dtype]]


def place(spread: Spread, iteration: Iteration, *, may_stay: bool = False) -> Placement:
    """The cheapest place for a group of matrices, and the form and dtype of the iteration there.

    Args:
      may_stay: whether they may stay divided, if the iteration can.
    """
    form, dtype = iteration.form(spread.rows, spread.columns)
    work = operations(
        spread.short,
        spread.long,
        iteration.steps,
        form=form,
        symmetric=iteration.symmetric,
        cubics=iteration.cubics,
    )
    candidates = [whole_or_owned(spread, work, _SIZES[dtype])]
    if spread.replicas > 1:
        candidates.append(owned(spread, work, _SIZES[dtype], sharing=spread.replicas))
    candidates = [replace(each, form=form, dtype=dtype) for each in candidates]
    on_parts = iteration.dtype_on_shards
    if may_stay and on_parts is not None and spread.parts > 1:
        stays = on_shards(spread, iteration.steps, _SIZES[on_parts], cubics=iteration.cubics)
        candidates.append(replace(stays, form="gram", dtype=on_parts))
    return min(candidates, key=_time)


def _time(placement: Placement) -> float:
    """The time that a placement takes, in no unit: it is only compared with others."""
    return placement.each * placement.time_a_matrix + placement.bytes_sent * OPERATIONS_A_BYTE


def whole_or_owned(spread: Spread, work: float, itemsize: int) -> Placement:
    """The placement without the replicas' help: where matrices are whole, or else with owners.

    Args:
      work: operations on one whole matrix. itemsize: bytes of an entry that is sent.
    """
    if spread.parts > 1:
        return owned(spread, work, itemsize, sharing=1)
    return Placement("whole", 1, spread.count, 0, spread.count * work, 0.0)


def owned(spread: Spread, work: float, itemsize: int, *, sharing: int) -> Placement:
    """The placement with an owner for each matrix, among the devices of `sharing` replicas.

    It takes an all-to-all there and one back. The replicas then gather what each of them has made.
    """
    owners = spread.parts * sharing
    each = math.ceil(spread.count / owners)
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


def on_shards(spread: Spread, steps: int, itemsize: int, *, cubics: int = 0) -> Placement:
    """The placement of matrices that stay divided along the long side, in the Gram form.

    Gram matrices are summed over the parts in float32. The products with X are shared among the parts;
    each part makes those of Gram matrices again.
    """
    parts = spread.parts
    work = operations(
        spread.short, spread.long / parts, steps, form="gram", symmetric=False, cubics=cubics
    )
    gram_matrices = len(gram_restarts(steps, spread.short)) + 1
    reduced = 2 * (parts - 1) / parts * gram_matrices * spread.short**2 * max(4, itemsize)
    turned = 0.0
    if spread.short_parts > 1:
        local = spread.rows * spread.columns / parts
        turned = 2 * local * (1 - 1 / spread.short_parts) * itemsize
    return Placement(
        "shards", 1, spread.count, 0, spread.count * work, spread.count * (reduced + turned)
    )
