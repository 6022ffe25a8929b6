"""Muon in packages of others; docs/benchmarks.md says how to install them.

Each is imported when it is made. They are asked for what ours does, Nesterov's momentum and weight
decay, and have their own defaults in everything else.
"""

# They need not be installed, and are not where types are checked.
# pyright: reportMissingImports=false

import importlib

import torch

from benchmarks.workloads import DECAY, RATE

Params = list[torch.nn.Parameter]


def dion_muon(params: Params) -> torch.optim.Optimizer:
    """Microsoft's dion, with its Triton kernels."""
    from dion import Muon

    return Muon(params, lr=RATE, weight_decay=DECAY, nesterov=True, use_triton=True)


def dion_normuon(params: Params) -> torch.optim.Optimizer:
    """The same of its NorMuon."""
    from dion import NorMuon

    return NorMuon(params, lr=RATE, weight_decay=DECAY, nesterov=True, use_triton=True)


def dion_normuon_gram(params: Params) -> torch.optim.Optimizer:
    """Its NorMuon with the Gram form of gram-newton-schulz, on the CuTe kernels of quack.

    dion would report the absence of these as an error of its own kind.
    """
    _need("dion", "gram_newton_schulz", "quack")
    from dion import NorMuon

    return NorMuon(
        params,
        lr=RATE,
        weight_decay=DECAY,
        nesterov=True,
        use_gram_newton_schulz=True,
        use_triton=True,
    )


def gram_newton_schulz_muon(params: Params) -> torch.optim.Optimizer:
    """The optimizer that gram-newton-schulz has of its own; it replays CUDA graphs of the iteration."""
    _need("gram_newton_schulz", "quack")
    from gram_newton_schulz import Muon

    return Muon(params, lr=RATE, weight_decay=DECAY)


def heavyball_muon(params: Params) -> torch.optim.Optimizer:
    """Heavyball's, which would otherwise take the gradients away after its first step."""
    import heavyball

    return heavyball.Muon(params, lr=RATE, weight_decay=DECAY, consume_grad=False)


def _need(*modules: str) -> None:
    """Raises a ModuleNotFoundError that names the first of them that is absent."""
    for module in modules:
        importlib.import_module(module)
