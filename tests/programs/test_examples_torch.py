"""The example in PyTorch: the same model, and the same losses over a training run."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

from examples.errors import BadInput
from examples.gpt import GPTConfig, apply_model, first_parameters
from examples.launch import launch
from examples.optimizers import OptimizerConfig
from examples.pretrain import Pretrain
from examples.runs import read_run
from examples.settings import Training
from examples.torch_gpt import GPT, load_weights
from examples.torch_pretrain import pretrain

ROOT = Path(__file__).parents[2]
MODEL = GPTConfig(width=32, depth=2, heads=4, kv_heads=2, context=32)
STEPS = 50
MEASURED = 6.7e-6  # the largest difference of a loss below, in nats a byte


def told(folder, optimizer="normuon"):
    return Pretrain(
        data=Path(asyncio.__file__).parent,
        output=folder,
        model=MODEL,
        optimizer=OptimizerConfig(
            optimizer,
            learning_rate=0.02,
            adam_learning_rate=0.008,
            weight_decay=0.1,
            momentum_warmup=10,
        ),
        training=Training(
            steps=STEPS, batch=4, evaluate_every=STEPS, evaluation_batches=2, samples=0
        ),
    )


def losses(folder):
    run = read_run(folder)
    assert len(run.losses) == STEPS
    return np.array([*run.losses.values(), *(each.validation_loss for each in run.evaluations)])


@pytest.fixture(scope="module")
def in_jax(tmp_path_factory):
    with jax.numpy_dtype_promotion("standard"):
        return losses(launch(told(tmp_path_factory.mktemp("jax") / "run")))


def test_the_models_have_the_same_logits():
    params = first_parameters(MODEL, 0)
    model = GPT(MODEL)
    load_weights(model, MODEL, params)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 32))
    mine = np.asarray(jax.jit(apply_model, static_argnums=0)(MODEL, params, tokens))
    theirs = model(torch.tensor(tokens)).detach().numpy()
    np.testing.assert_allclose(theirs, mine, rtol=0, atol=1e-5)


def test_fifty_steps_have_the_losses_of_jax(in_jax, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        in_torch = losses(pretrain(told(tmp_path / "run")))
    np.testing.assert_allclose(in_torch, in_jax, rtol=0, atol=4 * MEASURED)
    assert in_jax[-1] < in_jax[-2] - 1.0


def test_another_recipe_has_other_losses(in_jax, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        other = losses(pretrain(told(tmp_path / "run", optimizer="muon")))
    assert abs(other - in_jax)[STEPS - 1] > 1e-3


def test_two_processes_have_the_losses_of_jax(in_jax, tmp_path, monkeypatch):
    """The first is this one; the second is told the same on its command line."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = told(tmp_path / "run")
    options = {
        "data": config.data,
        "output": config.output,
        **dict(width=32, depth=2, heads=4, context=32, steps=STEPS, batch=4, samples=0),
        "kv-heads": 2,
        "learning-rate": 0.02,
        "adam-learning-rate": 0.008,
        "weight-decay": 0.1,
        "momentum-warmup": 10,
        "evaluate-every": STEPS,
        "evaluation-batches": 2,
    }
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    second = subprocess.Popen(
        [sys.executable, "-m", "examples.torch_pretrain"]
        + [f"--{name}={value}" for name, value in options.items()],
        cwd=ROOT,
        env={**os.environ, **together, "RANK": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for name, value in {**together, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    try:
        with jax.numpy_dtype_promotion("standard"):
            found = losses(pretrain(config))
        torch.distributed.destroy_process_group()
        printed, _ = second.communicate(timeout=240)
    finally:
        second.kill()
    assert second.returncode == 0, printed
    assert "Written" not in printed
    np.testing.assert_allclose(found, in_jax, rtol=0, atol=4 * MEASURED)


def test_what_pytorch_does_not_have_is_named(tmp_path):
    with pytest.raises(BadInput, match="--optimizer adamw"):
        pretrain(told(tmp_path / "run", optimizer="adamw"))
    assert not (tmp_path / "run").exists()
