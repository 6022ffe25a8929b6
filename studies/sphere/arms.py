"""The arms: ways to hold nGPT's weights on their spheres, directions for them, and controls."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_normuon
from examples.ngpt import sphere_axes
from examples.spheres import Angle, Path, along_spheres, by_kind, matrix_direction
from normuon_core.polynomials import CUBIC
from normuon_core.recipes import NeuronNorm, NormSetting, Recipe
from optax_normuon import RECIPES
from studies.search import Axis
from studies.training import MakeOptimizer, Values, to_zero

NAMES = ("rate", "adam_rate", "decay", "every")
"""Of a trial: the peak rate of the matrices, that of the Adam for embedding, head and vectors, the
matrices' weight decay, and the steps from one projection to the next (0 is 1)."""

MUON = RECIPES["muon"]
_EQUAL_RMS = dataclasses.replace(MUON, norm_setting=NormSetting())


class Arm(NamedTuple):
    """How the matrices move.

    Attributes:
      direction: a recipe's; None is Adam's.
      decays: whether a decay is tuned; the recipe says that it is cautious.
    """

    direction: Recipe | None
    path: Path
    angle: Angle = "tangent"
    decays: bool = False


_NORMUON = dataclasses.replace(MUON, neuron_norm=NeuronNorm())
PROJECTION, GEODESIC, RETRACTION, FROZEN = "projection", "geodesic", "retraction", "frozen"
OF_SPHERES = {
    PROJECTION: Arm(MUON, "projection"),
    GEODESIC: Arm(MUON, "geodesic"),
    RETRACTION: Arm(MUON, "retraction"),
    "geodesic, angle = rate": Arm(MUON, "geodesic", "rate"),
    "hyperball (MuonH)": Arm(MUON, "hyperball"),
    "hyperball (NorMuonH)": Arm(_NORMUON, "hyperball"),
    "Adam": Arm(None, "projection"),
    "+ second moment": Arm(_NORMUON, "projection"),
    "+ cautious decay": Arm(MUON, "projection", decays=True),
    "+ both": Arm(_NORMUON, "projection", decays=True),
    "cubic, equal RMS": Arm(_EQUAL_RMS.override(coefficients=CUBIC), "projection"),
    "Polar Express, equal RMS": Arm(_EQUAL_RMS, "projection"),
}
GROUPS = (
    (PROJECTION, GEODESIC, FROZEN),
    (RETRACTION, "geodesic, angle = rate", "hyperball (MuonH)"),
    ("Adam", "+ second moment", "hyperball (NorMuonH)"),
    ("+ cautious decay", "+ both"),
    ("cubic, equal RMS", "Polar Express, equal RMS"),
)
"""Arms that are tuned; what decides most is run first."""
ORDER = tuple(arm for group in GROUPS for arm in group)

UPHILL, DOWNHILL = "w cos θ + u sin θ", "w cos θ − u sin θ"
"""Not tuned: a rule that was published as geodesic, and the same with the sign of descent. u is the
direction of ascent, neither tangent nor of unit length."""

SWEPT = (PROJECTION, GEODESIC, RETRACTION, "hyperball (MuonH)", "Adam")
"""Arms whose loss is drawn over the rate."""


def axes(arm: str) -> tuple[Axis, ...]:
    """Where tuning starts."""
    adam = Axis("adam_rate", 0.016)
    if arm == FROZEN:
        return (adam,)
    found = (Axis("rate", 0.002 if arm == "Adam" else 0.02), adam)
    if OF_SPHERES[arm].decays:
        found = (*found, Axis("decay", 0.1, factor=4.0, floor=-1))
    return found


def optimizers() -> dict[str, MakeOptimizer]:
    """By arm."""
    made = {name: _on_spheres(arm) for name, arm in OF_SPHERES.items()}
    return made | {FROZEN: _frozen, UPHILL: _published_rule(+1.0), DOWNHILL: _published_rule(-1.0)}


def _on_spheres(arm: Arm) -> MakeOptimizer:
    def make(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        del seed
        matrices = along_spheres(
            _direction(arm.direction, values["decay"]),
            to_zero(values["rate"], steps, warmup=0.0),
            path=arm.path,
            angle=arm.angle,
            project_every=_every(values),
        )
        return _with_the_rest(matrices, values, steps)

    return make


def _frozen(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
    """The control: embedding, head and vectors learn around random matrices."""
    del seed
    return _with_the_rest(optax.set_to_zero(), values, steps)


def _published_rule(sign: float) -> MakeOptimizer:
    """w <- w cos θ + sign u sin θ with θ the rate, and a projection every so many steps."""

    def make(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        del seed
        every = _every(values)
        project = optax.conditionally_transform(
            optax_normuon.project_to_sphere(axis=sphere_axes("embedding")),
            lambda step, **_: jnp.asarray(step, jnp.float32) % every == 0,
        )
        turn = _turn_without_tangent(to_zero(values["rate"], steps, warmup=0.0), sign)
        matrices = optax.chain(_direction(MUON, values["decay"]), turn, project)
        return _with_the_rest(matrices, values, steps)

    return make


def _turn_without_tangent(rate: optax.Schedule, sign: float) -> optax.GradientTransformation:
    def init(params):
        del params
        return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        angle = jnp.asarray(rate(state.count), jnp.float32)

        def turned(u: jax.Array, p: jax.Array) -> jax.Array:
            cos, sin = jnp.cos(angle).astype(p.dtype), jnp.sin(angle).astype(p.dtype)
            return (cos - 1) * p + sign * sin * u

        count = optax.safe_increment(state.count)
        return jax.tree.map(turned, updates, params), optax.ScaleByScheduleState(count)

    return optax.GradientTransformation(init, update)


def _every(values: Values) -> jax.Array:
    return jnp.maximum(values["every"], 1.0)


def _direction(recipe: Recipe | None, decay: jax.Array) -> optax.GradientTransformation:
    if recipe is None:
        return _adam()
    return matrix_direction(recipe, weight_decay=decay, backend="xla")


def _with_the_rest(
    matrices: optax.GradientTransformation, values: Values, steps: jax.Array
) -> optax.GradientTransformation:
    """Embedding and head by Adam and projection, vectors by Adam: the same in every arm."""
    rate = to_zero(values["adam_rate"], steps, warmup=0.0)
    return by_kind(
        matrices=matrices,
        tables=along_spheres(_adam(), rate, path="projection"),
        vectors=optax.chain(_adam(), optax.scale_by_learning_rate(rate)),
    )


def _adam() -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=0.9, b2=0.95, eps=1e-10)
