"""A run that is killed and resumed is the run that nobody killed."""

import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from examples.checkpoints import Checkpoints
from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.launch import Resume, launch, resume
from examples.metrics import Metrics, read_lines
from examples.pretrain import Pretrain
from examples.runs import read_run
from examples.settings import Devices, Training

ROOT = Path(__file__).parents[2]
SMALL_CORPUS = Path(asyncio.__file__).parent
STEPS = 60
TOLD = Pretrain(
    data=SMALL_CORPUS,
    model=GPTConfig(width=32, depth=1, heads=2, context=32),
    training=Training(
        steps=STEPS,
        log_every=3,
        evaluate_every=20,
        evaluation_batches=2,
        checkpoint_every=7,
        keep=5,
        samples=0,
    ),
)
# cuDNN adds gradients in any order unless it is told not to.
FUSED = dict(depth=2, scan=True, dtype="bfloat16", fused_attention=True)
KILLED = 2  # times; tests/programs/kill_and_resume.py has a run killed twenty times


def begun(*arguments):
    """A process that trains until it is killed.

    It sees as many devices as this one: a sum's order, and so its last bit, depends on their number.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "examples", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(jax.device_count())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pretraining(folder, model):
    settings = {
        **dict(data=SMALL_CORPUS, output=folder),
        **{field.name: getattr(model, field.name) for field in dataclasses.fields(model)},
        "steps": STEPS,
        "log-every": 3,
        "evaluate-every": 20,
        "evaluation-batches": 2,
        "checkpoint-every": 7,
        "samples": 0,
    }
    told = (f"--{name.replace('_', '-')}={value}" for name, value in settings.items())
    return begun("pretrain", *told)


def killed_at(process, folder, step):
    """Sends SIGKILL once the log has reached a step."""
    log = folder / "metrics.jsonl"
    while process.poll() is None:
        if log.exists() and max((line["step"] for line in read_lines(log)), default=0) >= step:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def ended(process):
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed


def logged(folder):
    """All that is logged, but for the clock."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def undisturbed(folder, model=TOLD.model):
    """Trains one run in peace, in this process, where most of its programs are there already."""
    with jax.numpy_dtype_promotion("standard"):
        return launch(dataclasses.replace(TOLD, output=folder, model=model))


def killed_and_resumed(folder, times, *, model=TOLD.model, seed=0):
    """Trains the same run in processes, of which so many are killed at a random step."""
    process, draws = pretraining(folder, model), random.Random(seed)
    for _ in range(times):
        killed_at(process, folder, draws.randint(1, STEPS - 1))
        process = begun("resume", folder)
    ended(process)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("runs") / "run")


def test_a_killed_run_has_the_losses_of_one_that_was_not_in_every_bit(finished, tmp_path):
    killed = killed_and_resumed(tmp_path / "killed", KILLED)
    assert logged(killed) == logged(finished)
    assert len(read_run(killed).losses) == STEPS
    assert not list((killed / "checkpoints").glob("*tmp*"))


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, FUSED], ids=["float32", "bfloat16, cuDNN"])
def test_on_a_gpu_a_killed_run_has_the_losses_of_one_that_was_not_in_every_bit(settings, tmp_path):
    model = dataclasses.replace(TOLD.model, **settings)
    alone = undisturbed(tmp_path / "alone", model)
    assert logged(killed_and_resumed(tmp_path / "killed", KILLED, model=model)) == logged(alone)


def cut_back(run, folder, *, steps):
    """A copy of a run as if it had been killed after so many steps."""
    subprocess.run(["cp", "-r", str(run), str(folder)], check=True)
    for checkpoint in (folder / "checkpoints").iterdir():
        if int(checkpoint.name) > steps:
            subprocess.run(["rm", "-r", str(checkpoint)], check=True)
    return folder


def test_on_a_mesh_the_rest_of_a_run_has_the_losses_of_one_device(finished, tmp_path):
    folder = cut_back(finished, tmp_path / "moved", steps=STEPS // 2 + 7)
    with jax.numpy_dtype_promotion("standard"):
        resume(Resume(folder, Devices("fsdp=2,tensor=2", None, None, None)))
    there, here = read_run(folder).losses, read_run(finished).losses
    assert list(there) == list(here)
    np.testing.assert_allclose(list(there.values()), list(here.values()), rtol=0, atol=4e-6)


def test_a_finished_run_is_left_as_it_is(finished):
    before = logged(finished)
    with jax.numpy_dtype_promotion("standard"):
        resume(Resume(finished))
    assert logged(finished) == before


def test_the_folder_of_a_run_is_not_taken_by_another(finished):
    with pytest.raises(BadInput, match=f"resume {finished}"):
        launch(dataclasses.replace(TOLD, output=finished))


def test_a_folder_without_a_run_is_not_resumed(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.toml"):
        resume(Resume(tmp_path))


def test_only_so_many_checkpoints_stay(finished):
    assert Checkpoints(finished / "checkpoints").latest() == STEPS
    assert len(list((finished / "checkpoints").iterdir())) == TOLD.training.keep


def test_lines_behind_the_checkpoint_and_a_cut_line_are_written_anew(tmp_path):
    metrics = Metrics(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    Metrics(tmp_path, step=2, tensorboard=False).close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]
