"""The optimizers under comparison, with the same clipping and the same learning-rate shape."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import optax_normuon
from examples.mesh import on_mesh, parameter_shardings

WARMUP = 0.05  # fractions of the steps
DECAY = 0.6


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak learning rates. `adam_learning_rate` is that of the AdamW beside Muon or NorMuon, for
    embedding, head and norms; AdamW alone has one rate for everything and leaves it None."""

    learning_rate: float
    adam_learning_rate: float | None = None


def decay_to_zero(peak: float, steps: int) -> optax.Schedule:
    """Linear warmup, constant, then linear to zero at the last step."""
    warmup, decay = max(1, round(WARMUP * steps)), round(DECAY * steps)
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warmup, peak, warmup - 1),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, decay),
        ],
        [warmup - 1, steps - decay],
    )


def adamw(rates: Rates, steps: int, mesh: Mesh | None) -> optax.GradientTransformation:
    """AdamW on every parameter, with the betas and epsilon that it has beside Muon too."""
    del mesh  # elementwise: every part of a parameter has all that it needs
    rate = decay_to_zero(rates.learning_rate, steps)
    return optax.adamw(rate, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.0)


def muon(rates: Rates, steps: int, mesh: Mesh | None) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks, AdamW on the rest."""
    return optax_normuon.muon(**_matrix_optimizer_keywords(rates, steps, mesh))


def normuon(rates: Rates, steps: int, mesh: Mesh | None) -> optax.GradientTransformation:
    """NorMuon on the matrices of the blocks, AdamW on the rest."""
    return optax_normuon.normuon(**_matrix_optimizer_keywords(rates, steps, mesh))


OPTIMIZERS: dict[str, Callable[[Rates, int, Mesh | None], optax.GradientTransformation]] = {
    "adamw": adamw,
    "muon": muon,
    "normuon": normuon,
}


@functools.cache
def clipped(
    name: str, rates: Rates, steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """The optimizer of that name behind a clipped gradient.

    Asked for again it is the same object, so that runs of other seeds find their step compiled.
    """
    chain = optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name](rates, steps, mesh))
    return chain if mesh is None else on_mesh(chain, mesh)


def _matrix_optimizer_keywords(rates: Rates, steps: int, mesh: Mesh | None) -> dict:
    if rates.adam_learning_rate is None:
        raise ValueError(f"{rates} lacks the rate of the AdamW beside Muon or NorMuon.")
    # On CPUs the update takes longer in bfloat16 than in float32: no faster products, more casts.
    on_cpu = jax.default_backend() == "cpu"
    return dict(
        learning_rate=decay_to_zero(rates.learning_rate, steps),
        adam_learning_rate=decay_to_zero(rates.adam_learning_rate, steps),
        compute_dtype=jnp.float32 if on_cpu else None,
        param_specs=None if mesh is None else functools.partial(parameter_shardings, mesh=mesh),
    )
