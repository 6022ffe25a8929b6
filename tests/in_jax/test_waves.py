"""Owners that lack a matrix of one stack work on another's meanwhile: counted on eight devices."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from normuon_core.placement import whole_or_owned
from optax_normuon import MatrixLayout
from optax_normuon.matrices import on_matrices as module
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStage
from tests.in_jax.meshes import draw, mesh_of, put

SIZES = [(16, 48), (48, 16), (24, 40), (16, 64)]


def counting(worked: Counter):
    """A stage that doubles whole matrices, and counts them on each device by their rows and columns."""

    def note(count, sides, device):
        worked[int(device), sides] += count

    def update(stack, state):
        count, *sides = stack.values.shape
        jax.debug.callback(partial(note, count, tuple(sides)), jax.lax.axis_index("fsdp"))
        return stack.with_values(2 * stack.values), state

    def place(spread, may_stay):
        work = float(spread.short**2 * spread.long)
        return replace(whole_or_owned(spread, work, 4), dtype="float32")

    return MatrixStage(lambda stack: (), update, place=place)


def run(copies, **keywords):
    """(what each device worked on, the stacks) of `copies` matrices of every size on eight devices."""
    worked, made = Counter(), []

    def recorded(*arguments, plan=module.plan, **keywords):
        made.extend(plan(*arguments, **keywords))
        return made

    mesh = mesh_of(fsdp=8)
    tx = on_matrices(counting(worked), layout=MatrixLayout(0, 1), **keywords)
    shapes = {f"w{i}{n}": size for i, size in enumerate(SIZES) for n in range(copies)}
    params = put(draw(shapes), dict.fromkeys(shapes, P("fsdp")), mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "plan", recorded)
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
    jax.effects_barrier()
    for name, x in draw(shapes).items():
        np.testing.assert_array_equal(np.asarray(updates[name]), 2 * x)
    return worked, made


def each_device(worked):
    """How many matrices each of the eight devices worked on, of whatever size."""
    totals = Counter()
    for (device, _), count in worked.items():
        totals[device] += count
    return [totals[device] for device in range(8)]


def test_two_matrices_of_each_of_four_sizes_give_each_of_eight_devices_one():
    worked, stacks = run(2)
    assert each_device(worked) == [1] * 8
    assert {stack.wave for stack in stacks} == {0}


@pytest.mark.parametrize("copies", [1, 3, 10, 13])
def test_devices_work_on_what_the_plan_deals_them_and_on_nothing_else(copies):
    worked, stacks = run(copies)
    for stack in stacks:
        sides = stack.key.rows, stack.key.columns
        dealt = [stack.deal.each - 1 + stack.deal.is_larger(device) for device in range(8)]
        if stack.wave is None:
            dealt = [stack.deal.each] * 8
        assert [worked[device, sides] for device in range(8)] == dealt
    assert {stack.wave for stack in stacks} == {0}
    total = each_device(worked)
    assert sum(total) == 4 * copies
    assert max(total) <= np.ceil(4 * copies / 8) + 1


def test_stacks_that_are_even_or_alone_take_no_branch():
    worked, stacks = run(8)
    assert each_device(worked) == [4] * 8
    assert {stack.wave for stack in stacks} == {None}


def test_a_wave_waits_in_no_more_memory_than_a_stack_may_take():
    _, stacks = run(2, max_stack_bytes=2 * 4 * 16 * 48)
    waves = Counter(stack.wave for stack in stacks)
    assert len(waves) == 2


def test_a_wave_is_worked_on_when_all_have_come_and_goes_back_when_all_are_done():
    """The compiler is bound to that by two barriers over all four stacks, before and behind the work."""
    mesh = mesh_of(fsdp=8)
    tx = on_matrices(counting(Counter()), layout=MatrixLayout(0, 1))
    shapes = {f"w{i}{n}": size for i, size in enumerate(SIZES) for n in range(2)}
    params = put(draw(shapes), dict.fromkeys(shapes, P("fsdp")), mesh)
    text = jax.jit(tx.update).lower(params, tx.init(params)).as_text()
    steps = re.findall(
        r"stablehlo\.(all_to_all|case)\b|(:4 = )stablehlo\.optimization_barrier", text
    )
    found = " ".join(name or "barrier" for name, _ in steps)
    there, worked, back = (part.split() for part in found.split("barrier"))
    assert there == ["all_to_all"] * 4
    assert worked == ["case"] * 4
    assert back == ["all_to_all"] * 4
