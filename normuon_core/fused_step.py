"""One optimizer step of a stack of matrices, as a sequence of kernel launches.

Both frameworks run this sequence, each with its own launcher, so that their steps agree to the bit.
A gradient goes squares -> feed -> products -> neuron_squares -> statistics -> finish. On a mesh the
parts of a matrix go to its owner after `feed`, and come back before `finish`, by an `Exchange`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, NamedTuple, Protocol

from normuon_core.cost import Form
from normuon_core.kernels import launches
from normuon_core.kernels.geometry import Geometry, Span
from normuon_core.kernels.launches import Launcher, MomentumForm, NeuronNormForm, Output
from normuon_core.kernels.tiles import has_gluon, product_configuration
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

    @property
    def takes_hopper_kernels(self) -> bool:
        """Whether kernels that are written for this architecture alone run here."""
        return self.architecture == "sm90" and not self.interpreted and has_gluon()


@dataclass
class Leaf:
    """One weight during one step; its arrays are replaced as the step goes on.

    Attributes:
      gradient, parameter, momentum: of the weight's shape.
      adds: whether the step is added to the parameter, in its place.
      result: the update, or where it `adds` the new parameter; None until the first matrix is done.
      rates: (runs of the batch, `source.RATES`) float32.
      momentum_output, parameter_output: their shapes and dtypes; the result has the parameter's.
    """

    gradient: Array
    parameter: Array
    momentum: Array
    rates: Array
    momentum_output: Output
    parameter_output: Output
    adds: bool = False
    result: Array = None


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


class Together(NamedTuple):
    """Pieces that one launch covers: alike in all but the weight, and side by side in the stack.

    Attributes:
      span: of the first of them; `count` is each one's.
    """

    pieces: tuple[Piece, ...]
    span: Span

    @property
    def first(self) -> Block:
        return self.pieces[0].block

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(piece.block.leaf for piece in self.pieces)

    @property
    def matrices(self) -> slice:
        """Their places in the stack."""
        start = self.span.stack_start
        return slice(start, start + len(self.pieces) * self.span.count)


def launched_together(pieces: Sequence[Piece]) -> list[Together]:
    """A stack's pieces by launches, of `launches.MOST_LEAVES` at the most and as even as can be."""
    result, start = [], 0
    for _, run in groupby(pieces, key=_what_a_launch_shares):
        alike = list(run)
        rounds = math.ceil(len(alike) / launches.MOST_LEAVES)
        size = math.ceil(len(alike) / rounds)
        for first in range(0, len(alike), size):
            own = tuple(alike[first : first + size])
            result.append(Together(own, Span(own[0].start, start, own[0].count)))
            start += len(own) * own[0].count
    return result


def _what_a_launch_shares(piece: Piece) -> tuple:
    block, leaf = piece.block, piece.block.leaf
    return (
        block.geometry,
        block.batch,
        piece.start,
        piece.count,
        id(leaf.rates),
        leaf.gradient.dtype,
        leaf.momentum_output,
        leaf.parameter_output,
        leaf.adds,
        leaf.result is None,
    )


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

    def on_owned(self, function: Callable[[Array, int], Array], x: Array) -> Array:
        """function(x, count) of the `count` matrices of x that this device really has.

        Those up to `owned` are zeros, and of the result they are so again if they are left out.
        """
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
                hopper=self.device.takes_hopper_kernels,
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
) -> tuple[Array, list[Together]]:
    """Stages 1 and 2 of a stack: (the stack, where its pieces lie in it).

    The stack is (count, short, padded long) in the compute dtype; what is beyond `long` is not
    written. momentum=None takes the gradient itself.
    """
    x, groups = _normalized(launch, device, pieces, polar, momentum=momentum, dtype=dtype)
    v = iterate_stack(
        launch,
        device,
        x,
        polar.coefficients,
        geometry=pieces[0].block.geometry,
        count=sum(piece.count for piece in pieces),
        form=form,
        dtype=dtype,
    )
    return v, groups


