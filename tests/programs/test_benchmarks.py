"""The benchmarks' arithmetic and tables; their times need a GPU."""

import json

import jax
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import orthogonalization, report, steps, tune, workloads
from benchmarks.__main__ import main
from benchmarks.arithmetic import (
    Rates,
    orthogonalization_operations,
    step_seconds,
)
from benchmarks.rows import Row, measure
from normuon_core.kernels.tiles import ProductConfiguration, product_configuration


def run(*arguments: str):
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, list(arguments))


def test_operations_are_those_of_the_cheaper_form():
    """5 steps, ratio 4: Gram (24 + 14) n^3, standard (60 + 5) n^3; square ones 20 n^3 either way."""
    assert orthogonalization_operations(2048, 8192) == 38 * 2048**3
    assert orthogonalization_operations(8192, 2048) == 38 * 2048**3
    assert orthogonalization_operations(100, 100) == 20 * 100**3


def test_the_reference_of_a_step_is_arithmetic_and_bytes():
    rates = Rates(products=1e9, copies=1e6)
    assert step_seconds([(3, 100, 100)], rates) == pytest.approx(
        3 * 20 * 100**3 / 1e9 + 30 * 3 * 100 * 100 / 1e6
    )


def test_a_quick_run_writes_its_files_and_says_what_needs_a_gpu(tmp_path):
    # Optax's own Muon mixes dtypes, which the tests forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = run("--quick", "--only", "steps", "--only", "compilation", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert list(found["rows"]) == ["Whole steps", "Compilation"]
    assert {row["failure"] for row in found["rows"]["Compilation"]} == {None}
    # Milliseconds: nothing compiles in less than one.
    assert min(row["milliseconds"] for row in found["rows"]["Compilation"]) > 1
    rows = {row["who"]: row for row in found["rows"]["Whole steps"]}
    assert rows["NorMuon, JAX, XLA"]["milliseconds"] > 0
    assert rows["optax.contrib.muon"]["milliseconds"] > 0
    assert "CUDA" in rows["NorMuon, JAX, Triton"]["failure"]
    assert {"jax", "torch", "triton", "device"} <= set(found["machine"])
    assert "optax.contrib.muon" in (tmp_path / "results.md").read_text()
    # A share of a rate that nobody measured would be an invented figure.
    assert {row["share of reference"] for row in rows.values()} == {None}
    assert not (tmp_path / "results.png").exists()
    assert "no picture" in result.output


def test_one_part_can_be_run_alone(tmp_path):
    result = run("--quick", "--only", "shapes", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["rows"]) == ["Orthogonalization"]
    timed = {row["who"] for row in found["rows"]["Orthogonalization"] if row["milliseconds"]}
    assert timed == {"ours, JAX, XLA, standard", "ours, JAX, XLA, Gram", "optax.contrib.muon"}


def test_the_models_are_those_that_they_are_called():
    """Without embeddings: 12 d^2 a layer of GPT-2; of the Llama attention and three matrices beside."""
    parameters = {
        name: sum(count * rows * columns for count, rows, columns in shapes)
        for name, shapes in workloads.MODELS.items()
    }
    attention, beside = 2 * 2048**2 + 2 * 512 * 2048, 3 * 8192 * 2048
    assert parameters == {"GPT-2 124M": 12 * 12 * 768**2, "1B Llama": 16 * (attention + beside)}


def test_rows_carry_the_work_of_all_their_matrices(monkeypatch):
    """2 of 10x40: 38 n^3 each and 30 bytes an entry; at 1e9 FLOP/s and 1e6 bytes/s, in milliseconds."""
    rates = Rates(products=1e9, copies=1e6)
    keywords = dict(on_gpu=False, calls=1)
    for module in (steps, orthogonalization):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", {"a peer": lambda *_: 1.0})
    (step,) = steps.rows({"a model": [(2, 10, 40)]}, rates, **keywords)
    (stack,) = orthogonalization.rows([(2, 10, 40)], rates, **keywords)
    assert step.operations == stack.operations == 2 * 38_000
    assert stack.reference == pytest.approx(0.076)
    assert step.reference == pytest.approx(0.076 + 24.0)


def test_a_picture_is_drawn_of_rows_with_a_reference(tmp_path):
    path = tmp_path / "results.png"
    rows = [Row("a stack", who, milliseconds=2.0, reference=1.0) for who in ("ours", "a peer")]
    assert report.draw(path, {"Orthogonalization": rows, "Compilation": [Row("b", "ours", 1.0)]})
    assert path.stat().st_size > 10_000
    assert not report.draw(path, {"Compilation": [Row("b", "ours", 1.0)]})
    assert not path.exists()


def test_a_peer_that_fails_is_a_line_with_its_reason():
    def fail():
        raise MemoryError("out of memory\nand more")

    row = measure(Row("a stack", "a peer"), fail)
    assert row.milliseconds is None
    assert row.failure == "MemoryError: out of memory"
    assert report.cells(row, 1.0)[-1] == row.failure


def test_times_are_compared_with_the_base_on_the_same_workload():
    rows = [Row("a", "ours", 2.0), Row("a", "peer", 5.0), Row("b", "ours", 1.0)]
    assert [line[3] for line in report.lines(rows, "ours")] == ["1.00", "2.50", "1.00"]
    row = Row("a", "ours", milliseconds=4.0, reference=3.0, operations=2e9)
    assert (row.share, row.teraflops) == (0.75, 0.5)


def test_tuning_never_keeps_a_fast_wrong_configuration():
    right, wrong = (ProductConfiguration(*each) for each in tune.BOTH[:2])
    times, errors = {right: 2.0, wrong: 1.0}, {right: 3e-4, wrong: 0.5}
    assert tune.choose(times, errors) == right
    assert tune.choose(times, {right: 3e-4, wrong: 3e-4}) == wrong
    with pytest.raises(ValueError, match="no configuration is right"):
        tune.choose(times, {right: float("nan"), wrong: 1.0})


def test_tuning_keeps_other_architectures(tmp_path):
    chosen = {tune.Problem(True, 64, 64, 64, 2): ProductConfiguration(64, 64, 64, 4, 3, 4)}
    tables = {"sm80": {"general": [], "symmetric": []}, "sm90": {"general": [1], "symmetric": [1]}}
    path = tmp_path / "tiles.json"
    tune.write(tune.with_table(tables, "sm90", chosen), path)
    written = json.loads(path.read_text())
    assert written["sm80"] == tables["sm80"]
    entry = {"size": [64, 64, 64], "configuration": [64, 64, 64, 4, 3, 4]}
    assert written["sm90"] == {"general": [], "symmetric": [entry]}


def test_every_candidate_is_one_that_the_kernel_takes():
    """A symmetric tile is square, or two squares side by side."""
    for problem in tune.PROBLEMS:
        found = tune.candidates(problem)
        assert found
        for each in found if problem.symmetric else []:
            assert each.tile_n in (each.tile_m, 2 * each.tile_m)


def test_the_committed_table_answers_for_every_size_and_architecture():
    """The nearest in size; an unknown architecture takes the newest older one's, else the oldest."""
    keywords = dict(dtype="float16", symmetric=True)
    exact = product_configuration(2048, 2048, 2048, architecture="sm90", **keywords)
    near = product_configuration(2000, 2000, 2100, architecture="sm90", **keywords)
    assert exact == near
    for architecture in ("sm80", "sm89", "sm100", "sm120"):
        found = product_configuration(2048, 2048, 2048, architecture=architecture, **keywords)
        assert found == exact
    small = product_configuration(128, 128, 128, architecture="sm90", **keywords)
    assert small != exact
