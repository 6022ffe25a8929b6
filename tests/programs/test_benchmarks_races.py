"""The benchmarks' contestants: their turns, what is said of those that fail, and the peers' calls."""

import importlib
import sys
import time
import types

import pytest
import torch

from benchmarks import clocks, peers, products, ratios, report, steps, steps_in_jax, steps_in_torch
from benchmarks.race import Pace, Prepared, race
from benchmarks.rows import Row, noted

TINY = [(2, 24, 16), (1, 16, 40)]


def contest(contestants, *, pace=None, peers=()):
    """A race on nothing; a contestant is what its call does."""
    rows = [Row("a workload", who) for who in contestants]
    prepare = {
        who: lambda call=call: Prepared(call, lambda: None) for who, call in contestants.items()
    }
    return race("a race", rows, prepare, pace or Pace(rounds=8, turn=0.0), peers=peers)


def nothing():
    pass


def test_turns_are_shuffled_in_every_round_and_the_order_is_kept():
    contestants = dict.fromkeys("abcdef", nothing)
    found = contest(contestants)
    assert [sorted(turns) for turns in found.order] == [list("abcdef")] * 8
    assert len(set(map(tuple, found.order))) > 4
    assert contest(contestants).order == found.order
    assert contest(contestants, pace=Pace(rounds=8, turn=0.0, seed=1)).order != found.order
    assert [len(row.times) for row in found.rows] == [8] * 6


def test_a_contestant_is_timed_in_the_turns_that_the_order_says():
    """Three calls to get ready, and in every round one that is not timed before the one that is."""
    called = []
    found = contest({who: lambda who=who: called.append(who) for who in "abc"})
    rounds = [who for turns in found.order for who in turns for _ in range(2)]
    assert called == [*"aaabbbccc", *rounds]


def test_the_time_of_a_row_is_the_median_of_its_rounds():
    naps = iter([0, 0, 0, 0, 0.03, 0, 0.01, 0, 0.02])
    (row,) = contest({"a": lambda: time.sleep(next(naps))}, pace=Pace(rounds=3, turn=0.0)).rows
    lowest, median, highest = sorted(row.times)
    assert row.milliseconds == median >= 20
    assert row.quartiles == pytest.approx(((lowest + median) / 2, (median + highest) / 2))


def test_one_that_fails_in_its_turn_leaves_the_others_running():
    calls = iter(range(100))

    def fail_later():
        if next(calls) == 6:
            raise MemoryError("out of memory\nand more")

    found = contest({"a": nothing, "b": fail_later, "c": nothing})
    times = {row.who: len(row.times) for row in found.rows}
    assert times == {"a": 8, "b": 0, "c": 8}
    assert found.rows[1].milliseconds is None
    assert found.rows[1].reason == "error: MemoryError: out of memory"
    assert report.cells(found.rows[1], 1.0)[-1] == found.rows[1].reason


def test_peers_have_so_long_to_get_ready_and_ours_have_not():
    def slow():
        time.sleep(0.1)

    pace = Pace(rounds=1, turn=0.0, patience=0.6)
    contestants = {"ours": slow, "first": slow, "second": slow, "third": nothing}
    found = contest(contestants, pace=pace, peers=("first", "second", "third"))
    late = {row.who for row in found.rows if row.failure}
    assert late == {"second", "third"}
    assert found.order == [found.order[0]]
    assert set(found.order[0]) == {"ours", "first"}
    assert "--patience" in found.rows[2].reason
    (ours, *_) = contest(dict.fromkeys(["ours"], slow), pace=pace._replace(patience=0.0)).rows
    assert ours.milliseconds


def test_an_absent_package_is_told_from_an_error():
    def reason_of(act):
        row = Row("a workload", "a peer")
        with noted(row):
            act()
        assert (row.missing is None) != (row.failure is None)
        return row.reason

    def package(name):
        return lambda: importlib.import_module(name)

    assert reason_of(package("surely_not_there.at_all")) == "not installed: surely-not-there"
    # An installed package without that module is one of another version.
    assert reason_of(package("json.not_there")).startswith("error: ModuleNotFoundError")

    def raise_absence_of_quack():
        raise ModuleNotFoundError(name="quack")

    if importlib.util.find_spec("quack") is None:
        assert reason_of(raise_absence_of_quack) == "not installed: quack-kernels"


def test_a_ratio_is_one_of_rounds():
    """A card that slows down in the second round slows both: the ratio of medians would be 2.2."""
    rows = [
        Row("a", "slow", milliseconds=22.0, times=[20.0, 44.0, 22.0]),
        Row("a", "fast", milliseconds=10.0, times=[10.0, 22.0, 10.0]),
        Row("b", "slow", milliseconds=1.0, times=[1.0]),
    ]
    (found,) = ratios.measured([ratios.Ratio("a ratio", "slow", "fast")], rows)
    assert (found.what, found.median) == ("a", 2.0)
    assert found.quartiles == pytest.approx((2.0, 2.1))