def _normalized(
    launch: Launcher,
    device: Device,
    pieces: Sequence[Piece],
    polar: Polar,
    *,
    momentum: Momentum | None,
    dtype: str,
    exchange: Exchange | None = None,
) -> tuple[Array, list[Together]]:
    """Stage 1 and the norms of a stack: as `polar_factors_of_pieces`, before the iteration."""
    geometry, rule = pieces[0].block.geometry, MomentumForm.of(momentum)
    check_products(device, dtype, geometry.whole)
    total = sum(piece.count for piece in pieces)
    scales = range_scales(*geometry.whole, dtype)
    x, groups = None, launched_together(pieces)
    for group in groups:
        own, span, leaves = group.first.geometry, group.span, group.leaves
        gradients = tuple(leaf.gradient for leaf in leaves)
        momenta = tuple(leaf.momentum for leaf in leaves)
        rates = leaves[0].rates
        # Gradient and momentum are read twice, the second time from the cache if they fit.
        (partials,) = launch(
            launches.squares(own, span.count, rule, len(leaves)),
            [gradients, momenta, rates, span.leaf_start, span.count],
        )
        if exchange is not None:
            partials = exchange.gather_partials(partials)
        x, momenta = launch(
            launches.feed(
                own,
                span.count,
                rule,
                total,
                eps_rule=polar.eps_rule,
                compute_dtype=dtype,
                momentum=leaves[0].momentum_output,
                first=x is None,
                leaves=len(leaves),
            ),
            [
                gradients,
                momenta,
                rates,
                partials,
                span.leaf_start,
                span.count,
                span.stack_start,
                polar.norm_scale,
                polar.eps,
                scales[0],
                rates if x is None else x,
            ],
        )
        for leaf, new in zip(leaves, momenta, strict=True):
            leaf.momentum = new
    return x, groups


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
    """All stages of one stack; momentum, second moment and result of the pieces' weights are replaced.

    With an `exchange` all pieces are divided in the same way and have their neurons on the same side.
    """
    step = StackStep(launch, device, pieces, recipe, form=form, dtype=dtype, exchange=exchange)
    step.start()
    step.orthogonalize()
    step.bring_back()
    step.finish()


class StackStep:
    """`step_stack` in four parts, so that several stacks of a mesh can be under way together.

    Attributes:
      x: after `start` the normalised stack, with an `exchange` the owner's whole matrices; after
        `orthogonalize` the orthogonalized one; after `bring_back`, with an `exchange`, this device's
        parts of it.
    """

    def __init__(
        self,
        launch: Launcher,
        device: Device,
        pieces: Sequence[Piece],
        recipe: Recipe,
        *,
        form: Form,
        dtype: str,
        exchange: Exchange | None = None,
    ):
        self.launch, self.device, self.pieces, self.recipe = launch, device, pieces, recipe
        self.form: Form = form
        self.dtype, self.exchange = dtype, exchange
        self.x: Array = None
        self.groups: list[Together] = []
        self.statistics: list[tuple[Array, Array]] = []
        self.moments: Array = None

    def start(self) -> None:
        """Momentum and norms; with an `exchange` all that an owner needs comes to it."""
        recipe, exchange = self.recipe, self.exchange
        self.x, self.groups = _normalized(
            self.launch,
            self.device,
            self.pieces,
            recipe.polar,
            momentum=recipe.momentum,
            dtype=self.dtype,
            exchange=exchange,
        )
        if exchange is not None:
            self.x = exchange.to_owners(self.x)
            if recipe.neuron_norm is not None:
                pieces = [piece for group in self.groups for piece in group.pieces]
                self.moments = exchange.statistics_to_owners(
                    [(piece, piece.block.second_moment) for piece in pieces]
                )

    def orthogonalize(self) -> None:
        """The iteration, without any collective."""

        def iterated(x: Array, count: int) -> Array:
            return iterate_stack(
                self.launch,
                self.device,
                x,
                self.recipe.polar.coefficients,
                geometry=self.pieces[0].block.geometry,
                count=count,
                form=self.form,
                dtype=self.dtype,
            )

        if self.exchange is None:
            self.x = iterated(self.x, sum(piece.count for piece in self.pieces))
        else:
            self.x = self.exchange.on_owned(iterated, self.x)

    def bring_back(self) -> None:
        """The statistics; with an `exchange` they and the stack return to the holders of its parts."""
        recipe, exchange = self.recipe, self.exchange
        self.statistics = [(None, None)] * len(self.groups)
        if recipe.neuron_norm is not None or recipe.shape_scale == "rms":
            if exchange is None:
                self.statistics = _statistics(self.launch, self.x, self.groups, recipe)
            else:
                self.statistics = _owners_statistics(
                    self.launch, self.x, self.groups, recipe, exchange, self.moments
                )
        if exchange is not None:
            self.x = exchange.to_holders(self.x)

    def finish(self) -> None:
        """The elementwise rest of the step, where the weights lie."""
        for group, (factors, sums) in zip(self.groups, self.statistics, strict=True):
            _finish(self.launch, self.x, group, self.recipe, factors, sums)


