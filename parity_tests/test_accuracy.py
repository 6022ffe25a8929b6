"""`python -m parity_tests.accuracy` on small matrices: the table, the JSON file and the exit status."""

import json

import pytest
import typer
from typer.testing import CliRunner

from parity_tests import accuracy
from parity_tests.half_precision import HARD_SPECTRA

app = typer.Typer()
app.command()(accuracy.main)


def test_every_spectrum_backend_and_form_is_measured(tmp_path):
    file = tmp_path / "accuracy.json"
    arguments = ["--shape", "48x128", "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert [row["spectrum"] for row in written["rows"]] == list(HARD_SPECTRA)
    names = {str(form) for form in accuracy.forms(on_gpu=False)}
    assert all(names <= set(row["errors"]) for row in written["rows"])
    assert all(f"{name}: at most" in result.output for name in names)
    assert {"jax", "torch", "device"} <= set(written["machine"])


def test_a_broken_bound_is_an_exit_status(monkeypatch):
    arguments = ["--shape", "24x40", "--spectrum", "gaussian", "--draws", "2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    monkeypatch.setattr(accuracy, "WORST_RATIO", 0.3)
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_a_nan_breaks_the_bound_and_an_exact_plain_form_leaves_the_absolute_floor():
    def broken(plain, error):
        return accuracy.Row("zero", "24x40", 1, plain, {"form": error}).broken

    assert broken(0.01, float("nan")) == ["form"]
    assert broken(0.0, 2e-6) == ["form"]
    assert not broken(0.0, 1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--spectrum", "gauss"], "gaussian"),
        *((["--shape", size], "ROWSxCOLUMNS") for size in ("24", "24x", "24x40x3", "0x3")),
    ],
)
def test_an_unknown_spectrum_or_a_bad_shape_is_refused(arguments, message):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
