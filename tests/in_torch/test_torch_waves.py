"""Ranks that lack a matrix of one shape work on another's meanwhile: counted on two and on four."""

import pytest
import torch

from tests.in_torch import wave_cases as cases
from tests.in_torch.ranks import run_on_ranks

THERE = ["all_reduce", "all_to_all_single", "all_to_all_single"]
BACK = ["all_to_all_single", "all_to_all_single"]
"""A stack's collectives: of norms, and of matrices and second moments."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What each rank did, by the number of ranks and the case."""
    folder = tmp_path_factory.mktemp("waves")
    return {
        ranks: run_on_ranks(ranks, cases.all_cases, folder / f"{ranks} ranks") for ranks in (2, 4)
    }


def worked(run):
    """The (rows, columns, matrices) of the stacks that a rank worked on: of those that it had any of."""
    return [event for event in run["events"] if isinstance(event, tuple) and event[2]]


def owned(run):
    return sum(matrices for *_, matrices in worked(run))


def test_four_matrices_of_four_sizes_give_each_of_four_ranks_one(ran):
    found = [worked(rank["one of each"]) for rank in ran[4]]
    # The longest first; the two last take equally long.
    assert found == [[(24, 40, 1)], [(16, 64, 1)], [(16, 48, 1)], [(48, 16, 1)]]


def test_of_two_ranks_the_one_with_the_longest_matrix_has_the_shortest_too(ran):
    found = [worked(rank["one of each"]) for rank in ran[2]]
    assert found == [[(24, 40, 1), (48, 16, 1)], [(16, 64, 1), (16, 48, 1)]]


@pytest.mark.parametrize(("ranks", "share"), [(2, 6), (4, 3)])
def test_three_matrices_of_each_size_are_shared_evenly(ran, ranks, share):
    assert [owned(rank["three of each"]) for rank in ran[ranks]] == [share] * ranks


def test_a_rank_has_no_more_of_a_stack_than_its_share_however_little_else_it_has(ran):
    """The memory that a stack may take is reckoned for that many."""
    found = [worked(rank["a long one and many short ones"]) for rank in ran[2]]
    assert found == [[(32, 64, 1), (8, 12, 4)], [(8, 12, 4)]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_wave_is_worked_on_when_all_have_come_and_goes_back_when_all_are_done(ran, ranks):
    for rank in ran[ranks]:
        events = [
            "work" if isinstance(event, tuple) else event for event in rank["one of each"]["events"]
        ]
        assert events == 4 * THERE + 4 * ["work"] + 4 * BACK


@pytest.mark.parametrize("ranks", [2, 4])
def test_stacks_that_memory_does_not_hold_together_go_one_after_the_other(ran, ranks):
    for rank in ran[ranks]:
        events = [
            "work" if isinstance(event, tuple) else event
            for event in rank["one at a time"]["events"]
        ]
        assert events == 4 * [*THERE, "work", *BACK]


@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_wave_steps_as_one_process_does(ran, ranks, case):
    shapes, settings = cases.CASES[case]
    expected = cases.stepped(shapes, lambda x: x, **settings)
    for rank in ran[ranks]:
        for ours, theirs in zip(rank[case]["weights"], expected, strict=True):
            # The products of a stack depend on its size: 4 times the measured 4.4e-16.
            torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1.8e-15)
