"""A deal gives every matrix one owner, and several deals leave no device much more than another."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_core.deal import Deal, deal_together, least_loaded


@given(count=st.integers(1, 40), owners=st.integers(1, 9), first=st.integers(0, 8))
def test_owners_have_all_matrices_and_none_has_two_more_than_another(count, owners, first):
    deal = Deal(count, owners, first % owners)
    held = [deal.each - 1 + bool(deal.is_larger(owner)) for owner in range(owners)]
    assert sum(held) == count
    assert max(held) - min(held) <= 1
    assert deal.is_even == (count % owners == 0)


@given(load=st.lists(st.integers(0, 5), min_size=1, max_size=9), data=st.data())
def test_the_busiest_of_a_row_of_owners_has_the_least_that_any_row_has(load, data):
    larger = data.draw(st.integers(1, len(load)))
    busiest = [
        max(load[(first + i) % len(load)] for i in range(larger)) for first in range(len(load))
    ]
    assert busiest[least_loaded(np.array(load, float), larger)] == min(busiest)


@settings(deadline=None)
@given(
    stacks=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9)), min_size=1, max_size=6),
    devices=st.integers(1, 8),
)
def test_dealt_together_the_busiest_device_is_within_the_longest_matrices_of_an_even_share(
    stacks, devices
):
    """What a stack adds lies on the owners that have the least, and it is one matrix at the most."""
    deals = [Deal(count, devices) for count, _ in stacks]
    costs = [float(cost) for _, cost in stacks]
    owners = [np.arange(devices)] * len(stacks)
    dealt, busiest = deal_together(deals, costs, owners, devices=devices)
    load = sum(
        cost * (deal.each - 1 + deal.is_larger(np.arange(devices)))
        for cost, deal in zip(costs, dealt, strict=True)
    )
    assert busiest == np.max(load)
    even = sum(count * cost for count, cost in stacks) / devices
    assert even <= busiest + 1e-9
    assert busiest <= even + 2 * max(costs)


def test_four_stacks_that_fill_the_devices_once_give_each_of_them_one_matrix():
    deals = [Deal(2, 8)] * 4
    dealt, busiest = deal_together(deals, [1.0] * 4, [np.arange(8)] * 4, devices=8)
    assert [deal.first for deal in dealt] == [0, 2, 4, 6]
    assert busiest == 1


def test_a_device_that_is_an_owner_along_other_axes_counts_by_what_it_has():
    """Of four devices, two halves own the first stack, and each pair repeats the second."""
    halves, pairs = np.array([0, 1, 2, 3]), np.array([0, 0, 1, 1])
    dealt, busiest = deal_together([Deal(2, 4), Deal(1, 2)], [2.0, 1.0], [halves, pairs], devices=4)
    assert dealt[1].first == 1
    assert busiest == 2
