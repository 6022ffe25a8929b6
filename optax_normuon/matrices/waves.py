"""Stacks that owners do not divide evenly, dealt together so that what one leaves idle another fills.

Under `jax.shard_map` all devices run one program. A device that lacks a matrix of a stack leaves it out
by a branch, and gains from that only if nothing that it waits for comes between it and its own work. So
the stacks of a wave all come to their owners first, are worked on, and are finished when all are back.
"""

from typing import TYPE_CHECKING, TypeVar

import jax.numpy as jnp

from normuon_core.deal import deal_together
from optax_normuon.mesh.owners import Owners
from optax_normuon.mesh.specs import Specs

if TYPE_CHECKING:
    from optax_normuon.matrices.plan import PlannedStack

LEAST_GAIN = 0.1
"""Part of a wave's work that the busiest device must be spared. For less, stacks that travel one while
another is worked on, and no branch, are the better."""

LeafKey = TypeVar("LeafKey")


def in_waves(
    stacks: "list[PlannedStack[LeafKey]]", specs: Specs, *, ceiling: int
) -> "list[PlannedStack[LeafKey]]":
    """The stacks, in their order, with those that are dealt together in waves.

    Args:
      ceiling: bytes that a device's matrices of one wave may take while they wait.
    """
    waves: list[list[int]] = []
    uneven = [i for i, stack in enumerate(stacks) if _can_gain(stack)]
    for i in sorted(uneven, key=lambda i: -_cost(stacks[i])):
        wave = next((w for w in waves if _fits([stacks[j] for j in (*w, i)], ceiling)), None)
        if wave is None:
            waves.append([i])
        else:
            wave.append(i)
    result = list(stacks)
    for number, wave in enumerate(waves):
        own = [stacks[i] for i in wave]
        costs = [stack.placement.time_a_matrix for stack in own]
        dealt, busiest = deal_together(
            [stack.deal for stack in own],
            costs,
            [_owner_numbers(stack, specs) for stack in own],
            devices=specs.parts(specs.axes),
        )
        if busiest > (1 - LEAST_GAIN) * sum(map(_cost, own)):
            continue
        for i, deal in zip(wave, dealt, strict=True):
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


def _cost(stack: "PlannedStack") -> float:
    """Of an owner that has as many matrices as any."""
    return stack.deal.each * stack.placement.time_a_matrix


def _bytes(stack: "PlannedStack") -> int:
    """What its matrices take on such an owner while others are worked on."""
    assert stack.placement.dtype is not None
    entries = stack.key.rows * stack.key.columns
    return stack.deal.each * entries * jnp.dtype(stack.placement.dtype).itemsize


def _fits(stacks: "list[PlannedStack]", ceiling: int) -> bool:
    """Whether stacks can be a wave. No leaf is in two of them: a leaf's runs are finished in turn."""
    leaves = [leaf for stack in stacks for leaf in {piece.leaf for piece in stack.pieces}]
    return len(leaves) == len(set(leaves)) and sum(map(_bytes, stacks)) <= ceiling


def _owner_numbers(stack: "PlannedStack", specs: Specs):
    assert stack.key.sharding is not None
    return Owners.of(stack.key.sharding, specs, stack.deal).numbers()
