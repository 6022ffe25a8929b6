"""The benchmarks' arithmetic and tables; their times need a GPU."""

import json

import jax
import pytest
import typer
from typer.testing import CliRunner

import torch_ref.kernels.backend
from benchmarks import cards, kernel_times, orthogonalization, report, steps, tune, workloads
from benchmarks.__main__ import main
from benchmarks.arithmetic import (
    Rates,
    orthogonalization_operations,
    step_seconds,
)
from benchmarks.kernel_times import Ran
from benchmarks.race import Pace, Prepared, Race
from benchmarks.rows import Row
from normuon_core.kernels.tiles import (
    HopperConfiguration,
    ProductConfiguration,
    product_configuration,
)

BRIEFLY = Pace(rounds=1, turn=0.0)


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


def test_a_quick_run_writes_its_files_and_says_what_needs_a_gpu(tmp_path, monkeypatch):
    # Under the interpreter a step of the kernels would take seconds.
    monkeypatch.setattr(torch_ref.kernels.backend, "is_interpreted", lambda: False)
    # Optax's own Muon mixes dtypes, which the tests forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = run("--quick", "--only", "steps", "--only", "compilation", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "cards").iterdir()
    found = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert list(found["parts"]) == ["Whole steps", "Compilation"]
    compilation = found["parts"]["Compilation"]["rows"]
    assert {row["failure"] for row in compilation} == {None}
    # Milliseconds: nothing compiles in less than one.
    assert min(row["milliseconds"] for row in compilation) > 1
    part = found["parts"]["Whole steps"]
    rows = {row["who"]: row for row in part["rows"]}
    everyone = [steps.IN_TORCH, steps.PEERS_IN_TORCH, steps.IN_JAX, steps.PEERS_IN_JAX]
    assert list(rows) == [who for each in everyone for who in each]
    timed = {who for who, row in rows.items() if row["milliseconds"]}
    assert timed >= {"NorMuon, JAX, XLA", "optax.contrib.muon", "torch.optim.Muon"}
    for who in rows:
        one_reason = (rows[who]["failure"] is None) != (rows[who]["missing"] is None)
        assert one_reason == (who not in timed), who
    assert "CUDA" in rows[steps.OURS_IN_JAX]["failure"]
    assert "CUDA" in rows[steps.OURS_IN_TORCH]["failure"]
    # Everyone who could run had one turn in each of the two rounds.
    turns = [set(turn.split(" | ")) for turn in part["order"]["tiny, JAX"]]
    assert turns == [timed & {*steps.IN_JAX, *steps.PEERS_IN_JAX}] * 2
    assert {"jax", "torch", "triton", "dion", "device"} <= set(part["machine"])
    assert "optax.contrib.muon" in (tmp_path / "results.md").read_text()
    # A share of a rate that nobody measured would be an invented figure.
    assert {row["share of reference"] for row in rows.values()} == {None}
    assert not (tmp_path / "results.png").exists()
    assert "no picture" in result.output


