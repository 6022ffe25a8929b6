"""Stacks that owners do not divide evenly, dealt together so that what one leaves idle another fills.

Under `jax.shard_map` all devices run one program. A device that lacks a matrix of a stack leaves it out
by a branch, and gains from that only if nothing that it waits for comes between it and its own work. So
the stacks of a wave all come to their owners before any is worked on, and none goes back before all are
done.
"""

from typing import TYPE_CHECKING, TypeVar

import jax.numpy as jnp

from normuon_core.deal import Uneven, waves
from optax_normuon.mesh.owners import Owners
from optax_normuon.mesh.specs import Specs

if TYPE_CHECKING:
    from optax_normuon.matrices.plan import PlannedStack

LeafKey = TypeVar("LeafKey")


def in_waves(
    stacks: "list[PlannedStack[LeafKey]]", specs: Specs, *, ceiling: int
) -> "list[PlannedStack[LeafKey]]":
    """The stacks, in their order, with those that are dealt together in waves.

    Args:
      ceiling: bytes that a device's matrices of one wave may take while they wait.
    """
    places = [i for i, stack in enumerate(stacks) if _can_gain(stack)]
    uneven = [_uneven(stacks[i], specs) for i in places]
    result = list(stacks)
    for number, wave in enumerate(waves(uneven, devices=specs.parts(specs.axes), ceiling=ceiling)):
        for member, deal in zip(wave.members, wave.deals, strict=True):
            i = places[member]
            result[i] = stacks[i]._replace(deal=deal, wave=number)
    return result


def one_by_one_and_waves(
    stacks: "list[PlannedStack[LeafKey]]",
) -> "list[list[PlannedStack[LeafKey]]]":
    """The stacks by what is under way together: each by itself, in order, and then the waves."""
    alone = [[stack] for stack in stacks if stack.wave is None]
    waves: dict[int, list[PlannedStack[LeafKey]]] = {}
    for stack in stacks:
        if stack.wave is not None:
            waves.setdefault(stack.wave, []).append(stack)
    return [*alone, *waves.values()]


def _can_gain(stack: "PlannedStack") -> bool:
    uneven = stack.placement.strategy == "owners" and not stack.deal.is_even
    return uneven and stack.placement.time_a_matrix > 0


def _uneven(stack: "PlannedStack", specs: Specs) -> Uneven:
    sharding, dtype = stack.key.sharding, stack.placement.dtype
    assert sharding is not None
    assert dtype is not None
    entries = stack.deal.each * stack.key.rows * stack.key.columns
    return Uneven(
        stack.deal,
        stack.placement.time_a_matrix,
        entries * jnp.dtype(dtype).itemsize,
        Owners.of(sharding, specs, stack.deal).numbers(),
        frozenset(piece.leaf for piece in stack.pieces),
    )
