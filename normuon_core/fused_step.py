"""One optimizer step of a stack of matrices, as a sequence of kernel launches.

Both frameworks run this sequence, each with its own launcher, so that their steps agree to the bit.
A gradient goes squares -> feed -> products -> neuron_squares -> statistics -> finish. On a mesh the
parts of a matrix go to its owner after `feed`, and come back before `finish`, by an `Exchange`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from normuon_core.cost import Form
from normuon_core.kernels import launches
from normuon_core.kernels.geometry import Geometry, Span
from normuon_core.kernels.launches import Launcher, MomentumForm, NeuronNormForm, Output
from normuon_core.kernels.tiles import product_configuration
from normuon_core.polar_iteration import iterate, range_scales
from normuon_core.polynomials import Coefficients
from normuon_core.recipes import Momentum, NeuronNorm, Polar, Recipe
from normuon_core.shape_rules import RMS_FLOOR

Array = Any
"""A JAX array or a PyTorch tensor."""


@dataclass(frozen=True)
class Device:
    """What launches need to know of a GPU.

    Attributes:
      interpreted: whether Triton's interpreter runs the kernels in its place.
    """

    architecture: str
    multiprocessors: int
    interpreted: bool = False


@dataclass
class Leaf:
    """One weight during one step; its arrays are replaced as the step goes on.

    Attributes:
      gradient, parameter, momentum: of the weight's shape.
      delta: the update, of the weight's shape; None until the first matrix is done.
      rates: (runs of the batch, `source.RATES`) float32.
      momentum_output, delta_output: shapes and dtypes of the new momentum and of the update.
    """

    gradient: Array
    parameter: Array
    momentum: Array
    rates: Array
    momentum_output: Output
    delta_output: Output
    delta: Array = None


@dataclass
class Block:
    """One run of output blocks of a weight.

    Attributes:
      batch: how many matrices it has; the blocks of a batch entry follow each other.
      second_moment: (batch, neurons) float32, replaced by the step; None without stage 3.
      scales, decays: (batch,) float32.
      new_moments: on a mesh, the second moments of the matrices done so far, in order.
    """

    leaf: Leaf
    geometry: Geometry
    batch: int
    second_moment: Array
    scales: Array
    decays: Array
    new_moments: list[Array] = field(default_factory=list)


class Piece(NamedTuple):
    """Consecutive matrices of one run of blocks."""

    block: Block
    start: int
    count: int


class Exchange(Protocol):
    """How one stack's matrices travel over a mesh; this device has parts of `count` of them."""

    @property
    def owned(self) -> int:
        """How many matrices this device orthogonalizes."""
        ...

    def gather_partials(self, partials: Array) -> Array:
        """All parts' sums, (count, sums of a whole matrix), from this device's (count, short, long)."""
        ...

    def to_owners(self, x: Array) -> Array:
        """(count, short, padded long) of parts to (owned, short, padded long) of whole matrices."""
        ...

    def to_holders(self, v: Array) -> Array:
        """The inverse of `to_owners`."""
        ...

    def statistics_to_owners(self, pieces: Sequence[tuple[Piece, Array]]) -> Array:
        """All neurons of what is owned, from each piece's (matrices, neurons here)."""
        ...

    def statistics_to_holders(
        self, statistics: Sequence[Array], sums: Array
    ) -> tuple[list[Array], Array]:
        """From (owned, neurons) each and (owned, ...) to (count, neurons here) and (count, ...)."""
        ...

    def rates_to_owners(self, pieces: Sequence[Piece]) -> tuple[Array, int]:
        """(rows of rates, consecutive matrices of what is owned that share one)."""
        ...


@dataclass(frozen=True)
class KernelProducts:
    """`Products` from the product kernel, on a stack that is wide: (count, short, long)."""

    launch: Launcher
    device: Device
    count: int
    short: int
    long: int
    dtype: str

    def gram(self, x, *, alpha):
        return self._product(x, x, (self.short, self.short, self.long), alpha=alpha, turned=True)

    def multiply(self, s, t, *, alpha, addends=(), diagonal=0.0):
        sides = (self.short, self.short, self.short)
        # t is symmetric: read by rows, as s is.
        return self._product(
            s, t, sides, alpha=alpha, addends=addends, diagonal=diagonal, turned=True
        )

    def apply(self, s, x, *, alpha, addend=0.0):
        sides = (self.short, self.long, self.short)
        addends = [(x, addend)] if addend else []
        return self._product(s, x, sides, alpha=alpha, addends=addends, symmetric=False)

    def _product(
        self,
        a,
        b,
        sides,
        *,
        alpha,
        addends: Sequence[tuple[Array, float]] = (),
        diagonal=0.0,
        turned=False,
        symmetric=True,
    ):
        launch = launches.product(
            self.count,
            *sides,
            dtype=self.dtype,
            configuration=product_configuration(
                *sides,
                dtype=self.dtype,
                symmetric=symmetric,
                architecture=self.device.architecture,
            ),
            multiprocessors=self.device.multiprocessors,
            b_transposed=turned,
            symmetric=symmetric,
            addends=len(addends),
            has_diagonal=diagonal != 0.0,
        )
        arrays = [array for array, _ in addends] + [a] * (2 - len(addends))
        factors = [factor for _, factor in addends] + [0.0] * (2 - len(addends))
        (result,) = self.launch(launch, [a, b, *arrays, alpha, *factors, diagonal, self.count])
        return result


