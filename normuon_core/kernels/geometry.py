"""Where a weight holds its matrices, and how each is cut into tiles and partial sums."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from normuon_core.kernels import source
from normuon_core.layout import MatrixView
from normuon_core.neurons import NeuronAxis, neurons_on_rows

MOST_PARTS = 1024
"""Partial sums of a matrix's norm: few enough for every program of `feed` to add them up itself."""


_LEAST_CELLS = 8
"""Equal cells that a side is divided into for these sums, if it can be: over so many devices a small
matrix may be divided as well, without another order of the sum."""


_ALL = 2**30
"""Matrices that share a single row of rates: not their number, which would compile kernels anew."""


@dataclass(frozen=True)
class Geometry:
    """Where a weight, or one run of its output blocks, holds its matrices.

    Attributes:
      short, long: the two sides; rows are the shorter one on a tie. On a mesh those of one device's
        part, in which the side that is shorter in the whole matrix may be the longer one.
      whole: (short, long) of the whole matrix.
      strides: elements from one entry of the batch, one index of the short side and one of the long side
        to the next.
      offset: elements from the weight's first to the run's first.
      neurons_on_short: whether the neurons with a second moment are the shorter side's.
      rows_on_short: whether the rows that are equilibrated are the shorter side's; True where none are,
        so that matrices that lie either way share a launch.
      matrices_a_rate: how many consecutive matrices share a row of rates.
      splits, split_stride: how many consecutive matrices are blocks of one entry of the batch, and the
        elements from one of them to the next.
    """

    short: int
    long: int
    whole: tuple[int, int]
    strides: tuple[int, int, int]
    offset: int
    neurons_on_short: bool
    matrices_a_rate: int
    splits: int = 1
    split_stride: int = 0
    rows_on_short: bool = True

    @property
    def rows(self) -> int:
        """How many rows there are to be equilibrated."""
        return self.short if self.rows_on_short else self.long

    @cached_property
    def pitch(self) -> int:
        return padded(self.long)

    @cached_property
    def neurons(self) -> int:
        """How many neurons have a second moment, of those that are here."""
        return self.short if self.neurons_on_short else self.long

    @cached_property
    def inputs(self) -> int:
        """Over how many entries a neuron's mean runs, in the whole matrix."""
        return self.whole[1] if self.neurons_on_short else self.whole[0]

    @cached_property
    def whole_neurons(self) -> int:
        """How many neurons of the whole matrix have a second moment."""
        return self.whole[0] if self.neurons_on_short else self.whole[1]

    @cached_property
    def as_whole(self) -> "Geometry":
        """Of a stack of whole matrices, short side first."""
        short, long = self.whole
        return Geometry(
            short,
            long,
            self.whole,
            (short * padded(long), padded(long), 1),
            0,
            self.neurons_on_short,
            _ALL,
        )

    @cached_property
    def tiles(self) -> int:
        return math.prod(math.ceil(side / source.TILE) for side in (self.short, self.long))

    @cached_property
    def constants(self) -> dict[str, int]:
        """What the kernels that reach into the weight are told of it."""
        batch, short, long = self.strides
        return {
            "SHORT": self.short,
            "LONG": self.long,
            "BATCH_STRIDE": batch,
            "SHORT_STRIDE": short,
            "LONG_STRIDE": long,
            "OFFSET": self.offset,
            "SPLITS": self.splits,
            "SPLIT_STRIDE": self.split_stride,
            "MATRICES_A_RATE": self.matrices_a_rate,
        }


