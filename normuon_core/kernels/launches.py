"""How each kernel is launched: grid, constants, configuration. Arrays are the frameworks' to bind.

Nothing here depends on how many matrices a stack holds but the grid, so that the update of one matrix
does not depend on its neighbours. Configurations of the products come from a committed table
(`tiles.py`) and are never searched for at run time.

A launch is made for shapes and for the form of a recipe's rules. No hyperparameter that is a number
is among its arguments: numbers may change from step to step and may be traced, so they travel in
arrays (`source.RATES`) or as the kernels' own scalars, and key no cache and no compilation.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from normuon_core.hyperparameters import check_choice
from normuon_core.kernels import source
from normuon_core.kernels.geometry import Geometry, norm_parts, padded
from normuon_core.kernels.tiles import HopperConfiguration, ProductConfiguration
from normuon_core.recipes import EpsRule, Momentum, MomentumRule, NeuronNorm

_NEURON_TILE = {True: (8, 1024), False: (128, 64)}
"""Neurons and inputs that a program of `neuron_squares` takes, by NEURONS_ON_SHORT."""

_NEURONS_A_BLOCK = 256
"""Neurons that a program of `statistics` takes."""

_ROWS_A_BLOCK = 256
"""Rows that `row_factors` takes at a time."""

_CACHED = 4096
"""Launches to remember: building one takes as long as a small kernel runs."""


_DESCRIPTOR_BYTES = 128
"""What CUDA makes a descriptor for the tensor memory accelerator take."""

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
      kernel: of `source.py` or `hopper.py`. grid: how many programs.
      sizes: integers that follow the inputs in the kernel's arguments. outputs: follow these; a tuple
        of them is one argument, as a tuple of arrays among the inputs is.
      constants: its constexpr arguments.
      aliases: for an output its place among the inputs, whose buffer it overwrites.
      descriptors: for the tensor memory accelerator, how many a program sets up at the most.
    """

    kernel: Any
    grid: int
    constants: Mapping[str, Any]
    outputs: Sequence[Output | tuple[Output, ...]]
    sizes: Sequence[int] = ()
    aliases: Mapping[int, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    descriptors: int = 0

    @property
    def compile_options(self) -> dict[str, Any]:
        """Keywords of Triton's call: the constants, and how the kernel is compiled.

        No contraction of a * b + c into one rounding: two compilers need not agree on where.
        """
        return {
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }

    @property
    def scratch_bytes(self) -> int:
        """Global memory that its programs keep their descriptors in."""
        return self.grid * self.descriptors * _DESCRIPTOR_BYTES


MOST_LEAVES = 16
"""Weights that one launch covers. A kernel has an argument for each array of each of them."""

Launcher = Callable[[Launch, Sequence[Any]], tuple[Any, ...]]
"""(launch, its inputs) -> its outputs. Inputs are arrays, tuples of arrays, and Python's ints and
floats; outputs arrays and tuples of arrays."""


def _power_of_two(count: int) -> int:
    return 2 ** math.ceil(math.log2(count))


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
def squares(geometry: Geometry, count: int, rule: MomentumForm, leaves: int = 1) -> Launch:
    """Inputs: gs, ms, rates, leaf start, count. For `count` matrices of each leaf."""
    short, long = norm_parts(geometry)
    return Launch(
        source.squares,
        grid=leaves * count * short.parts * long.parts,
        constants={
            "LEAVES": leaves,
            **geometry.constants,
            **rule.constants,
            "SHORT_PARTS": short.parts,
            "SHORT_CELL": short.cell,
            "SHORT_CUTS": short.cuts,
            "LONG_PARTS": long.parts,
            "LONG_CELL": long.cell,
            "LONG_CUTS": long.cuts,
        },
        outputs=[Output((leaves * count, short.parts, long.parts), "float32")],
        num_warps=_TILE_WARPS,
    )


@functools.lru_cache(maxsize=_CACHED)
def row_squares(geometry: Geometry, count: int, rule: MomentumForm, leaves: int = 1) -> Launch:
    """Inputs: gs, ms, rates, leaf start, count. For `count` matrices of each leaf."""
    inputs = norm_parts(geometry)[1 if geometry.rows_on_short else 0]
    blocks = math.ceil(geometry.rows / source.TILE)
    return Launch(
        source.row_squares,
        grid=leaves * count * blocks * inputs.parts,
        constants={
            "LEAVES": leaves,
            **geometry.constants,
            **rule.constants,
            "ROWS_ON_SHORT": geometry.rows_on_short,
            "BLOCKS": blocks,
            "PARTS": inputs.parts,
            "CELL": inputs.cell,
            "CUTS": inputs.cuts,
        },
        outputs=[Output((leaves * count, inputs.parts, geometry.rows), "float32")],
        num_warps=_TILE_WARPS,
    )


@functools.lru_cache(maxsize=_CACHED)
def row_factors(geometry: Geometry, count: int) -> Launch:
    """Inputs: partials, eps. For `count` matrices."""
    inputs = norm_parts(geometry)[1 if geometry.rows_on_short else 0]
    return Launch(
        source.row_factors,
        grid=count,
        constants={
            "ROWS": geometry.rows,
            "PARTS": inputs.parts,
            "BLOCKS": math.ceil(geometry.rows / _ROWS_A_BLOCK),
            "BLOCK": _ROWS_A_BLOCK,
        },
        outputs=[Output((count, geometry.rows), "float32"), Output((count,), "float32")],
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
    leaves: int = 1,
    equilibrated: bool = False,
) -> Launch:
    """Inputs: gs, ms, rates, partials, leaf start, count, stack start, norm scale, eps, x scale,
    factors, x.

    `first` into a stack of `stack` matrices, whose buffer is then not among the inputs. `equilibrated`:
    partials and factors are from `row_factors`.
    """
    check_choice("eps_rule", eps_rule, EpsRule)
    # Of all devices, each of which has as many.
    ways = math.prod(geometry.whole) // (geometry.short * geometry.long)
    parts = ways * math.prod(side.parts for side in norm_parts(geometry))
    if equilibrated:
        parts = 1
    return Launch(
        source.feed,
        grid=leaves * count * geometry.tiles,
        constants={
            "LEAVES": leaves,
            **geometry.constants,
            "PITCH": geometry.pitch,
            **rule.constants,
            "EPS_RULE": eps_rule,
            "EQUILIBRATED": equilibrated,
            "ROWS_ON_SHORT": geometry.rows_on_short,
            "TILES": geometry.tiles,
            "PARTS": parts,
            "PARTS_PADDED": _power_of_two(parts),
        },
        outputs=[
            Output((stack, geometry.short, geometry.pitch), compute_dtype),
            (momentum,) * leaves,
        ],
        aliases={1: 1} if first else {0: 11, 1: 1},
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
    configuration: ProductConfiguration | HopperConfiguration,
    multiprocessors: int,
    b_transposed: bool,
    symmetric: bool,
    addends: int,
    has_diagonal: bool,
) -> Launch:
    """Inputs: a, b, d, e, alpha, beta, gamma, diagonal, count. Rows are `padded`."""
    sizes = {
        "M": m,
        "N": n,
        "K": k,
        "PITCH_A": padded(k),
        "PITCH_B": padded(k if b_transposed else n),
        "PITCH_C": padded(n),
    }
    form = {
        "B_TRANSPOSED": b_transposed,
        "SYMMETRIC": symmetric,
        "ADDENDS": addends,
        "HAS_DIAGONAL": has_diagonal,
    }
    outputs = [Output((count, m, padded(n)), dtype)]
    if isinstance(configuration, HopperConfiguration):
        from normuon_core.kernels import hopper

        tiles = _tiles(m, n, hopper.TILE_M, configuration.tile_n, symmetric)
        return Launch(
            hopper.product,
            grid=min(tiles * count, multiprocessors),
            sizes=tuple(sizes.values()),
            constants={
                **form,
                "TILE_N": configuration.tile_n,
                "STAGES": configuration.stages,
                "SLOTS": configuration.slots,
            },
            outputs=outputs,
            descriptors=hopper.DESCRIPTORS,
        )
    tiles = _tiles(m, n, configuration.tile_m, configuration.tile_n, symmetric)
    return Launch(
        source.product,
        grid=min(tiles * count, multiprocessors * configuration.programs_a_multiprocessor),
        constants={
            **sizes,
            **form,
            "TILE_M": configuration.tile_m,
            "TILE_N": configuration.tile_n,
            "TILE_K": configuration.tile_k,
        },
        outputs=outputs,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        descriptors=2,
    )


def _tiles(m: int, n: int, tile_m: int, tile_n: int, symmetric: bool) -> int:
    """How many tiles of one product are computed."""
    rows, columns, width = math.ceil(m / tile_m), math.ceil(n / tile_n), tile_n // tile_m
    return rows * columns - (width * columns * (columns - 1) // 2 if symmetric else 0)


@functools.lru_cache(maxsize=_CACHED)
def neuron_squares(geometry: Geometry, count: int) -> Launch:
    """Inputs: v, stack start."""
    block, part = _NEURON_TILE[geometry.neurons_on_short]
    blocks, slices = math.ceil(geometry.neurons / block), math.ceil(geometry.inputs / part)
    return Launch(
        source.neuron_squares,
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
    geometry: Geometry,
    count: int,
    rule: NeuronNormForm | None,
    second_moment: Output,
    leaves: int = 1,
) -> Launch:
    """Inputs: partials, second moments, rates, eps, leaf start, count, first of the partials."""
    if rule is not None:
        rule.check()
    _, part = _NEURON_TILE[geometry.neurons_on_short]
    return Launch(
        source.statistics,
        grid=leaves * count * _blocks(geometry),
        constants={
            "LEAVES": leaves,
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
            (second_moment,) * leaves,
            Output((leaves * count, geometry.neurons), "float32"),
            Output((leaves * count, _blocks(geometry), 2), "float32"),
        ],
        aliases={} if rule is None else {0: 1},
    )


@functools.lru_cache(maxsize=_CACHED)
def set_norm(geometry: Geometry, count: int, dtype: str) -> Launch:
    """Inputs: v, sums, eps. For all `count` matrices of a stack, which is overwritten."""
    return Launch(
        source.set_norm,
        grid=count * geometry.tiles,
        constants={
            "SHORT": geometry.short,
            "LONG": geometry.long,
            "PITCH": geometry.pitch,
            "INPUTS": geometry.inputs,
            "TILES": geometry.tiles,
            "BLOCKS": _blocks(geometry),
            "BLOCKS_PADDED": _power_of_two(_blocks(geometry)),
        },
        outputs=[Output((count, geometry.short, geometry.pitch), dtype)],
        aliases={0: 0},
        num_warps=_TILE_WARPS,
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
    parameter: Output,
    add: bool,
    first: bool,
    leaves: int = 1,
) -> Launch:
    """Inputs: v, ps, rates, scales, decays, factors, sums, eps, rms floor, leaf start, count, stack
    start, results.

    Args:
      rms: whether the scale divides by the update's norm, as the shape rule of that name does.
      add: whether the results are the parameters, overwritten in their place, and not the updates.
      first: whether nothing of the updates has been written.
    """
    if rule is not None:
        rule.check()
    return Launch(
        source.finish,
        grid=leaves * count * geometry.tiles,
        constants={
            "LEAVES": leaves,
            "ADD": add,
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
        outputs=[(parameter,) * leaves],
        aliases={0: 1} if add else {} if first else {0: 12},
        num_warps=_TILE_WARPS,
    )
