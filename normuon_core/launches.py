"""How each kernel is launched: grid, constants, configuration. Arrays are the frameworks' to bind.

Nothing here depends on how many matrices a stack holds but the grid, so that the update of one matrix
does not depend on its neighbours. Configurations of the products come from a committed table
(`configurations.py`) and are never searched for at run time.

A launch is made for shapes and for the form of a recipe's rules. No hyperparameter that is a number
is among its arguments: numbers may change from step to step and may be traced, so they travel in
arrays (`kernels.RATES`) or as the kernels' own scalars, and key no cache and no compilation.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from normuon_core import kernels
from normuon_core.configurations import ProductConfiguration
from normuon_core.hyperparameters import check_choice
from normuon_core.layout import MatrixView
from normuon_core.recipes import EpsRule, Momentum, MomentumRule, NeuronAxis, NeuronNorm

MOST_PARTS = 1024
"""Partial sums of a matrix's norm: few enough for every program of `feed` to add them up itself."""

_LEAST_CELLS = 8
"""Equal cells that a side is divided into for these sums, if it can be: over so many devices a small
matrix may be divided as well, without another order of the sum."""

_NEURON_TILE = {True: (8, 1024), False: (128, 64)}
"""Neurons and inputs that a program of `neuron_squares` takes, by NEURONS_ON_SHORT."""

_NEURONS_A_BLOCK = 256
"""Neurons that a program of `statistics` takes."""

_CACHED = 4096
"""Launches to remember: building one takes as long as a small kernel runs."""

_ALL = 2**30
"""Matrices that share a single row of rates: not their number, which would compile kernels anew."""

_TILE_WARPS = 8
"""Warps of the kernels that work on a tile: a small weight has few tiles, so each loads much at once."""


class Output(NamedTuple):
    """What a launch writes. `dtype`: a name, as "float32"."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel with all but its arrays and scalars; the same object for the same launch.

    Attributes:
      kernel: of `kernels.py`. grid: how many programs. constants: its constexpr arguments.
      outputs: follow the inputs in the kernel's arguments.
      aliases: for an output its place among the inputs, whose buffer it overwrites.
      uses_descriptors: whether it sets up the tensor memory accelerator.
    """

    kernel: Any
    grid: int
    constants: Mapping[str, Any]
    outputs: Sequence[Output]
    aliases: Mapping[int, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    uses_descriptors: bool = False


Launcher = Callable[[Launch, Sequence[Any]], tuple[Any, ...]]
"""(launch, its inputs) -> its outputs. Scalars among the inputs are Python's ints and floats."""


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

    @property
    def pitch(self) -> int:
        return padded(self.long)

    @property
    def neurons(self) -> int:
        """How many neurons have a second moment, of those that are here."""
        return self.short if self.neurons_on_short else self.long

    @property
    def inputs(self) -> int:
        """Over how many entries a neuron's mean runs, in the whole matrix."""
        return self.whole[1] if self.neurons_on_short else self.whole[0]

    @property
    def whole_neurons(self) -> int:
        """How many neurons of the whole matrix have a second moment."""
        return self.whole[0] if self.neurons_on_short else self.whole[1]

    @property
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

    @property
    def tiles(self) -> int:
        return math.prod(math.ceil(side / kernels.TILE) for side in (self.short, self.long))

    @property
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
    strides: tuple[int, int, int],
    *,
    whole: MatrixView | None = None,
    axis: NeuronAxis = "output",
    rates: int = 1,
) -> list[Geometry]:
    """One geometry for each run of output blocks of a weight.

    Args:
      view: of the array that is here. whole: of the weight that it is a part of, or None for itself.
      strides: of batch, rows and columns, in elements. axis: whose neurons have a second moment.
        rates: how many equal runs of the batch have a row of rates of their own.
    """
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
        )
        result.append(geometry)
        start += run.blocks * run.size
    return result


def neurons_on_rows(axis: NeuronAxis, rows: int, columns: int, output_is_rows: bool) -> bool:
    """Whether the neurons that have a second moment are the rows of a whole (rows, columns) matrix."""
    if axis == "longer" and rows != columns:
        return rows > columns
    return output_is_rows != (axis == "input")


def bytes_a_matrix(geometry: Geometry, dtype: str) -> int:
    """Temporary memory of one matrix in a stack at its peak: X twice, and five times a Gram matrix."""
    short, long = geometry.whole
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


