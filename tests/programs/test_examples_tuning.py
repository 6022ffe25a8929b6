"""The example's learning-rate search and its record."""

import dataclasses
import math

import pytest

import examples.tuning
from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.presets import Rates
from examples.runs import Run
from examples.settings import Devices, Training
from examples.tuning import EXTENSIONS, Grid, search, tune


def distance_from(best):
    return lambda rate: abs(math.log(rate / best))


def test_the_search_stays_on_a_grid_that_holds_the_best_inside():
    tried = []
    best = search(lambda rate: tried.append(rate) or distance_from(2.0)(rate), (1.0, 2.0, 4.0))
    assert best == 2.0
    assert tried == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(("best", "tried"), [(8.0, [1.0, 2.0, 4.0, 8.0, 16.0]), (0.5, None)])
def test_the_search_grows_until_the_best_is_inside(best, tried):
    seen = []
    assert search(lambda rate: seen.append(rate) or distance_from(best)(rate), (1.0, 2.0)) == best
    assert min(seen) < best < max(seen)
    assert len(seen) == len(set(seen))
    assert tried is None or seen == tried


def test_the_search_ends_also_when_more_is_always_better():
    assert search(lambda rate: -rate, (1.0, 2.0)) == 2.0 * 2**EXTENSIONS


@pytest.fixture
def runs(monkeypatch):
    """Runs that are a formula, with (0.02, 0.008) as the best rates of Muon and NorMuon, in a list.

    Beside 0.004 the best rate of the matrices would be 0.01; from 0.08 on a run diverges.
    """
    made = []

    def run(told):
        made.append((told.optimizer.optimizer, told.optimizer.learning_rate))
        rate, beside = told.optimizer.learning_rate, told.optimizer.adam_learning_rate
        if told.optimizer.optimizer == "adamw":
            loss = distance_from(0.004)(rate)
        else:
            loss = distance_from(2.5 * beside)(rate) + 2 * distance_from(0.008)(beside)
        if rate >= 0.08:
            loss = math.nan
        return Run("run", {}, ({"step": 0, "validation_loss": loss, "seconds": 1.0},))

    monkeypatch.setattr(examples.tuning, "run_briefly", run)
    return made


def searched(folder, training=None, names=("adamw", "muon", "normuon")):
    told = None, GPTConfig(), training or Training(), Devices()
    return tune(names, *told, record=folder / "rates.json")


@pytest.fixture
def grid(runs, tmp_path):
    return searched(tmp_path)


def test_adamw_is_tuned_first_and_then_again_beside_each_matrix_optimizer(grid):
    assert grid.best("adamw") == Rates(0.004)
    assert grid.best("muon") == grid.best("normuon") == Rates(0.02, 0.008)


def test_no_run_is_made_twice_and_every_run_is_recorded(grid):
    runs = _points(grid)
    assert len(runs) == len(set(runs))
    assert any(point.validation_loss is None for point in grid.points)
    for name in ("adamw", "muon", "normuon"):
        assert sum(point.optimizer == name for point in grid.points) >= 4


def test_the_record_reads_back_as_it_was_written(grid, tmp_path):
    path = tmp_path / "rates.json"
    assert "NaN" not in path.read_text()
    assert Grid.read(path) == grid
    assert list(tmp_path.iterdir()) == [path]


def test_a_search_that_was_stopped_goes_on_where_it_was(runs, tmp_path, monkeypatch):
    whole = searched(tmp_path)
    made = list(runs)
    working = examples.tuning.run_briefly
    for left in (7, 5):
        runs.clear()

        def stopping(told, left=left):
            if len(runs) == left:
                raise KeyboardInterrupt
            return working(told)

        monkeypatch.setattr(examples.tuning, "run_briefly", stopping)
        with pytest.raises(KeyboardInterrupt):
            searched(tmp_path)
        assert Grid.read(tmp_path / "rates.json") == whole
    runs.clear()
    monkeypatch.setattr(examples.tuning, "run_briefly", working)
    assert searched(tmp_path) == whole
    assert runs == made[12:]
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"]


def test_a_stopped_search_of_other_settings_is_not_gone_on_with(runs, tmp_path):
    whole = searched(tmp_path)
    dataclasses.replace(whole, points=whole.points[:3]).write(tmp_path / "rates.part")
    with pytest.raises(BadInput, match="of other settings"):
        searched(tmp_path, Training(steps=10))
    (tmp_path / "rates.part").write_text("[]")
    with pytest.raises(BadInput, match="no record of a search"):
        searched(tmp_path)


def test_the_optimizers_that_are_asked_for_are_searched_and_adamw_whose_rate_they_begin_at(
    runs, tmp_path
):
    assert {name for name, _ in _points(searched(tmp_path, names=["muon"]))} == {"adamw", "muon"}


def test_a_recipe_whose_rates_mean_another_size_is_searched_at_updates_of_the_same(runs, tmp_path):
    rates = {name: [] for name in ("muon", "moonlight")}
    for name, rate in _points(searched(tmp_path, names=rates)):
        rates.get(name, []).append(rate.learning_rate)
    # 0.2 sqrt(width) times the polar factor, where Muon has it as it is.
    assert rates["moonlight"][0] == pytest.approx(rates["muon"][0] / (0.2 * 128**0.5))


def _points(grid):
    return [(point.optimizer, point.rates) for point in grid.points]


def test_settings_other_than_the_searched_ones_are_named(grid):
    assert grid.differing_settings(GPTConfig(), Training()) == []
    differing = grid.differing_settings(GPTConfig(width=256), Training(steps=100))
    assert differing == ["width=128", "steps=300"]


def test_an_optimizer_without_a_run_is_an_error_that_names_the_remedy(grid):
    with pytest.raises(BadInput, match="--tune True"):
        grid.best("sgd")
