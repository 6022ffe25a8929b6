"""The comparison of optimizers, on a tiny model: what `make demo` does."""

import asyncio
import csv
import dataclasses
from pathlib import Path

import jax
import pytest

from examples.compare import Compare, _optimizers, compare
from examples.comparison import steps_to_reach
from examples.curves import Plot, grouped, plot
from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.optimizers import OptimizerConfig
from examples.presets import PRETRAIN
from examples.runs import Run, read_run
from examples.settings import Training
from examples.tuning import Grid

SMALL_CORPUS = Path(asyncio.__file__).parent
NAMES = ("adamw", "normuon")
TINY = Compare(
    data=SMALL_CORPUS,
    optimizers=",".join(NAMES),
    seeds=2,
    model=GPTConfig(width=32, depth=1, heads=2, context=32),
    training=Training(steps=30, evaluate_every=10, evaluation_batches=4, samples=0),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "compare"
    with jax.numpy_dtype_promotion("standard"):  # Optax's AdamW promotes its step count
        return compare(dataclasses.replace(TINY, output=output))


@pytest.fixture(scope="module")
def lines(folder):
    with (folder / "validation.csv").open() as file:
        return list(csv.DictReader(file))


def losses(lines, optimizer, seed):
    return [
        float(line["validation_loss"])
        for line in lines
        if (line["optimizer"], line["seed"]) == (optimizer, str(seed))
    ]


def test_it_writes_tables_picture_and_csv(folder):
    table = (folder / "table.txt").read_text()
    assert "to train on" in table
    assert "GPT with" in table
    assert all(name in table for name in NAMES)
    assert "normuon − adamw" in table
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_it_says_that_the_recorded_rates_belong_to_another_model(folder):
    assert "width=128" in (folder / "table.txt").read_text()


def test_every_optimizer_starts_from_the_weights_of_the_seed(lines):
    for seed in (0, 1):
        assert len({losses(lines, name, seed)[0] for name in NAMES}) == 1
    assert losses(lines, "adamw", 0)[0] != losses(lines, "adamw", 1)[0]


def test_every_optimizer_learns(lines):
    for name in NAMES:
        for seed in (0, 1):
            first, *_, last = losses(lines, name, seed)
            assert last < first - 1.0


def test_a_second_comparison_does_not_write_into_the_first_one(folder):
    with pytest.raises(BadInput, match="is not empty"):
        compare(dataclasses.replace(TINY, output=folder))


def test_any_runs_are_drawn_by_one_command(folder, tmp_path):
    picture = plot(Plot((folder / "adamw-0", folder / "normuon-1"), tmp_path / "picture.png"))
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="lacks config.toml"):
        plot(Plot((tmp_path,), tmp_path / "picture.png"))


def test_runs_of_one_optimizer_and_seed_are_curves_of_their_own(folder):
    run, other = read_run(folder / "adamw-0"), read_run(folder / "adamw-1")
    assert list(grouped([run, other])) == ["adamw"]
    assert list(grouped([run, dataclasses.replace(run, name="again")])) == ["adamw-0", "again"]


def test_an_unknown_optimizer_is_named():
    with pytest.raises(BadInput, match="'sgd'"):
        compare(dataclasses.replace(TINY, optimizers="adamw,sgd"))


def test_missing_learning_rates_name_the_remedy(tmp_path):
    with pytest.raises(BadInput, match="--tune True"):
        compare(dataclasses.replace(TINY, rates=tmp_path / "none.json"))


def test_the_presets_of_pretraining_are_the_best_of_the_recorded_grid():
    grid = Grid.read(Compare().rates)
    for name in ("adamw", "muon", "normuon"):
        assert PRETRAIN[name] == grid.best(name)


@pytest.mark.parametrize(("loss", "steps"), [(3.5, 5.0), (2.0, 20.0), (1.0, None)])
def test_steps_to_reach_reads_the_curve_between_its_points(loss, steps):
    curve = [(0, 4.0), (10, 3.0), (20, 2.0)]
    lines = tuple({"step": at, "validation_loss": is_, "seconds": 0.0} for at, is_ in curve)
    assert steps_to_reach(Run("adamw-0", {}, lines), loss) == steps


def test_recipes_run_with_every_dtype_of_momentum_and_other_optimizers_once():
    found = _optimizers(["adamw", "normuon"], "int8, float32")
    assert {label: told.momentum_dtype for label, told in found.items()} == {
        "adamw": "float32",
        "normuon": "float32",
        "normuon-int8": "int8",
    }
    with pytest.raises(BadInput, match="int4 is none of float32, bfloat16, int8"):
        _optimizers(["normuon"], "int4")
    with pytest.raises(BadInput, match="adamw keeps its momentum in float32"):
        OptimizerConfig("adamw", momentum_dtype="int8")
    names = [
        Run("", {"optimizer": {"optimizer": "normuon", **told}}, ()).optimizer
        for told in ({}, {"momentum_dtype": "float32"}, {"momentum_dtype": "int8"})
    ]
    assert names == ["normuon", "normuon", "normuon-int8"]