def polar_factors_of_pieces(
    launch: Launcher,
    device: Device,
    pieces: Sequence[Piece],
    polar: Polar,
    *,
    momentum: Momentum | None,
    form: Form,
    dtype: str,
    exchange: Exchange | None = None,
) -> tuple[Array, list[Span]]:
    """Stages 1 and 2 of a stack: (the stack, where each piece lies in it).

    The stack is (count, short, padded long) in the compute dtype; what is beyond `long` is not
    written. With an `exchange` it is the owner's, and the places are those of the parts.
    momentum=None takes the gradient itself.
    """
    geometry, rule = pieces[0].block.geometry, MomentumForm.of(momentum)
    check_products(device, dtype, geometry.whole)
    total = sum(piece.count for piece in pieces)
    scales = range_scales(*geometry.whole, dtype)
    spans, x, start = [], None, 0
    for piece in pieces:
        own, leaf = piece.block.geometry, piece.block.leaf
        span = Span(piece.start, start, piece.count)
        spans.append(span)
        start += piece.count
        # Gradient and momentum are read twice, the second time from the cache if they fit.
        (partials,) = launch(
            launches.squares(own, piece.count, rule),
            [leaf.gradient, leaf.momentum, leaf.rates, span.leaf_start],
        )
        if exchange is not None:
            partials = exchange.gather_partials(partials)
        x, leaf.momentum = launch(
            launches.feed(
                own,
                piece.count,
                rule,
                total,
                eps_rule=polar.eps_rule,
                compute_dtype=dtype,
                momentum=leaf.momentum_output,
                first=x is None,
            ),
            [
                leaf.gradient,
                leaf.momentum,
                leaf.rates,
                partials,
                *span[:2],
                polar.norm_scale,
                polar.eps,
                scales[0],
                leaf.rates if x is None else x,
            ],
        )
    if exchange is not None:
        x, total = exchange.to_owners(x), exchange.owned
    v = iterate_stack(
        launch,
        device,
        x,
        polar.coefficients,
        geometry=geometry,
        count=total,
        form=form,
        dtype=dtype,
    )
    return v, spans


def iterate_stack(
    launch: Launcher,
    device: Device,
    x,
    coefficients: Coefficients,
    *,
    geometry: Geometry,
    count: int,
    form: Form,
    dtype: str,
):
    """The iteration on a stack of whole matrices, (count, short, padded long), normalised and scaled."""
    check_products(device, dtype, geometry.whole)
    short, long = geometry.whole
    return iterate(
        x,
        coefficients,
        KernelProducts(launch, device, count, short, long, dtype),
        algorithm=form,
        short=short,
        scales=range_scales(short, long, dtype),
    )


def check_products(device: Device, dtype: str, sides: tuple[int, int]) -> None:
    """Raises a ValueError for bfloat16 under Triton's interpreter, which multiplies the bit patterns."""
    if device.interpreted and dtype == "bfloat16":
        raise ValueError(
            f"matrices of {sides[0]} x {sides[1]} are multiplied in bfloat16 here, which Triton's"
            " interpreter (TRITON_INTERPRET=1) computes wrongly; give compute_dtype float32 or float16,"
            " or run the kernels on a CUDA device."
        )


def step_stack(
    launch: Launcher,
    device: Device,
    pieces: Sequence[Piece],
    recipe: Recipe,
    *,
    form: Form,
    dtype: str,
    exchange: Exchange | None = None,
) -> None:
    """All stages of one stack; momentum, second moment and delta of the pieces' weights are replaced.

    With an `exchange` all pieces are divided in the same way and have their neurons on the same side.
    """
    v, spans = polar_factors_of_pieces(
        launch,
        device,
        pieces,
        recipe.polar,
        momentum=recipe.momentum,
        form=form,
        dtype=dtype,
        exchange=exchange,
    )
    needs_statistics = recipe.neuron_norm is not None or recipe.shape_scale == "rms"
    if exchange is not None:
        statistics = [(None, None)] * len(pieces)
        if needs_statistics:
            statistics = _owners_statistics(launch, v, pieces, spans, recipe, exchange)
        v = exchange.to_holders(v)
    elif needs_statistics:
        statistics = _statistics(launch, v, pieces, spans, recipe)
    else:
        statistics = [(None, None)] * len(pieces)
    for piece, span, (factors, sums) in zip(pieces, spans, statistics, strict=True):
        _finish_piece(launch, v, piece.block, span, recipe, factors, sums)