def _power_of_two(count: int) -> int:
    return 2 ** math.ceil(math.log2(count))


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
    while (size > kernels.TILE * cells or cells < _LEAST_CELLS) and size % (2 * cells) == 0:
        cells *= 2
    return SideParts(cells, size // cells, math.ceil(size // cells / kernels.TILE))


def _coarser(side: SideParts) -> SideParts:
    if side.cuts > 1:
        return side._replace(cuts=math.ceil(side.cuts / 2))
    return SideParts(side.cells // 2, side.cell * 2, 1)


class MomentumForm(NamedTuple):
    """A momentum rule without its number; "none" takes the gradient itself."""

    rule: MomentumRule | Literal["none"]
    nesterov: bool

    @classmethod
    def of(cls, record: Momentum | None) -> "MomentumForm":
        return cls("none", False) if record is None else cls(record.rule, bool(record.nesterov))

    @property
    def constants(self) -> dict[str, Any]:
        if self.rule != "none":
            check_choice("momentum rule", self.rule, MomentumRule)
        return {"RULE": self.rule, "NESTEROV": self.nesterov}


class NeuronNormForm(NamedTuple):
    """How the second moment divides an update, without its numbers."""

    eps_rule: EpsRule
    rescale: EpsRule | None

    @classmethod
    def of(cls, record: NeuronNorm | None) -> "NeuronNormForm | None":
        return None if record is None else cls(record.eps_rule, record.rescale)

    def check(self) -> None:
        """Raises a ValueError for a rule that the kernels do not know."""
        check_choice("eps_rule", self.eps_rule, EpsRule)
        if self.rescale is not None:
            check_choice("rescale", self.rescale, EpsRule)


@functools.lru_cache(maxsize=_CACHED)
def squares(geometry: Geometry, count: int, rule: MomentumForm) -> Launch:
    """Inputs: g, m, rates, leaf start. For `count` matrices."""
    short, long = norm_parts(geometry)
    return Launch(
        kernels.squares,
        grid=count * short.parts * long.parts,
        constants={
            **geometry.constants,
            **rule.constants,
            "SHORT_PARTS": short.parts,
            "SHORT_CELL": short.cell,
            "SHORT_CUTS": short.cuts,
            "LONG_PARTS": long.parts,
            "LONG_CELL": long.cell,
            "LONG_CUTS": long.cuts,
        },
        outputs=[Output((count, short.parts, long.parts), "float32")],
        num_warps=_TILE_WARPS,
    )


@functools.lru_cache(maxsize=_CACHED)
def feed(
    geometry: Geometry,
    count: int,
    rule: MomentumForm,
    stack: int,
    *,
    eps_rule: EpsRule,
    compute_dtype: str,
    momentum: Output,
    first: bool,
) -> Launch:
    """Inputs: g, m, rates, partials, the two starts, norm scale, eps, x scale, x.

    `first` into a stack of `stack` matrices, whose buffer is then not among the inputs.
    """
    check_choice("eps_rule", eps_rule, EpsRule)
    # Of all devices, each of which has as many.
    ways = math.prod(geometry.whole) // (geometry.short * geometry.long)
    parts = ways * math.prod(side.parts for side in norm_parts(geometry))
    return Launch(
        kernels.feed,
        grid=count * geometry.tiles,
        constants={
            **geometry.constants,
            "PITCH": geometry.pitch,
            **rule.constants,
            "EPS_RULE": eps_rule,
            "TILES": geometry.tiles,
            "PARTS": parts,
            "PARTS_PADDED": _power_of_two(parts),
        },
        outputs=[Output((stack, geometry.short, geometry.pitch), compute_dtype), momentum],
        aliases={1: 1} if first else {0: 9, 1: 1},
        num_warps=_TILE_WARPS,
    )


@functools.lru_cache(maxsize=_CACHED)
def product(
    count: int,
    m: int,
    n: int,
    k: int,
    *,
    dtype: str,
    configuration: ProductConfiguration,
    multiprocessors: int,
    b_transposed: bool,
    symmetric: bool,
    addends: int,
    has_diagonal: bool,
) -> Launch:
    """Inputs: a, b, d, e, alpha, beta, gamma, diagonal, count. Rows are `padded`."""
    rows, columns = math.ceil(m / configuration.tile_m), math.ceil(n / configuration.tile_n)
    width = configuration.tile_n // configuration.tile_m
    tiles = rows * columns - (width * columns * (columns - 1) // 2 if symmetric else 0)
    return Launch(
        kernels.product,
        grid=min(tiles * count, multiprocessors * configuration.programs_a_multiprocessor),
        constants={
            "M": m,
            "N": n,
            "K": k,
            "PITCH_A": padded(k),
            "PITCH_B": padded(k if b_transposed else n),
            "PITCH_C": padded(n),
            "B_TRANSPOSED": b_transposed,
            "SYMMETRIC": symmetric,
            "ADDENDS": addends,
            "HAS_DIAGONAL": has_diagonal,
            "TILE_M": configuration.tile_m,
            "TILE_N": configuration.tile_n,
            "TILE_K": configuration.tile_k,
        },
        outputs=[Output((count, m, padded(n)), dtype)],
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        uses_descriptors=True,
    )


@functools.lru_cache(maxsize=_CACHED)
def neuron_squares(geometry: Geometry, count: int) -> Launch:
    """Inputs: v, stack start."""
    block, part = _NEURON_TILE[geometry.neurons_on_short]
    blocks, slices = math.ceil(geometry.neurons / block), math.ceil(geometry.inputs / part)
    return Launch(
        kernels.neuron_squares,
        grid=count * blocks * slices,
        constants={
            "SHORT": geometry.short,
            "LONG": geometry.long,
            "PITCH": geometry.pitch,
            "NEURONS_ON_SHORT": geometry.neurons_on_short,
            "BLOCKS": blocks,
            "BLOCK": block,
            "SLICES": slices,
            "SLICE": part,
        },
        outputs=[Output((count, slices, geometry.neurons), "float32")],
    )


def _blocks(geometry: Geometry) -> int:
    return math.ceil(geometry.whole_neurons / _NEURONS_A_BLOCK)


@functools.lru_cache(maxsize=_CACHED)
def statistics(
    geometry: Geometry, count: int, rule: NeuronNormForm | None, second_moment: Output
) -> Launch:
    """Inputs: partials, second moment, rates, eps, leaf start, first of the partials."""
    if rule is not None:
        rule.check()
    _, part = _NEURON_TILE[geometry.neurons_on_short]
    return Launch(
        kernels.statistics,
        grid=count * _blocks(geometry),
        constants={
            "NEURONS": geometry.neurons,
            "INPUTS": geometry.inputs,
            "MATRICES_A_RATE": geometry.matrices_a_rate,
            "NORMALIZE": rule is not None,
            "EPS_RULE": "max" if rule is None else rule.eps_rule,
            "SLICES": math.ceil(geometry.inputs / part),
            "BLOCKS": _blocks(geometry),
            "BLOCK": _NEURONS_A_BLOCK,
        },
        outputs=[
            second_moment,
            Output((count, geometry.neurons), "float32"),
            Output((count, _blocks(geometry), 2), "float32"),
        ],
        aliases={} if rule is None else {0: 1},
    )


@functools.lru_cache(maxsize=_CACHED)
def finish(
    geometry: Geometry,
    count: int,
    rule: NeuronNormForm | None,
    *,
    rms: bool,
    cautious: bool,
    decay_inside_scale: bool,
    delta: Output,
    first: bool,
) -> Launch:
    """Inputs: v, p, rates, scales, decays, factors, sums, eps, rms floor, the two starts, delta.

    rms: whether the scale divides by the update's norm, as the shape rule of that name does.
    """
    if rule is not None:
        rule.check()
    return Launch(
        kernels.finish,
        grid=count * geometry.tiles,
        constants={
            **geometry.constants,
            "PITCH": geometry.pitch,
            "NEURONS_ON_SHORT": geometry.neurons_on_short,
            "INPUTS": geometry.inputs,
            "NORMALIZE": rule is not None,
            "RESCALE": None if rule is None else rule.rescale,
            "RMS": rms,
            "CAUTIOUS": cautious,
            "DECAY_INSIDE_SCALE": decay_inside_scale,
            "TILES": geometry.tiles,
            "BLOCKS": _blocks(geometry),
            "BLOCKS_PADDED": _power_of_two(_blocks(geometry)),
        },
        outputs=[delta],
        aliases={} if first else {0: 11},
        num_warps=_TILE_WARPS,
    )
