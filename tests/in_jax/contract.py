"""The leaves on which Optax's contract is tested: a matrix, a stack of matrices and a vector.

Optax's own contract tests use vectors, which would exercise AdamW alone. Most tests run eagerly on one
set of shapes, so that all of them share what XLA compiled for the first. Those that need `jit` iterate
in float32, which compiles in half the time of bfloat16.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import optax_normuon
from optax_normuon import MatrixLayout, with_bf16_remainder
from tests.in_jax.engines import KERNELS
from tests.in_jax.trees import at, random_tree

SHAPES = {"blocks": {"up": {"kernel": (3, 6, 7)}}, "dense": {"bias": (6,), "kernel": (7, 6)}}
LAYOUT = {"blocks": MatrixLayout(-2, -1), "dense": {"bias": None, "kernel": MatrixLayout(0, 1)}}
SPLIT = {
    "blocks": MatrixLayout(-2, -1, output_splits=(3, 2, 2)),
    "dense": {"bias": None, "kernel": MatrixLayout(0, 1)},
}
LEAVES = [("blocks", "up", "kernel"), ("dense", "bias"), ("dense", "kernel")]

OPTIMIZERS = {
    "normuon": lambda **keywords: optax_normuon.normuon(0.1, weight_decay=0.1, **keywords),
    "muon": lambda **keywords: optax_normuon.muon(0.1, weight_decay=0.1, **keywords),
    "scale_by_normuon": optax_normuon.scale_by_normuon,
}

STAGES = {
    "lerp_momentum": lambda layout=None: optax_normuon.lerp_momentum(),
    "heavy_ball_momentum": lambda layout=None: optax_normuon.heavy_ball_momentum(),
    "bias_corrected_momentum": lambda layout=None: optax_normuon.bias_corrected_momentum(),
    "lerp_momentum in int8": functools.partial(optax_normuon.lerp_momentum, momentum_dtype="int8"),
    "equilibrate_rows": optax_normuon.equilibrate_rows,
    "orthogonalize": optax_normuon.orthogonalize,
    "set_norm": optax_normuon.set_norm,
    "normalize_neurons": optax_normuon.normalize_neurons,
    "add_cautious_weight_decay": lambda **keywords: optax_normuon.add_cautious_weight_decay(
        0.1, **keywords
    ),
    "scale_by_shape": optax_normuon.scale_by_shape,
}

SPHERES = {
    "to_sphere": lambda **keywords: optax_normuon.to_sphere(0.1, **keywords),
    "to_sphere by the first norms": lambda **keywords: optax_normuon.to_sphere(
        0.1, path="retraction", angle="tangent", radius=None, **keywords
    ),
    "to_hyperball": lambda **keywords: optax_normuon.to_hyperball(0.1, **keywords),
    "project_to_sphere": optax_normuon.project_to_sphere,
    "project_to_tangent": optax_normuon.project_to_tangent,
}


def remainder(**keywords):
    return with_bf16_remainder(optax_normuon.normuon(0.1, **keywords))


BY_KERNELS = {
    f"{name} by kernels": functools.partial(make, **KERNELS)
    for name, make in {
        **OPTIMIZERS,
        "orthogonalize": optax_normuon.orthogonalize,
        "with_bf16_remainder": remainder,
    }.items()
}
TRANSFORMATIONS = {
    **OPTIMIZERS,
    **STAGES,
    **SPHERES,
    "with_bf16_remainder": remainder,
    **BY_KERNELS,
}


def draw(seed, dtype=jnp.float32) -> Any:
    """A tree with a stack of three matrices, a matrix and a vector."""
    return random_tree(SHAPES, seed, dtype)


def one_step(tx, gradients, params) -> Any:
    """Updates and state after the first step."""
    return tx.update(gradients, tx.init(params), params)


def run(tx, params, gradients, **extra_args) -> Any:
    """Parameters and state after one step a gradient tree."""
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def without(tree, path, value=None) -> Any:
    """The tree with `value` where `path` leads."""
    if not path:
        return value
    return {**tree, path[0]: without(tree[path[0]], path[1:], value)}


def leaves_that_differ(left, right):
    """Paths of SHAPES's leaves that differ by more than rounding; the others must be bit-equal."""
    differ = []
    for path in LEAVES:
        pair = [np.asarray(at(tree, path), np.float32) for tree in (left, right)]
        if np.array_equal(*pair):
            continue
        assert not np.allclose(*pair, rtol=1e-4, atol=1e-5), f"{path} differs by rounding alone"
        differ.append(path)
    return differ