def block_geometries(
    view: MatrixView,
    *,
    whole: MatrixView | None = None,
    axis: NeuronAxis = "output",
    rates: int = 1,
    equilibrated: bool = False,
) -> list[Geometry]:
    """One geometry for each run of output blocks of a weight.

    Args:
      view: of the array that is here, which lies row by row; strides must reach its matrices.
      whole: of the weight that it is a part of, or None for itself.
      axis: whose neurons have a second moment.
      rates: how many equal runs of the batch have a row of rates of their own.
      equilibrated: whether the output neurons' rows are equilibrated.
    """
    strides = view.strides()
    assert strides is not None
    batch_stride, row_stride, column_stride = strides
    whole = whole or view
    result, start = [], 0
    for run, whole_run in zip(view.runs, whole.runs, strict=True):
        batch, rows, columns = view.block_stack_shape(run.size)
        _, all_rows, all_columns = whole.block_stack_shape(whole_run.size)
        tall = all_rows > all_columns
        on_rows = neurons_on_rows(axis, all_rows, all_columns, view.output_is_rows)
        sides = (column_stride, row_stride) if tall else (row_stride, column_stride)
        neuron_stride = row_stride if view.output_is_rows else column_stride
        splits, split_stride = run.blocks, run.size * neuron_stride
        between = batch_stride
        if splits > 1 and (batch == 1 or batch_stride == splits * split_stride):
            splits, between = 1, split_stride
        geometry = Geometry(
            short=columns if tall else rows,
            long=rows if tall else columns,
            whole=(min(all_rows, all_columns), max(all_rows, all_columns)),
            strides=(between, *sides),
            offset=start * neuron_stride,
            neurons_on_short=on_rows != tall,
            matrices_a_rate=batch * run.blocks // rates if rates > 1 else _ALL,
            splits=splits,
            split_stride=split_stride if splits > 1 else 0,
            rows_on_short=not equilibrated or view.output_is_rows != tall,
        )
        result.append(geometry)
        start += run.blocks * run.size
    return result


def bytes_a_matrix(sides: tuple[int, int], dtype: str) -> int:
    """Temporary memory of one matrix in a stack at its peak: X twice, and five times a Gram matrix."""
    short, long = sides
    entries = 2 * short * padded(long) + 5 * short * padded(short)
    return entries * (4 if dtype == "float32" else 2)


class Span(NamedTuple):
    """Which of a weight's matrices a launch covers, and where they lie in the stack."""

    leaf_start: int
    stack_start: int
    count: int


def padded(size: int) -> int:
    """Elements a row takes: whole 16 bytes in every dtype, for the tensor memory accelerator."""
    return math.ceil(size / 8) * 8


class SideParts(NamedTuple):
    """How one side is divided for partial sums: into cells of equal size, each into `cuts` parts."""

    cells: int
    cell: int
    cuts: int

    @property
    def parts(self) -> int:
        return self.cells * self.cuts


def norm_parts(geometry: Geometry) -> tuple[SideParts, SideParts]:
    """How the matrix's short and long side are divided for its norm, as far as they are here.

    The order of a sum decides its last bit. So the whole matrix's sides are halved as often as they can
    be, down to a tile, and only what is odd is cut otherwise: a mesh whose axes are powers of two, of
    `_LEAST_CELLS` at the most, cuts between cells, and its devices' partial sums are those that one
    device would make.
    """
    sides = [_cells(size) for size in geometry.whole]
    while sides[0].parts * sides[1].parts > MOST_PARTS:
        more = 0 if sides[0].parts >= sides[1].parts else 1
        sides[more] = _coarser(sides[more])
    here = []
    for side, whole, size in zip(
        sides, geometry.whole, (geometry.short, geometry.long), strict=True
    ):
        cells, rest = divmod(side.cells * size, whole)
        # Cut within a cell: other sums, and the same norm but for its last bit.
        here.append(side._replace(cells=cells) if not rest else SideParts(1, size, side.cuts))
    return here[0], here[1]


def _cells(size: int) -> SideParts:
    cells = 1
    while (size > source.TILE * cells or cells < _LEAST_CELLS) and size % (2 * cells) == 0:
        cells *= 2
    return SideParts(cells, size // cells, math.ceil(size // cells / source.TILE))


def _coarser(side: SideParts) -> SideParts:
    if side.cuts > 1:
        return side._replace(cuts=math.ceil(side.cuts / 2))
    return SideParts(side.cells // 2, side.cell * 2, 1)
