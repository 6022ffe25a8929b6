"""Stacks of even size hold every matrix once."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_core.stacks import even_stacks


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 7), max_size=6), limit=st.integers(1, 9))
def test_stacks_hold_every_matrix_once_in_order_and_evenly(sizes, limit):
    stacks = list(even_stacks(sizes, limit))
    flat = [(m, i) for stack in stacks for m, start, stop in stack for i in range(start, stop)]
    assert flat == [(member, i) for member, size in enumerate(sizes) for i in range(size)]
    lengths = [sum(stop - start for _, start, stop in stack) for stack in stacks]
    assert len(lengths) == math.ceil(sum(sizes) / limit)
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    assert lengths == sorted(lengths, reverse=True)
