"""The arms of fine-tuning, one program each: a trial's numbers choose base, rates, scale and decay."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_normuon
from examples.optimizers import compute_dtype, is_matrix
from normuon_core.polynomials import NEWTON_SCHULZ
from normuon_core.recipes import Decay, NeuronNorm, Polar, Recipe
from normuon_core.shape_rules import ShapeRule, shape_factor
from optax_normuon import RECIPES, MatrixLayout, with_bf16_remainder
from studies.training import MakeOptimizer, Values, to_zero

NAMES = ("base", "rate", "adam_rate", "scale", "decay")
"""Of a trial: which base (a place in BASES), the peak rates of the matrices and of the AdamW for the
rest, which shape scale (a place in SCALES), and the matrices' weight decay."""

BASES = ("AdamW", "NorMuon")
SCALES: tuple[ShapeRule, ...] = ("none", "original", "match_rms_adamw", "max_dim")

ADAMW, MUON, NORMUON = "AdamW", "Muon", "NorMuon"
CAUTIOUS, EVERYTHING = "NorMuon, cautious decay", "Muon on everything"
OPTIMIZERS = (ADAMW, MUON, NORMUON)
BF16, REMAINDER = ", bf16", ", bf16 with remainder"
ORDER = (
    *OPTIMIZERS,
    CAUTIOUS,
    EVERYTHING,
    *(name + kind for name in OPTIMIZERS for kind in (BF16, REMAINDER)),
)

CLIP = 1.0
RMS_OF_ADAMW = 0.3
"""Of an AdamW update over its rate, about: the size that was asked for. Rows have the measured one."""
RMS_OF_MUON = 0.2
"""The same with the shape scale `match_rms_adamw`."""

_MUON = dataclasses.replace(
    RECIPES["muon"],
    polar=Polar(NEWTON_SCHULZ, norm_scale=1.0, eps=1e-7, eps_rule="add"),
    decay=Decay(cautious=False, inside_scale=False),
    shape_scale="none",
)
_NORMUON = dataclasses.replace(_MUON, neuron_norm=NeuronNorm())
_CAUTIOUS = dataclasses.replace(_NORMUON, decay=Decay(cautious=True, inside_scale=False))


def at_size(arm: str, rms: float) -> dict[str, float]:
    """The numbers with which an arm's matrices get updates of that root mean square at the peak.

    The rest is trained by AdamW with the rate that gives AdamW's matrices that size, in every arm.
    """
    adam_rate = rms / RMS_OF_ADAMW
    if arm.startswith(ADAMW):
        return {"rate": adam_rate, "adam_rate": adam_rate}
    return {
        "rate": rms / RMS_OF_MUON,
        "adam_rate": adam_rate,
        "scale": SCALES.index("match_rms_adamw"),
    }


def optimizers() -> dict[str, MakeOptimizer]:
    """By arm."""
    plain = {ADAMW: _adamw, MUON: _matrices(_MUON), NORMUON: _matrices(_NORMUON)}
    kept = {name + REMAINDER: _with_remainder(make) for name, make in plain.items()}
    lost = {name + BF16: make for name, make in plain.items()}
    others = {CAUTIOUS: _matrices(_CAUTIOUS), EVERYTHING: _everything}
    made = {**plain, **others, **kept, **lost}
    return {arm: _clipped(made[arm]) for arm in ORDER}


def first_dtype(arm: str) -> Callable[[Any], Any]:
    """What an arm makes of its base's float32 weights."""
    if not arm.endswith((BF16, REMAINDER)):
        return lambda params: params
    return lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def _adamw(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
    """All state in float32, of whatever dtype the weights are."""
    del seed
    return optax_normuon.normuon(
        0.0,
        layout=lambda params: jax.tree.map(lambda _: None, params),
        adam_learning_rate=to_zero(values["adam_rate"], steps),
    )


def _matrices(recipe: Recipe) -> MakeOptimizer:
    def make(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        del seed
        return optax_normuon.normuon(
            to_zero(values["rate"], steps),
            recipe=recipe,
            weight_decay=values["decay"],
            lr_mul=lambda params: _shape_scales(params, values["scale"]),
            adam_learning_rate=to_zero(values["adam_rate"], steps),
            compute_dtype=compute_dtype(),
            backend="xla",
        )

    return make


def _shape_scales(params, scale: jax.Array):
    """The factor of each matrix (in, out) by the chosen rule; 1 for what is no matrix."""

    def factor(path, x):
        if not is_matrix(path):
            return jnp.ones([], jnp.float32)
        inputs, outputs = x.shape
        factors = [shape_factor(rule, outputs, inputs) for rule in SCALES]
        return jnp.asarray(factors, jnp.float32)[scale.astype(jnp.int32)]

    return jax.tree_util.tree_map_with_path(factor, params)


def _everything(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
    """Embedding and head orthogonalized too, and plain SGD on the norms, at the matrices' rate."""
    del seed
    sides = MatrixLayout(reduction_axis=-2, output_axis=-1)
    rate = to_zero(values["rate"], steps)
    return optax_normuon.normuon(
        rate,
        recipe=dataclasses.replace(_MUON, shape_scale="match_rms_adamw"),
        layout=lambda params: jax.tree.map(lambda x: sides if x.ndim == 2 else None, params),
        others=optax.sgd(rate),
        compute_dtype=compute_dtype(),
        backend="xla",
    )


def _with_remainder(make: MakeOptimizer) -> MakeOptimizer:
    def wrapped(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        return with_bf16_remainder(make(values, steps, seed))

    return wrapped


def _clipped(make: MakeOptimizer) -> MakeOptimizer:
    def wrapped(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        return optax.chain(optax.clip_by_global_norm(CLIP), make(values, steps, seed))

    return wrapped