def test_one_part_can_be_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_ref.kernels.backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(workloads, "QUICK_SHAPES", workloads.QUICK_SHAPES[:1])
    result = run("--quick", "--only", "shapes", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    ((_, card),) = cards.load(tmp_path).items()
    assert list(card) == ["Orthogonalization"]
    timed = {row.who for row in card["Orthogonalization"].rows if row.milliseconds}
    xla = {"ours, JAX, XLA, standard", "ours, JAX, XLA, Gram", "optax.contrib.muon"}
    assert timed >= {*xla, "torch.optim.Muon"}


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
    peer = {"a peer": lambda _: Prepared(lambda: None, lambda: None)}
    framework = steps.Framework("a peer", {}, peer, lambda shapes: None)
    monkeypatch.setattr(steps, "FRAMEWORKS", {"none": framework})
    monkeypatch.setattr(orthogonalization, "IMPLEMENTATIONS", peer)
    (step,) = steps.races({"a model": [(2, 10, 40)]}, rates, BRIEFLY)
    (stack,) = orthogonalization.races([(2, 10, 40)], rates, BRIEFLY)
    assert step.rows[0].operations == stack.rows[0].operations == 2 * 38_000
    assert stack.rows[0].reference == pytest.approx(0.076)
    assert step.rows[0].reference == pytest.approx(0.076 + 24.0)


def test_a_steps_time_is_its_kernels_and_the_gaps_between_them():
    first = [Ran("feed", 1000, 3000), Ran("product", 3500, 7500), Ran("product", 8000, 9000)]
    second = [Ran("product", 4000, 9000), Ran("feed", 0, 3000)]
    assert kernel_times.milliseconds([first, second]) == {
        kernel_times.WHOLE: [8.0, 9.0],
        "feed": [2.0, 3.0],
        "product": [5.0, 5.0],
        kernel_times.GAPS: [1.0, 1.0],
    }


def test_a_kernel_is_compared_with_its_work_at_the_machines_rates(monkeypatch):
    """2 of 10x40: 38 n^3 each; 8 bytes an entry of `squares`. At 1e9 FLOP/s and 1e6 bytes/s."""
    names = ["squares", "product", kernel_times.PYTORCHS]
    replay = [Ran(name, 1000.0 * i, 1000.0 * (i + 1)) for i, name in enumerate(names)]
    monkeypatch.setattr(kernel_times, "_profiled", lambda shapes: [replay])
    shapes = {"a model": [(2, 10, 40)]}
    (found,) = kernel_times.races(shapes, Rates(products=1e9, copies=1e6))
    rows = {row.who: row for row in found.rows}
    assert list(rows) == [kernel_times.WHOLE, *names, kernel_times.GAPS]
    assert rows["product"].share == pytest.approx(0.076)
    assert rows["squares"].share == pytest.approx(6.4)
    assert rows["product"].operations == 2 * 38_000
    assert rows["squares"].more == {"launches": 1}
    assert rows[kernel_times.PYTORCHS].share is None
    assert rows[kernel_times.WHOLE].share is None
    (alone,) = kernel_times.races(shapes, None)
    assert {row.share for row in alone.rows} == {None}


def test_a_picture_is_drawn_of_rows_with_a_reference(tmp_path):
    path = tmp_path / "results.png"
    rows = [Row("a stack", who, milliseconds=2.0, reference=1.0) for who in ("ours", "a peer")]
    without = part_of("Compilation", [Row("b", "ours", milliseconds=1.0)])
    both = {"Orthogonalization": part_of("Orthogonalization", rows), "Compilation": without}
    assert report.draw(path, {"a GPU": both, "another": both})
    assert path.stat().st_size > 10_000
    assert not report.draw(path, {"a GPU": {"Compilation": without}})
    assert not path.exists()


def test_times_are_compared_with_the_base_on_the_same_workload():
    times = [("a", "ours", 2.0), ("a", "peer", 5.0), ("b", "ours", 1.0)]
    rows = [Row(what, who, milliseconds=time) for what, who, time in times]
    assert [line[4] for line in report.lines(rows, "ours")] == ["1.00", "2.50", "1.00"]
    rows[0].base = "peer"
    assert [line[4] for line in report.lines(rows, "ours")] == ["0.40", "2.50", "1.00"]
    row = Row("a", "ours", milliseconds=4.0, reference=3.0, operations=2e9)
    assert (row.share, row.teraflops) == (0.75, 0.5)


def part_of(title: str, rows: list[Row]) -> cards.Part:
    return cards.Part.of(title, "ours", {"driver": "1"}, [Race("a race", rows, [["ours"]])], [])


def test_results_of_several_gpus_stand_side_by_side(tmp_path):
    """A file for each, of which a later run replaces its own part alone."""
    row = Row("a", "ours", milliseconds=2.0, times=[1.0, 2.0, 3.0], quartiles=(1.5, 2.5))
    absent = Row("a", "peer", missing="a-package")
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H200"]
    for name in names:
        cards.save(tmp_path, name, {"Whole steps": part_of("Whole steps", [row, absent])})
    assert cards.file_of(tmp_path, names[0]).name == "nvidia-h100-80gb-hbm3.json"
    assert set(cards.load(tmp_path)) == set(names)
    kept = cards.load(tmp_path)[names[0]]
    assert kept["Whole steps"] == part_of("Whole steps", [row, absent])
    cards.save(tmp_path, names[0], {**kept, "Products": part_of("Products", [row])})
    report.write(tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert [text.count(f"## {name}\n") for name in names] == [1, 1]
    assert text.count("### Whole steps") == 2
    assert text.count("### Products") == 1
    assert "not installed: a-package" in text


def test_tuning_never_keeps_a_fast_wrong_configuration():
    right, wrong = (ProductConfiguration(*each) for each in tune.BOTH[:2])
    times, errors = {right: 2.0, wrong: 1.0}, {right: 3e-4, wrong: 0.5}
    assert tune.choose(times, errors) == right
    assert tune.choose(times, {right: 3e-4, wrong: 3e-4}) == wrong
    with pytest.raises(ValueError, match="no configuration is right"):
        tune.choose(times, {right: float("nan"), wrong: 1.0})


def test_hoppers_own_kernel_is_in_the_table_where_it_is_faster():
    problem, portable = tune.Problem(True, 64, 64, 64, 2), ProductConfiguration(64, 64, 64, 4, 3, 4)
    own = HopperConfiguration(128, 5, 4)
    errors = {portable: 3e-4, own: 3e-4}
    faster = tune.entry(problem, {portable: 2.0, own: 1.0}, errors)
    assert (faster["configuration"], faster["hopper"]) == ([*portable], [*own])
    assert "hopper" not in tune.entry(problem, {portable: 1.0, own: 2.0}, errors)


def test_tuning_keeps_other_architectures(tmp_path):
    problem, best = tune.Problem(True, 64, 64, 64, 2), ProductConfiguration(64, 64, 64, 4, 3, 4)
    chosen = {problem: tune.entry(problem, {best: 1.0}, {best: 0.0})}
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
        found = tune.candidates(problem, hopper=False)
        assert found
        assert set(found) < set(tune.candidates(problem, hopper=True))
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
