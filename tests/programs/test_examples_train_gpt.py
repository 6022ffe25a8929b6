"""The example's command line, on a tiny model."""

import asyncio
import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

from examples.comparison import steps_to_reach
from examples.optimizers import Rates, decay_to_zero
from examples.train_gpt import main
from examples.training import Evaluation, Run

SMALL_CORPUS = str(Path(asyncio.__file__).parent)
NAMES = ("adamw", "normuon")
TINY = dict(width=32, depth=1, heads=2, context=32, batch=8, steps=30)


def invoke(*arguments):
    """Exit code, and what was printed."""
    app = typer.Typer()
    app.command()(main)
    sizes = [f"--{name}={size}" for name, size in TINY.items()]
    arguments = ["--corpus", SMALL_CORPUS, *sizes, *arguments]
    with jax.numpy_dtype_promotion("standard"):  # Optax's AdamW promotes its step count
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    return result.exit_code, Text.from_ansi(result.output).plain


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("out")
    exit_code, printed = invoke(
        "--output", str(output), "--seeds", "2", "--optimizers", ",".join(NAMES)
    )
    assert exit_code == 0, printed
    return printed, output


@pytest.fixture(scope="module")
def lines(finished):
    with (finished[1] / "validation.csv").open() as file:
        return list(csv.DictReader(file))


def losses(lines, optimizer, seed):
    return [
        float(line["validation_loss"])
        for line in lines
        if (line["optimizer"], line["seed"]) == (optimizer, str(seed))
    ]


def test_it_prints_and_writes_tables_picture_and_csv(finished):
    printed, output = finished
    table = (output / "table.txt").read_text()
    for text in (printed, table):
        assert all(name in text for name in NAMES)
        assert "normuon − adamw" in text
    assert (output / "validation.png").read_bytes().startswith(b"\x89PNG")


def test_it_says_that_the_recorded_rates_belong_to_another_model(finished):
    assert "width=128" in finished[0]


def test_every_optimizer_starts_from_the_weights_of_the_seed(lines):
    for seed in (0, 1):
        assert len({losses(lines, name, seed)[0] for name in NAMES}) == 1
    assert losses(lines, "adamw", 0)[0] != losses(lines, "adamw", 1)[0]


def test_every_optimizer_learns(lines):
    for name in NAMES:
        for seed in (0, 1):
            first, *_, last = losses(lines, name, seed)
            assert last < first - 1.0


def test_an_unknown_optimizer_is_named():
    exit_code, printed = invoke("--optimizers", "adamw,sgd")
    assert exit_code == 2
    assert "'sgd'" in printed


def test_missing_learning_rates_name_the_remedy(tmp_path):
    exit_code, printed = invoke("--rates", str(tmp_path / "none.json"))
    assert exit_code == 2
    assert "--tune" in printed


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    rate = decay_to_zero(2.0, 100)
    values = np.asarray(jax.vmap(rate)(jnp.arange(101))).tolist()
    assert values[0] == pytest.approx(2.0 / 5)
    assert values[4:40] == pytest.approx([2.0] * 36)
    assert values[99] == pytest.approx(2.0 / 60, rel=1e-4)
    assert values[100] == 0.0


@pytest.mark.parametrize(("loss", "steps"), [(3.5, 5.0), (2.0, 20.0), (1.0, None)])
def test_steps_to_reach_reads_the_curve_between_its_points(loss, steps):
    curve = (Evaluation(0, None, 4.0), Evaluation(10, 3.5, 3.0), Evaluation(20, 2.5, 2.0))
    run = Run("adamw", Rates(0.1), 0, curve, seconds=1.0, step_seconds=0.1)
    assert steps_to_reach(run, loss) == steps
