"""`python -m parity_tests` on two recipes: the table, the JSON file and the exit status."""

import json

import jax
import pytest
import typer
from typer.testing import CliRunner

from normuon_core import RECIPES
from parity_tests import report
from parity_tests.__main__ import main

app = typer.Typer()
app.command()(main)


@pytest.fixture
def two_recipes(monkeypatch):
    few = {name: RECIPES[name] for name in ("normuon", "muon_keller")}
    monkeypatch.setattr(report, "RECIPES", few)
    monkeypatch.setattr(report, "DTYPES", ("float64", "bfloat16"))
    yield few
    jax.config.update("jax_enable_x64", False)


def test_the_report_prints_every_row_and_succeeds(two_recipes, tmp_path):
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["--json", str(file)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert len(written["rows"]) == 2 * (4 + 3) == report.count_rows()
    assert all(row["holds"] and row["relative"] <= row["bound"] for row in written["rows"])
    assert {row["recipe"] for row in written["rows"]} == set(two_recipes)
    assert "14 of 14 bounds hold" in result.output
    assert "normuon" in result.output
    assert {"jax", "torch", "device"} <= set(written["machine"])


def test_a_broken_bound_is_an_exit_status(two_recipes, monkeypatch):
    monkeypatch.setattr(report, "RECIPES", {"normuon": two_recipes["normuon"]})
    monkeypatch.setattr(report, "DTYPES", ("float64",))
    monkeypatch.setitem(report.BOUNDS["momentum"], "float64", -1.0)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "3 of 4 bounds hold" in result.output
