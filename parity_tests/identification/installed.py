"""What the Muons of other packages are: every one that is installed, run in float64 and identified.

`python -m parity_tests.identification.installed` prints a row for each. It needs PyTorch, and of the
packages in `OPTIMIZERS` those that are to be looked at; JAX only for Optax's.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import typer

from parity_tests.identification.identify import identify
from parity_tests.recorder import Recorder, in_float64

# An optimizer that compiles its step would keep its narrow casts.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

SHAPES = {"tall": (8, 5), "wide": (5, 8), "square": (6, 6)}
STEPS = 6

OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torch.optim.Muon": ("torch.optim", "Muon", {"momentum": 0.95}),
    "torch.optim.Muon, match_rms_adamw": (
        "torch.optim",
        "Muon",
        {"momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"},
    ),
    "muon-optimizer": ("muon", "SingleDeviceMuon", {"momentum": 0.95}),
    "timm": ("timm.optim", "Muon", {"momentum": 0.95}),
    "timm, nesterov": ("timm.optim", "Muon", {"momentum": 0.95, "nesterov": True}),
    "pytorch_optimizer": ("pytorch_optimizer", "Muon", {"momentum": 0.95, "use_muon": True}),
    "heavyball": ("heavyball", "Muon", {"betas": (0.95, 0.99)}),
    "emerging-optimizers": (
        "emerging_optimizers.orthogonalized_optimizers",
        "Muon",
        {"momentum": 0.95},
    ),
}
"""By what is printed: module, class and options beside the learning rate and weight decay."""


def record(module: str, name: str, options: dict[str, Any], path: Path) -> None:
    """Six steps of a PyTorch optimizer on a tall, a wide and a square matrix."""
    import torch

    constructor = getattr(importlib.import_module(module), name)
    options = dict(options)
    random = np.random.default_rng(0)
    params = {
        key: torch.nn.Parameter(torch.tensor(0.1 * random.standard_normal(shape)))
        for key, shape in SHAPES.items()
    }
    group: Any = list(params.values())
    if "use_muon" in options:
        group = [{"params": group, "use_muon": options.pop("use_muon")}]
    with in_float64():
        optimizer = constructor(group, lr=0.02, weight_decay=0.1, **options)
        recorder = Recorder(params)
        for _ in range(STEPS):
            grads = {key: random.standard_normal(shape) for key, shape in SHAPES.items()}
            for key, grad in grads.items():
                params[key].grad = torch.tensor(grad)
            optimizer.step()
            recorder.add_torch(optimizer, grads=grads)
    recorder.save(path)


def record_optax(path: Path) -> None:
    """Six steps of `optax.contrib.muon`."""
    import jax
    import jax.numpy as jnp
    import optax

    with jax.enable_x64(True):
        random = np.random.default_rng(0)
        params: Any = {
            key: jnp.asarray(0.1 * random.standard_normal(s)) for key, s in SHAPES.items()
        }
        tx = optax.contrib.muon(0.02, weight_decay=0.1)
        state, recorder = tx.init(params), Recorder(params)
        for _ in range(STEPS):
            grads = {key: jnp.asarray(random.standard_normal(s)) for key, s in SHAPES.items()}
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            recorder.add(params, grads, lr=0.02, mu=0.95)
        recorder.save(path)


def recorders() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every optimizer, by name, with what records it."""
    for name, (module, constructor, options) in OPTIMIZERS.items():
        yield name, lambda path, call=(module, constructor, options): record(*call, path)
    yield "optax.contrib.muon", record_optax


def main() -> None:
    """Print what every installed Muon is."""
    with tempfile.TemporaryDirectory() as folder:
        for name, recorded in recorders():
            path = Path(folder) / "trace.npz"
            try:
                with contextlib.redirect_stdout(None):
                    recorded(path)
            except ImportError as error:
                typer.echo(f"{name}: not installed ({error})\n")
                continue
            typer.echo(f"{name}: {identify(path)}\n")


if __name__ == "__main__":
    typer.run(main)
