"""One optimizer step of a stack of matrices, as a sequence of kernel launches.

Both frameworks run this sequence, each with its own launcher, so that their steps agree to the bit.
A gradient goes squares -> feed -> products -> neuron_squares -> statistics -> finish. Where rows are
equilibrated, row_squares -> row_factors take the place of squares; where the norm is set, set_norm
stands after the products, with neuron_squares and statistics of its own before it. On a mesh the
parts of a matrix go to its owner after `feed`, and come back before `finish`, by an `Exchange`.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from normuon_core.cost import Form
from normuon_core.exchange import Exchange
from normuon_core.kernels import launches
from normuon_core.kernels.launches import Launcher, MomentumForm, NeuronNormForm, Output
from normuon_core.kernels.pieces import Array, Block, Piece, Together, launched_together
from normuon_core.kernels.products import Device, check_products, iterate_stack
from normuon_core.polar_iteration import range_scales
from normuon_core.recipes import (
    Momentum,
    NeuronNorm,
    NormSetting,
    Polar,
    Recipe,
    RowEquilibration,
)
from normuon_core.shape_rules import RMS_FLOOR


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
    equilibration: RowEquilibration | None = None,
    exchange: Exchange | None = None,
) -> tuple[Array, list[Together]]:
    """Stage 1 and the norms of a stack: as `polar_factors_of_pieces`, before the iteration.

    `equilibration` stands between the two, for whole matrices alone.
    """
    assert equilibration is None or exchange is None
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
        sums = launches.squares if equilibration is None else launches.row_squares
        (partials,) = launch(
            sums(own, span.count, rule, len(leaves)),
            [gradients, momenta, rates, span.leaf_start, span.count],
        )
        if exchange is not None:
            partials = exchange.gather_partials(partials)
        factors = rates
        if equilibration is not None:
            factors, partials = launch(
                launches.row_factors(own, len(leaves) * span.count), [partials, equilibration.eps]
            )
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
                equilibrated=equilibration is not None,
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
                factors,
                rates if x is None else x,
            ],
        )
        for leaf, new in zip(leaves, momenta, strict=True):
            leaf.momentum = new
    return x, groups


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
            equilibration=recipe.row_equilibration,
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
        """The iteration, and the norm if it is set, without any collective."""
        norm, block = self.recipe.norm_setting, self.pieces[0].block

        def iterated(x: Array, count: int) -> Array:
            v = iterate_stack(
                self.launch,
                self.device,
                x,
                self.recipe.polar.coefficients,
                geometry=block.geometry,
                count=count,
                form=self.form,
                dtype=self.dtype,
            )
            if norm is not None:
                v = _set_norm(self.launch, v, block, count, norm, self.dtype)
            return v

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


def _set_norm(
    launch: Launcher, v, block: Block, count: int, rule: NormSetting, dtype: str
) -> Array:
    """The stack of `count` whole matrices with the norm of each set."""
    geometry = replace(block.geometry.as_whole, neurons_on_short=True)
    rates = block.leaf.rates
    (partials,) = launch(launches.neuron_squares(geometry, count), [v, 0])
    _, _, sums = launch(
        launches.statistics(geometry, count, None, Output((1,), "float32")),
        [partials, (rates,), rates, 0.0, 0, count, 0],
    )
    (v,) = launch(launches.set_norm(geometry, count, dtype), [v, sums, rule.eps])
    return v


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