def test_ratios_are_of_contestants_in_one_race():
    fields = [{*each.ours, *each.peers} for each in steps.FRAMEWORKS.values()]
    for _, over, under in steps.RATIOS:
        names = {over, under} - {steps.APPLY}
        assert any(names <= field for field in fields)


def test_clocks_are_summed_up_without_the_line_that_was_cut():
    lines = ["1980, 2619, 250.00, 40", "1400, 2619, 690.50, 60", "1500, 2619, [N/A], 61", "19"]
    found = clocks.summary(lines)
    assert found["SM clock, MHz"] == [1400, 1500, 1980]
    assert found["power, W"] == [250.0, pytest.approx(470.25), 690.5]
    assert clocks.summary([]) == {}


def test_peers_are_called_as_their_packages_want_it(monkeypatch):
    """The constructors' keywords are those of dion's main branch, gram-newton-schulz 0.1.6 and
    heavyball 3.2.1."""

    class Dion(torch.optim.SGD):
        def __init__(
            self,
            *args,
            lr,
            weight_decay,
            nesterov=False,
            use_triton=False,
            use_gram_newton_schulz=False,
        ):
            assert nesterov
            assert use_triton
            super().__init__(*args, lr=lr, weight_decay=weight_decay)

    class Heavyball(torch.optim.SGD):
        def __init__(self, *args, lr, weight_decay, consume_grad=True):
            assert not consume_grad
            super().__init__(*args, lr=lr, weight_decay=weight_decay)

    def module(name, **members):
        made = types.ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    module("dion", Muon=Dion, NorMuon=Dion)
    module("gram_newton_schulz", Muon=torch.optim.SGD)
    module("heavyball", Muon=Heavyball)
    makers = [peers.dion_muon, peers.dion_normuon, peers.heavyball_muon]
    needing_quack = [peers.dion_normuon_gram, peers.gram_newton_schulz_muon]
    matrices = steps_in_torch.Matrices(TINY)
    for make in needing_quack if importlib.util.find_spec("quack") is None else []:
        with pytest.raises(ModuleNotFoundError, match="quack"):
            steps_in_torch.launched(make)(matrices)
    module("quack")
    before = matrices.params()[0].detach().clone()
    for make in [*makers, *needing_quack]:
        prepared = steps_in_torch.launched(make)(matrices)
        prepared.run()
        prepared.wait()
        assert prepared.more["first step s"] > 0
    after = matrices.params()[0]
    assert not torch.equal(before, after)
    assert after.grad is matrices.params()[0].grad


def test_apply_takes_part():
    assert steps.APPLY in steps.IN_JAX
    matrices = steps_in_jax.Matrices(TINY)
    prepared = steps_in_jax.apply(steps_in_jax.normuon("normuon", "xla"))(matrices)
    for _ in range(2):
        prepared.run()
    prepared.wait()
    assert prepared.more["compilation s"] > 0


@pytest.mark.parametrize(
    "problem",
    [*products.QUICK_PROBLEMS, products.Problem("multiply", 1, 16, 16, addends=1)],
    ids=lambda problem: problem.name,
)
def test_a_product_is_the_one_that_its_name_says(problem):
    operands = products.Operands(problem)
    s, x = operands.s.float(), operands.x.float()
    diagonal = torch.eye(problem.short, device=s.device) if problem.addends == 2 else 0
    of_two = s @ s + problem.addends * s + diagonal
    wanted = {"apply": s @ x + x, "gram": x @ x.mT, "multiply": of_two}[problem.kind]
    found = operands.ours().float()
    # One rounding of float16 is 3e-4.
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3
    plain = {"apply": s @ x, "gram": x @ x.mT, "multiply": s @ s}[problem.kind]
    assert float((operands.cublas().float() - plain).norm() / plain.norm()) < 1e-3


def test_half_of_a_symmetric_product_is_useful():
    for problem in products.PROBLEMS:
        full = 2 * problem.count * problem.short**2 * problem.long
        assert problem.operations == full
        assert problem.useful == (full if problem.name.endswith("full, 1 addend") else full / 2)


def test_products_race_against_cublas():
    problem = products.Problem("apply", 1, 16, 16)
    (found,) = products.races([problem], Pace(rounds=1, turn=0.0))
    assert [row.who for row in found.rows] == [products.CUBLAS, products.OURS]
    assert all(row.milliseconds for row in found.rows)


def test_clocks_are_sampled_while_contestants_run(monkeypatch):
    line = "1980, 2619, 650.00, 60"
    loop = f"while :; do echo '{line}'; sleep 0.02; done"
    monkeypatch.setattr(clocks, "_command", lambda queries: ["sh", "-c", loop])
    found = contest({"a": lambda: time.sleep(0.02)}).clocks
    assert found["SM clock, MHz"] == [1980, 1980, 1980]
    assert found["power, W"] == [650, 650, 650]