def _statistics(
    launch: Launcher, v, pieces: Sequence[Piece], spans: Sequence[Span], recipe: Recipe
) -> list[tuple[Array, Array]]:
    """For each piece (factors, sums) as `finish` takes them; second moments are replaced."""
    rule, result = recipe.neuron_norm, []
    partials = _neuron_squares(launch, v, pieces, spans)
    for piece, span, (own, first) in zip(pieces, spans, partials, strict=True):
        block, leaf = piece.block, piece.block.leaf
        old = leaf.rates if rule is None else block.second_moment
        kept = Output((1,) if rule is None else (block.batch, block.geometry.neurons), "float32")
        new, factors, sums = launch(
            launches.statistics(block.geometry, span.count, NeuronNormForm.of(rule), kept),
            [own, old, leaf.rates, _eps(rule), span.leaf_start, first],
        )
        block.second_moment = None if rule is None else new
        result.append((factors, sums))
    return result


def _owners_statistics(
    launch: Launcher,
    v,
    pieces: Sequence[Piece],
    spans: Sequence[Span],
    recipe: Recipe,
    exchange: Exchange,
) -> list[tuple[Array, Array]]:
    """As `_statistics`, made by the matrices' owners and sent back to the holders of the parts."""
    rule, here = recipe.neuron_norm, pieces[0].block.geometry
    rates, matrices_a_rate = exchange.rates_to_owners(pieces)
    geometry = replace(here.as_whole, matrices_a_rate=matrices_a_rate)
    (partials,) = launch(launches.neuron_squares(geometry, exchange.owned), [v, 0])
    old, kept = rates, Output((1,), "float32")
    if rule is not None:
        moments = [(piece, piece.block.second_moment) for piece in pieces]
        old = exchange.statistics_to_owners(moments)
        kept = Output((exchange.owned, geometry.neurons), "float32")
    new, factors, sums = launch(
        launches.statistics(geometry, exchange.owned, NeuronNormForm.of(rule), kept),
        [partials, old, rates, _eps(rule), 0, 0],
    )
    known = [] if rule is None else [new, factors]
    known, sums = exchange.statistics_to_holders(known, sums)
    result = []
    for piece, span in zip(pieces, spans, strict=True):
        own = slice(span.stack_start, span.stack_start + span.count)
        own_factors = None
        if rule is not None:
            own_factors = known[1][own]
            piece.block.new_moments.append(known[0][own])
        result.append((own_factors, sums[own]))
    return result


def _neuron_squares(launch: Launcher, v, pieces: Sequence[Piece], spans: Sequence[Span]):
    """For each piece the partial sums that hold its neurons' squares, and its first matrix in them.

    One launch for each run of pieces whose neurons lie on the same side.
    """
    runs: list[list[int]] = []
    for index, piece in enumerate(pieces):
        side = piece.block.geometry.neurons_on_short
        if runs and pieces[runs[-1][0]].block.geometry.neurons_on_short == side:
            runs[-1].append(index)
        else:
            runs.append([index])
    found = []
    for run in runs:
        start = spans[run[0]].stack_start
        count = sum(spans[index].count for index in run)
        (partials,) = launch(
            launches.neuron_squares(pieces[run[0]].block.geometry, count), [v, start]
        )
        found += [(partials, spans[index].stack_start - start) for index in run]
    return found


def _finish_piece(
    launch: Launcher, v, block: Block, span: Span, recipe: Recipe, factors, sums
) -> None:
    leaf, rule = block.leaf, recipe.neuron_norm
    first = leaf.delta is None
    factors = leaf.rates if factors is None else factors
    sums = leaf.rates if sums is None else sums
    (leaf.delta,) = launch(
        launches.finish(
            block.geometry,
            span.count,
            NeuronNormForm.of(rule),
            rms=recipe.shape_scale == "rms",
            cautious=recipe.decay.cautious,
            decay_inside_scale=recipe.decay.inside_scale,
            delta=leaf.delta_output,
            first=first,
        ),
        [
            v,
            leaf.parameter,
            leaf.rates,
            block.scales,
            block.decays,
            factors,
            sums,
            _eps(rule),
            RMS_FLOOR,
            *span[:2],
            leaf.rates if first else leaf.delta,
        ],
    )


def _eps(rule: NeuronNorm | None) -> float:
    return 0.0 if rule is None else rule.eps
