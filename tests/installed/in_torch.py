"""A user's program in PyTorch: it needs the wheel and torch, and type checkers pass it.

`make installed PROGRAM=in_torch` runs and checks it where nothing else is installed.
"""

import sys

import torch

import torch_ref
from normuon_core import POLYNOMIALS, RECIPES, Recipe
from torch_ref import (
    MatrixLayout,
    NorMuon,
    describe,
    matrix_weights,
    param_groups,
    polar_factor,
    update_diagnostics,
)


def model() -> torch.nn.Sequential:
    """Two layers: 8 in, 4 out."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))


def train(network: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """The loss before each step."""
    losses: list[float] = []
    for _ in range(steps):
        loss = (network(torch.ones(2, 8) / 8) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Trains a few steps and prints the losses."""
    network = model()
    print(describe(network))
    recipe: Recipe = RECIPES["moonlight"]
    optimizer = NorMuon(param_groups(network, lr=0.02, adam_lr=3e-3), lr=0.02, recipe=recipe)
    losses = train(network, optimizer, steps=5)
    print(f"torch_ref {torch_ref.__version__}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < losses[0]
    again = model()
    other = NorMuon(param_groups(again, lr=0.02, adam_lr=3e-3), lr=0.02, recipe=recipe)
    other.load_state_dict(optimizer.state_dict())
    weights = matrix_weights(optimizer)
    optimizer.step()
    assert set(update_diagnostics(optimizer, weights)) == {"0.weight"}
    factor = polar_factor(weights["0.weight"], coefficients=POLYNOMIALS["newton_schulz"])
    assert factor.shape == (16, 8)
    assert MatrixLayout(1, 0).reduction_axis == 1
    foreign = {"jax", "optax", "flax", "pytest"} & {*sys.modules}
    assert not foreign, f"imported though no user of PyTorch needs it: {foreign}"


if __name__ == "__main__":
    main()
