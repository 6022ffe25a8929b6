"""Whole optimizer steps: the matrices of a model, each a leaf of its own, in float32."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import peers, steps_in_jax, steps_in_torch
from benchmarks.arithmetic import Rates, orthogonalization_operations, step_seconds
from benchmarks.race import Pace, Race, free, race
from benchmarks.ratios import Ratio
from benchmarks.rows import Row
from benchmarks.steps_in_jax import optax_muon, update
from benchmarks.steps_in_torch import graph, launched, torch_muon
from benchmarks.workloads import Stack

OURS_IN_JAX = "NorMuon, JAX, Triton"
OURS_IN_TORCH = "NorMuon, PyTorch, Triton, graph"
APPLY = "NorMuon, JAX, Triton, apply"
DION = "dion NorMuon, Gram, graph"

_NORMUON, _MUON = steps_in_torch.normuon("normuon"), steps_in_torch.normuon("muon")

IN_JAX: dict[str, steps_in_jax.Step] = {
    OURS_IN_JAX: update(steps_in_jax.normuon("normuon", "triton")),
    APPLY: steps_in_jax.apply(steps_in_jax.normuon("normuon", "triton")),
    "Muon, JAX, Triton": update(steps_in_jax.normuon("muon", "triton")),
    "NorMuon, JAX, XLA": update(steps_in_jax.normuon("normuon", "xla")),
}

PEERS_IN_JAX: dict[str, steps_in_jax.Step] = {"optax.contrib.muon": update(optax_muon)}

IN_TORCH: dict[str, steps_in_torch.Step] = {
    OURS_IN_TORCH: graph(_NORMUON),
    "NorMuon, PyTorch, Triton": launched(_NORMUON),
    "Muon, PyTorch, Triton, graph": graph(_MUON),
}

PEERS_IN_TORCH: dict[str, steps_in_torch.Step] = {
    "torch.optim.Muon": launched(torch_muon),
    DION: graph(peers.dion_normuon_gram),
    "dion NorMuon, Gram": launched(peers.dion_normuon_gram),
    "dion NorMuon, Triton": launched(peers.dion_normuon),
    "dion Muon, Triton": launched(peers.dion_muon),
    "gram-newton-schulz Muon": launched(peers.gram_newton_schulz_muon),
    "heavyball Muon": launched(peers.heavyball_muon),
}


class Framework(NamedTuple):
    """Steps in one framework, ours and the peers', and `gather`, which draws what they step."""

    base: str
    ours: Mapping[str, Any]
    peers: Mapping[str, Any]
    gather: type


FRAMEWORKS = {
    "PyTorch": Framework(OURS_IN_TORCH, IN_TORCH, PEERS_IN_TORCH, steps_in_torch.Matrices),
    "JAX": Framework(OURS_IN_JAX, IN_JAX, PEERS_IN_JAX, steps_in_jax.Matrices),
}
"""PyTorch first: JAX keeps the GPU memory that it once had."""

RATIOS = [
    Ratio("NorMuon over Muon, JAX", OURS_IN_JAX, "Muon, JAX, Triton"),
    Ratio("NorMuon over Muon, PyTorch, graph", OURS_IN_TORCH, "Muon, PyTorch, Triton, graph"),
    Ratio("update and apply_updates over apply", OURS_IN_JAX, APPLY),
    Ratio("optax.contrib.muon over ours", "optax.contrib.muon", OURS_IN_JAX),
    Ratio("optax.contrib.muon over ours, apply", "optax.contrib.muon", APPLY),
    Ratio("torch.optim.Muon over ours, graph", "torch.optim.Muon", OURS_IN_TORCH),
    Ratio("dion's Gram form over ours, both graphs", DION, OURS_IN_TORCH),
]
"""Of contestants in one race."""


def races(models: Mapping[str, Sequence[Stack]], rates: Rates | None, pace: Pace) -> Iterator[Race]:
    """One for every model and framework: the states of both would not fit on a GPU side by side."""
    for model, shapes in models.items():
        operations = sum(count * orthogonalization_operations(r, c) for count, r, c in shapes)
        reference = None if rates is None else 1e3 * step_seconds(shapes, rates)
        for framework, (base, ours, theirs, gather) in FRAMEWORKS.items():
            rows = [
                Row(model, who, base=base, reference=reference, operations=operations)
                for who in (*ours, *theirs)
            ]
            matrices = gather(shapes)
            prepare = {
                who: functools.partial(step, matrices) for who, step in {**ours, **theirs}.items()
            }
            del matrices
            result = race(f"{model}, {framework}", rows, prepare, pace, peers=theirs)
            del prepare
            free()
            yield result
