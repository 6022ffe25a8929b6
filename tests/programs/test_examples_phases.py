"""Pretraining, fine-tuning and preference tuning from the command line, one after the other."""

import dataclasses
import json
import re
import shutil
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

import examples
from examples.__main__ import main
from examples.configuration import read_config
from examples.gpt import parameter_count
from examples.metrics import read_lines
from examples.pretrain import Pretrain
from examples.runs import read_run
from examples.settings import Training
from examples.sft import Sft
from examples.sweep import Sweep, sweep
from examples.trained import load_trained
from examples.word_problems import write_problems
from optax_normuon import update_diagnostics

TINY = ["--batch=4", "--evaluate-every=10", "--evaluation-batches=2", "--samples=1"]
LOGGED = ("diagnostics", "tensorboard")  # what fine-tuning alone writes
MODEL = ["--width=32", "--depth=2", "--heads=4", "--kv-heads=2", "--context=128", "--scan=True"]
MEASURED = 3.3e-6  # the largest difference of a loss on a mesh, in nats


def run(*arguments):
    with jax.numpy_dtype_promotion("standard"):
        return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "problems"
    write_problems(folder, count=150, held_out=5)
    return folder


@pytest.fixture(scope="module")
def runs(problems, tmp_path_factory):
    """The folder of all three, made by three commands."""
    out = tmp_path_factory.mktemp("runs")
    told = ["--steps=20", f"--data={problems / 'text'}", f"--output={out / 'base'}"]
    assert run("pretrain", *told, *MODEL, *TINY) == 0
    for phase, start, rows in (("sft", "base", "sft.jsonl"), ("dpo", "sft", "pairs.jsonl")):
        told = [out / start, f"--data={problems / rows}", f"--output={out / phase}"]
        written = ["--log-every=5", *(f"--{name}={phase == 'sft'}" for name in LOGGED)]
        assert run(phase, *told, "--steps=10", *written, *TINY) == 0
    return out


def test_every_phase_brings_its_loss_down(runs):
    for phase, drop in (("base", 2.0), ("sft", 0.5), ("dpo", 0.002)):
        first, *_, last = read_run(runs / phase).evaluations
        assert last.validation_loss < first.validation_loss - drop
    assert read_run(runs / "dpo").evaluations[0].validation_loss == pytest.approx(
        np.log(2), abs=1e-5
    )


def test_a_phase_begins_with_the_weights_and_the_model_of_the_one_before(runs, problems):
    base, tuned = (load_trained(runs / name) for name in ("base", "sft"))
    assert base.model == tuned.model
    numbers = update_diagnostics(
        jax.tree.map(lambda a, b: a - b, tuned.params, base.params), base.params
    )
    assert all(0 < number.update_to_weight.max() < 0.5 for number in numbers.values())