def _statistics(
    launch: Launcher, v, groups: Sequence[Together], recipe: Recipe
) -> list[tuple[Array, Array]]:
    """For each group (factors, sums) as `finish` takes them; second moments are replaced."""
    rule, result = recipe.neuron_norm, []
    for group, (partials, first) in zip(groups, _neuron_squares(launch, v, groups), strict=True):
        block, leaves = group.first, group.leaves
        old = tuple(leaf.rates for leaf in leaves)
        kept = Output((1,), "float32")
        if rule is not None:
            old = tuple(piece.block.second_moment for piece in group.pieces)
            kept = Output((block.batch, block.geometry.neurons), "float32")
        new, factors, sums = launch(
            launches.statistics(
                block.geometry, group.span.count, NeuronNormForm.of(rule), kept, len(leaves)
            ),
            [
                partials,
                old,
                leaves[0].rates,
                _eps(rule),
                group.span.leaf_start,
                group.span.count,
                first,
            ],
        )
        if rule is not None:
            for piece, moment in zip(group.pieces, new, strict=True):
                piece.block.second_moment = moment
        result.append((factors, sums))
    return result


def _owners_statistics(
    launch: Launcher,
    v,
    groups: Sequence[Together],
    recipe: Recipe,
    exchange: Exchange,
    moments: Array | None,
) -> list[tuple[Array, Array]]:
    """As `_statistics`, made by the matrices' owners and sent back to the holders of the parts.

    Args:
      moments: the owners' second moments; None without stage 3.
    """
    pieces = [piece for group in groups for piece in group.pieces]
    rule, here = recipe.neuron_norm, pieces[0].block.geometry
    rates, matrices_a_rate = exchange.rates_to_owners(pieces)
    geometry = replace(here.as_whole, matrices_a_rate=matrices_a_rate)
    (partials,) = launch(launches.neuron_squares(geometry, exchange.owned), [v, 0])
    old, kept = rates, Output((1,), "float32")
    if rule is not None:
        old = moments
        kept = Output((exchange.owned, geometry.neurons), "float32")
    (new,), factors, sums = launch(
        launches.statistics(geometry, exchange.owned, NeuronNormForm.of(rule), kept),
        [partials, (old,), rates, _eps(rule), 0, exchange.owned, 0],
    )
    known = [] if rule is None else [new, factors]
    known, sums = exchange.statistics_to_holders(known, sums)
    result = []
    for group in groups:
        factors = None if rule is None else known[1][group.matrices]
        result.append((factors, sums[group.matrices]))
        if rule is not None:
            start = group.span.stack_start
            for piece in group.pieces:
                piece.block.new_moments.append(known[0][start : start + piece.count])
                start += piece.count
    return result


def _neuron_squares(launch: Launcher, v, groups: Sequence[Together]) -> list[tuple[Any, int]]:
    """For each group the partial sums that hold its neurons' squares, and its first matrix in them.

    One launch for each run of groups whose neurons lie on the same side.
    """
    found = []
    for _, run in groupby(groups, key=lambda group: group.first.geometry.neurons_on_short):
        alike = list(run)
        start, stop = alike[0].matrices.start, alike[-1].matrices.stop
        (partials,) = launch(
            launches.neuron_squares(alike[0].first.geometry, stop - start), [v, start]
        )
        found += [(partials, group.matrices.start - start) for group in alike]
    return found


def _finish(launch: Launcher, v, group: Together, recipe: Recipe, factors, sums) -> None:
    """The rest of the step of a group's weights, whose updates or parameters are replaced."""
    leaves, rule, span = group.leaves, recipe.neuron_norm, group.span
    adds, first = leaves[0].adds, leaves[0].result is None
    rates = leaves[0].rates
    factors = rates if factors is None else factors
    sums = rates if sums is None else sums
    (results,) = launch(
        launches.finish(
            group.first.geometry,
            span.count,
            NeuronNormForm.of(rule),
            rms=recipe.shape_scale == "rms",
            cautious=recipe.decay.cautious,
            decay_inside_scale=recipe.decay.inside_scale,
            parameter=leaves[0].parameter_output,
            add=adds,
            first=first,
            leaves=len(leaves),
        ),
        [
            v,
            tuple(leaf.result if adds and not first else leaf.parameter for leaf in leaves),
            rates,
            tuple(piece.block.scales for piece in group.pieces),
            tuple(piece.block.decays for piece in group.pieces),
            factors,
            sums,
            _eps(rule),
            RMS_FLOOR,
            span.leaf_start,
            span.count,
            span.stack_start,
            tuple(rates if adds or first else leaf.result for leaf in leaves),
        ],
    )
    for leaf, result in zip(leaves, results, strict=True):
        leaf.result = result


def _eps(rule: NeuronNorm | None) -> float:
    return 0.0 if rule is None else rule.eps
