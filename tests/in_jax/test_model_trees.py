"""Routing against the recorded trees of public models: none wrong, few asked about."""

import pytest

from tests.model_trees.__main__ import counted, report
from tests.model_trees.fixtures import read_all
from tests.model_trees.verdicts import judge

FIXTURES = {fixture.name: fixture for fixture in read_all()}
MOST_ASKED = 0.05
STANDARD = ("bert", "llama", "vit")
"""Models with these names are asked about nothing, in whichever library they are written."""


def test_there_are_models_enough_in_as_many_conventions():
    assert len(FIXTURES) >= 12
    assert len({fixture.convention for fixture in FIXTURES.values()}) == len(FIXTURES)
    for name in STANDARD:
        assert any(name in fixture for fixture in FIXTURES)


@pytest.mark.parametrize("name", FIXTURES)
def test_no_leaf_of_a_public_model_is_routed_wrongly(name):
    wrong = [verdict for verdict in judge(FIXTURES[name]) if verdict.outcome == "wrong"]
    assert not wrong, "\n" + "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", [n for n in FIXTURES if any(s in n for s in STANDARD)])
def test_nothing_is_asked_about_a_standard_model(name):
    asked = [verdict.name for verdict in judge(FIXTURES[name]) if verdict.outcome == "asked"]
    assert not asked


def test_at_most_one_leaf_in_twenty_is_asked_about(record_property):
    verdicts = [verdict for fixture in FIXTURES.values() for verdict in judge(fixture)]
    leaves, asked, _ = counted(verdicts)
    record_property("asked about", f"{asked} of {leaves} leaves")
    print(report(list(FIXTURES.values())))
    assert asked <= MOST_ASKED * leaves