def test_the_log_has_rates_momentum_and_the_diagnostics_of_every_matrix(runs):
    lines = read_lines(runs / "sft" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert {"loss", "gradient_norm", "lr_muon", "lr_adamw", "momentum"} < steps[0].keys()
    assert [line["step"] for line in lines if "matrices" in line] == [5, 10]
    matrices = steps[4]["matrices"]
    assert len(matrices) == 6
    for numbers in matrices.values():
        assert {len(each) for each in numbers.values()} == {2}  # layers of the stack
        assert all(0.02 < error < 1.0 for error in numbers["orthogonality_error"])
        assert all(0 < share < 1 for share in numbers["masked_decay"])


def test_a_run_says_all_that_it_was_told_and_does_it_again(runs, problems, tmp_path):
    told = tomllib.loads((runs / "sft" / "config.toml").read_text())
    assert told["phase"] == "sft"
    assert told["optimizer"]["learning_rate"] == 0.02  # the preset
    assert told["model"]["kv_heads"] == 2
    config = runs / "sft" / "config.toml"
    again = tmp_path / "again"
    # `start` and `data` are in the file; what is on the command line goes before.
    assert run("sft", "--config", config, f"--output={again}", "--samples=0") == 0
    assert read_run(again).losses == read_run(runs / "sft").losses


def test_bf16_parameters_train_as_float32_ones_do(runs, problems, tmp_path):
    told = ["--steps=20", f"--data={problems / 'text'}", f"--output={tmp_path / 'run'}"]
    assert run("pretrain", *told, *MODEL, "--param-dtype=bfloat16", *TINY[:3], "--samples=0") == 0
    params = load_trained(tmp_path / "run").params
    assert params["blocks"]["mlp"]["up"]["kernel"].dtype == jax.numpy.bfloat16
    half, whole = (read_run(folder).final_loss for folder in (tmp_path / "run", runs / "base"))
    assert half == pytest.approx(whole, abs=0.1)


def test_the_files_for_tensorboard_are_written(runs):
    (file,) = (runs / "sft" / "tensorboard").iterdir()
    assert b"lr_muon" in file.read_bytes()
    assert not (runs / "base" / "tensorboard").exists()


@pytest.mark.parametrize(
    ("phase", "start", "rows"), [("sft", "base", "sft"), ("dpo", "sft", "pairs")]
)
def test_tuning_on_a_mesh_has_the_losses_of_one_device(
    runs, problems, tmp_path, phase, start, rows
):
    told = [runs / start, f"--data={problems / rows}.jsonl", f"--output={tmp_path / 'run'}"]
    assert run(phase, *told, "--steps=10", "--mesh=fsdp=2,tensor=2", *TINY[:3], "--samples=0") == 0
    there, here = read_run(tmp_path / "run").losses, read_run(runs / phase).losses
    differences = np.array(list(there.values())) - np.array(list(here.values()))
    np.testing.assert_allclose(differences, 0, atol=4 * MEASURED)


def test_a_tuned_model_is_asked_and_a_pretrained_one_goes_on(runs, capsys):
    for name in ("base", "dpo"):
        assert run("sample", runs / name, "--prompt=Ada has 3 eggs", "--tokens=5", "--count=2") == 0
        assert capsys.readouterr().out.strip("\n")
    assert "→" in (runs / "dpo" / "samples.txt").read_text()


def test_a_plot_of_any_runs_comes_with_their_table(runs, tmp_path, capsys):
    picture = tmp_path / "curves.png"
    assert run("plot", runs / "base", f"--output={picture}") == 0
    assert f"{read_run(runs / 'base').final_loss:.4f}" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_a_sweep_has_a_loss_and_right_answers_at_each_multiple_of_the_rates(runs, problems):
    training = Training(steps=2, batch=4, evaluation_batches=1)
    phase = Sft(runs / "base", problems / "sft.jsonl", training=training)
    with jax.numpy_dtype_promotion("standard"):
        (found,) = sweep(Sweep(phase, ("adamw",), (0.01, 1.0)), Console(quiet=True)).values()
    assert found[1].loss < found[0].loss - 0.1
    assert all(
        right is not None and 0 <= right <= 1 for _, right in map(dataclasses.astuple, found)
    )


def test_a_bad_row_ends_it_with_one_line_and_leaves_nothing(runs, problems, tmp_path, capsys):
    rows = (problems / "sft.jsonl").read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*rows[:20], json.dumps({"question": "?"}), *rows[20:]]))
    assert run("sft", runs / "base", f"--data={bad}", f"--output={tmp_path / 'run'}") == 2
    error = capsys.readouterr().err
    assert f"error: {bad}, line 21: found question, expected `conversations`" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('phase = "dpo"', "is the configuration of another phase than sft"),
        (
            "[optimizer]\nlerning_rate = 1.0",
            "optimizer.lerning_rate is no setting. Did you mean 'lear",
        ),
        ("[training]\nsteps = 1.5", "training.steps is 1.5, expected int"),
        ("training = 3", r"training is a table, \[training\], and not 3"),
        ("[training]\nsteps = 0", "training.steps=0 is below 1"),
        ("[training]\nevaluation_batches = 0", "training.evaluation_batches=0 is below 1"),
        ("[[", "no TOML"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_with_its_file(tmp_path, capsys, content, said):
    file = tmp_path / "told.toml"
    file.write_text(content)
    assert run("sft", "here", "--data", "there", "--config", file) == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert re.search(said, error)


def test_problems_are_right_and_held_out_ones_are_in_no_other_file(problems):
    rows = {
        name: [json.loads(line) for line in (problems / name).read_text().splitlines()]
        for name in ("sft.jsonl", "pairs.jsonl", "held_out.jsonl")
    }
    for row in rows["sft.jsonl"]:
        working, result = row["answer"].split("\n#### ")
        left, right = working.rstrip(".").split(" = ")
        assert eval(left) == int(right) == int(result)
    assert all(row["chosen"] != row["rejected"] for row in rows["pairs.jsonl"])
    held_out = {row["question"] for row in rows["held_out.jsonl"]}
    others = {row["question"] for row in rows["sft.jsonl"]}
    others |= {row["prompt"] for row in rows["pairs.jsonl"]}
    told = "".join(path.read_text() for path in (problems / "text").iterdir())
    assert not held_out & others
    assert not any(question in told for question in held_out)


def test_the_preset_of_minimind_s_size_is_a_configuration():
    config = read_config(Path(examples.__file__).parent / "configs" / "minimind.toml", Pretrain())
    model = config.model
    assert (model.width, model.kv_heads, model.fused_attention) == (512, 2, True)
    assert model.scan or not config.training.deterministic, "what launch would refuse"
    assert 20e6 < parameter_count(model) < 35e6


def test_a_run_keeps_the_reference_that_it_began_with(runs, problems, tmp_path, capsys):
    start, out = tmp_path / "start", tmp_path / "dpo"
    shutil.copytree(runs / "sft", start)
    told = [start, f"--data={problems / 'pairs.jsonl'}", f"--output={out}", "--samples=0"]
    assert run("dpo", *told, "--steps=2", *TINY[:3]) == 0
    assert tomllib.loads((out / "config.toml").read_text())["start_step"] == 10
    # The model that it is compared with is trained on, and its old weights are gone.
    (start / "checkpoints" / "10").rename(start / "checkpoints" / "12")
    assert run("resume", out) == 2
    assert "no checkpoint of step 10 any more, only of 12" in capsys.readouterr().err
