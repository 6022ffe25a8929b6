"""The largest differences between JAX and PyTorch on this machine: recipe by stage by dtype."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import optax_normuon
import torch_ref
from normuon_core import RECIPES, Recipe
from optax_normuon.matrices.stack import MatrixStack
from optax_normuon.stages.momentum import MomentumState, momentum_stage
from optax_normuon.stages.neuron_norm import NeuronNormState, neuron_norm_stage
from parity_tests.cases import SHAPES, make_trace
from parity_tests.compare import infinity_distance, largest_ulps
from parity_tests.jax_driver import run_jax
from parity_tests.spectra import SPECTRA
from parity_tests.torch_driver import run_torch

DTYPES = ("float64", "float32", "bfloat16", "float16")
"""What the polar factor is computed in; parameters are float64 for float64, else float32."""

STAGES = ("momentum", "polar factor", "neuron norm", "10 steps")

BOUNDS = {
    "momentum": {"float64": 1e-11, "float32": 5e-7, "bfloat16": 5e-7, "float16": 5e-7},
    "polar factor": {"float64": 1e-11, "float32": 4e-4, "bfloat16": 1.8, "float16": 0.22},
    "neuron norm": {"float64": 1e-11, "float32": 1.1e-6, "bfloat16": 1.6e-2, "float16": 2e-3},
    "10 steps": {"float64": 1e-11, "float32": 6e-6, "bfloat16": 1e-4, "float16": 1.2e-5},
}
"""Relative infinity norm: tier T0's for float64, else four times the largest of 160 measured:

float32: momentum 1.2e-7, polar factor 1.1e-4 (rank one, whose rounding errors five steps amplify a
thousandfold), neuron norm 2.7e-7, 10 steps 1.5e-6. float16: polar factor 0.055 (rank one again),
10 steps 3.0e-6. bfloat16 has the same bits in both frameworks on some machines; where it has not, its
rounding is eight times float16's, and so is its bound. Neuron norm in half precision: two roundings of
the largest entry.
"""

SHAPE = (24, 40)


class Row(NamedTuple):
    """One cell of the table; `relative` is the infinity norm's, `bound` what it must not exceed."""

    recipe: str
    stage: str
    dtype: str
    relative: float
    ulps: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound


def count_rows() -> int:
    """How many rows `rows` yields."""
    with_norm = sum(recipe.neuron_norm is not None for recipe in RECIPES.values())
    return len(DTYPES) * (len(RECIPES) * (len(STAGES) - 1) + with_norm)


def rows() -> Iterator[Row]:
    """Every recipe's stages, each fed the same input in both frameworks, and ten whole steps."""
    for name, recipe in RECIPES.items():
        for dtype in DTYPES:
            for stage in STAGES:
                if stage == "neuron norm" and recipe.neuron_norm is None:
                    continue
                relative, ulps = _largest(_COMPARE[stage](recipe, dtype))
                yield Row(name, stage, dtype, relative, ulps, BOUNDS[stage][dtype])


def _largest(pairs) -> tuple[float, float]:
    """The largest relative distance and ulps over (jax, torch) pairs."""
    pairs = list(pairs)
    return (
        max(infinity_distance(ours, theirs) for ours, theirs in pairs),
        max(largest_ulps(ours, theirs) for ours, theirs in pairs),
    )


def _working(dtype: str) -> str:
    return "float64" if dtype == "float64" else "float32"


def _draws(dtype: str) -> Iterator[np.ndarray]:
    for seed, spectrum in enumerate(SPECTRA.values()):
        yield spectrum(np.random.default_rng(seed), *SHAPE).astype(_working(dtype))


def _momentum(recipe: Recipe, dtype: str):
    stage = momentum_stage(recipe.momentum, momentum_dtype=None)
    rule = getattr(torch_ref, f"{recipe.momentum.rule}_momentum")
    count = {"step": 3} if recipe.momentum.rule == "bias_corrected" else {}
    for seed, gradient in enumerate(_draws(dtype)):
        buffer = np.random.default_rng(seed).standard_normal(SHAPE).astype(gradient.dtype)
        ours, state = stage.update(
            jnp.asarray(gradient), MomentumState(jnp.asarray(2, jnp.int32), jnp.asarray(buffer))
        )
        theirs, kept = rule(
            torch.tensor(gradient),
            torch.tensor(buffer),
            momentum=recipe.momentum.momentum,
            nesterov=recipe.momentum.nesterov,
            **count,
        )
        yield np.asarray(ours), theirs.numpy()
        yield np.asarray(optax.tree.get(state, "momentum")), kept.numpy()


def _polar_factor(recipe: Recipe, dtype: str):
    for gradient in _draws(dtype):
        ours = optax_normuon.polar_factor(gradient, compute_dtype=dtype, **vars(recipe.polar))
        theirs = torch_ref.polar_factor(
            torch.tensor(gradient), compute_dtype=getattr(torch, dtype), **vars(recipe.polar)
        )
        yield np.asarray(ours.astype(dtype)), _as_array(theirs)


def _neuron_norm(recipe: Recipe, dtype: str):
    stage = neuron_norm_stage(**vars(recipe.neuron_norm))
    shape = (1, *SHAPE)
    for seed, v in enumerate(_draws(dtype)):
        v = (v / max(np.abs(v).max(), 1e-30)).reshape(shape)
        stack = MatrixStack(jnp.asarray(v), -2)
        zeros = stage.init(stack).second_moment
        moment = np.random.default_rng(seed).random(zeros.shape).astype(zeros.dtype)
        stack = MatrixStack(jnp.asarray(v).astype(dtype), -2)
        ours, state = stage.update(stack, NeuronNormState(jnp.asarray(moment)))
        theirs, kept = torch_ref.normalize_neurons(
            torch.tensor(v).to(getattr(torch, dtype)),
            torch.tensor(moment),
            **vars(recipe.neuron_norm),
        )
        yield np.asarray(ours.values), _as_array(theirs)
        yield np.asarray(state.second_moment), kept.numpy()


def _ten_steps(recipe: Recipe, dtype: str):
    shapes = {name: SHAPES[name] for name in ("tall", "wide")}
    trace = make_trace(recipe, steps=10, shapes=shapes, spectra=("gaussian", "one huge row"))
    ours = run_jax(trace, dtype=np.dtype(_working(dtype)), compute_dtype=jnp.dtype(dtype))
    theirs = run_torch(
        trace, dtype=getattr(torch, _working(dtype)), compute_dtype=getattr(torch, dtype)
    )
    for name in shapes:
        yield ours[name].params, theirs[name].params.astype(ours[name].params.dtype)


_COMPARE = {
    "momentum": _momentum,
    "polar factor": _polar_factor,
    "neuron norm": _neuron_norm,
    "10 steps": _ten_steps,
}


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    """In the tensor's own dtype, bfloat16 included."""
    dtype = jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    return tensor.double().numpy().astype(dtype)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import platform

    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
    }
