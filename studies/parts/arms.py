"""The arms: Muon with each of three parts or without it, AdamW, and a random mask as control."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_normuon
from examples.optimizers import compute_dtype, is_matrix
from normuon_core.polynomials import NEWTON_SCHULZ
from normuon_core.recipes import Decay, NeuronNorm, Polar, Recipe
from optax_normuon import RECIPES
from studies.search import Axis
from studies.training import MakeOptimizer, Values, to_zero

NAMES = ("rate", "adam_rate", "decay")
"""Of a trial: the peak rate of the matrices, that of the AdamW for the rest, the matrices' decay."""

CLIP = 1.0
_NEWTON_SCHULZ = Polar(NEWTON_SCHULZ, norm_scale=1.0, eps=1e-7, eps_rule="add")


class Parts(NamedTuple):
    """Which parts an arm has beyond Muon with five Newton-Schulz steps and plain weight decay."""

    polar_express: bool
    neuron_norm: bool
    cautious: bool

    @property
    def recipe(self) -> Recipe:
        return dataclasses.replace(
            RECIPES["muon"],
            polar=Polar() if self.polar_express else _NEWTON_SCHULZ,
            neuron_norm=NeuronNorm() if self.neuron_norm else None,
            decay=Decay(cautious=self.cautious),
        )


OF_MUON = {
    "Muon": Parts(False, False, False),
    "all": Parts(True, True, True),
    "+ Polar Express": Parts(True, False, False),
    "+ NorMuon": Parts(False, True, False),
    "+ cautious decay": Parts(False, False, True),
    "all but Polar Express": Parts(False, True, True),
    "all but NorMuon": Parts(True, False, True),
    "all but cautious decay": Parts(True, True, False),
}
ADAMW, RANDOM = "AdamW", "all, random mask"
ORDER = (ADAMW, *OF_MUON, RANDOM)
GROUPS = (ORDER[:3], ORDER[3:6], ORDER[6:9], ORDER[9:])
"""What decides most is run first."""


def axes(arm: str) -> tuple[Axis, ...]:
    """Where tuning starts."""
    rate = 0.004 if arm == ADAMW else 0.02
    return (
        Axis("rate", rate),
        Axis("adam_rate", 0.008),
        Axis("decay", 0.05, factor=4.0, floor=-1),
    )


def optimizers() -> dict[str, MakeOptimizer]:
    """By arm, in the order in which arms are run."""
    made = {arm: _muon(parts.recipe) for arm, parts in OF_MUON.items()}
    return {ADAMW: _adamw, **made, RANDOM: _random_mask(OF_MUON["all"].recipe)}


def _adamw(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
    """AdamW with two rates too: the same numbers are tuned in every arm."""
    del seed
    matrices = adamw(to_zero(values["rate"], steps), values["decay"])
    return _clipped(_on_matrices(matrices, values, steps))


def _muon(recipe: Recipe) -> MakeOptimizer:
    def make(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        del seed
        return _clipped(
            optax_normuon.normuon(
                to_zero(values["rate"], steps),
                recipe=recipe,
                weight_decay=values["decay"],
                adam_learning_rate=to_zero(values["adam_rate"], steps),
                compute_dtype=compute_dtype(),
                backend="xla",
            )
        )

    return make


def _random_mask(recipe: Recipe) -> MakeOptimizer:
    """The recipe, but the entries that decay are drawn, as many as its mask would have let decay."""

    def make(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        matrices = optax.chain(
            optax_normuon.scale_by_normuon(
                recipe=recipe, compute_dtype=compute_dtype(), backend="xla"
            ),
            add_randomly_masked_decay(values["decay"], seed),
            optax_normuon.scale_by_shape(recipe.shape_scale),
            optax.scale_by_learning_rate(to_zero(values["rate"], steps)),
        )
        return _clipped(_on_matrices(matrices, values, steps))

    return make


def add_randomly_masked_decay(
    weight_decay: jax.Array, seed: jax.Array
) -> optax.GradientTransformation:
    """Cautious decay's control: adds weight_decay p at drawn entries of each leaf.

    A leaf's share of them is, step by step, that of the entries whose update agrees with the parameter
    in sign, which cautious decay would have taken.
    """

    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        leaves, tree = jax.tree.flatten(updates)
        key = jax.random.fold_in(jax.random.key(seed), state.count)
        keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))

        def decayed(v: jax.Array, p: jax.Array, key: jax.Array) -> jax.Array:
            share = (jnp.sign(v) * jnp.sign(p) >= 0).mean(dtype=jnp.float32)
            drawn = jax.random.uniform(key, v.shape) < share
            return v + jnp.where(drawn, weight_decay.astype(v.dtype) * p, jnp.zeros_like(p))

        new = map(decayed, leaves, tree.flatten_up_to(params), keys)
        count = optax.safe_increment(state.count)
        return tree.unflatten(list(new)), optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)


def adamw(rate: optax.Schedule, weight_decay: jax.Array | float) -> optax.GradientTransformation:
    """AdamW with the betas and epsilon that `normuon` has for what is no matrix."""
    return optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=weight_decay)


def _on_matrices(
    matrices: optax.GradientTransformation, values: Values, steps: jax.Array
) -> optax.GradientTransformation:
    """That for the blocks' matrices, and AdamW without decay for the rest."""
    rest = adamw(to_zero(values["adam_rate"], steps), 0.0)
    return optax.partition({"matrices": matrices, "rest": rest}, _labels)


def _labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "matrices" if is_matrix(path) else "rest", params
    )


def _clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(CLIP), tx)
