"""A user's program in JAX: it needs the wheel, jax and optax alone, and type checkers pass it strictly.

`make installed` runs and checks it where nothing else is installed.
"""

import sys

import jax
import jax.numpy as jnp
import optax

import optax_normuon
from optax_normuon import (
    RECIPES,
    MatrixLayout,
    MatrixStack,
    MatrixStage,
    Recipe,
    apply,
    chain_stages,
    describe,
    layout_by_path,
    multipliers_by_path,
    muon,
    normuon,
    on_matrices,
    orthogonality_errors,
    orthogonalize,
    polar_express,
    polar_factor,
    scale_by_normuon,
    to_sphere,
    update_diagnostics,
    with_bf16_remainder,
)

Params = dict[str, dict[str, jax.Array]]


def loss_of(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of a two-layer network; inputs (batch, 8), targets (batch, 4)."""
    hidden = jnp.tanh(inputs @ params["up"]["kernel"])
    return jnp.mean((hidden @ params["down"]["kernel"] + params["down"]["bias"] - targets) ** 2)


def start() -> Params:
    """First parameters, float32."""
    keys = jax.random.split(jax.random.key(0))
    return {
        "up": {"kernel": jax.random.normal(keys[0], (8, 16))},
        "down": {"kernel": jax.random.normal(keys[1], (16, 4)), "bias": jnp.zeros(4)},
    }


def train(tx: optax.GradientTransformationExtraArgs, steps: int) -> tuple[float, float]:
    """Loss at the start and after `steps` steps."""
    params = start()
    inputs, targets = jnp.ones((2, 8)) / 8, jnp.ones((2, 4))
    state = tx.init(params)
    before = float(loss_of(params, inputs, targets))
    for _ in range(steps):
        grads = jax.grad(loss_of)(params, inputs, targets)
        params, state = apply(tx, grads, state, params)
    return before, float(loss_of(params, inputs, targets))


def unit_rows(stack: MatrixStack, state: optax.EmptyState) -> tuple[MatrixStack, optax.EmptyState]:
    """A stage of one's own: every row of every matrix is divided by its norm."""
    squares = stack.sum_over(jnp.square(stack.values), (-1,))
    return stack.with_values(stack.values / jnp.sqrt(squares)), state


def variants() -> list[optax.GradientTransformation]:
    """Public calls as people write them."""
    schedule = optax.cosine_decay_schedule(0.02, 100)
    recipe: Recipe = RECIPES["moonlight"]
    rows = MatrixStage(lambda stack: optax.EmptyState(), unit_rows, takes_shards=True)
    return [
        muon(schedule),
        normuon(
            schedule, recipe=recipe, weight_decay=0.1, lr_mul=multipliers_by_path({"up*": 0.5})
        ),
        normuon(0.02, layout=layout_by_path({"up/*": MatrixLayout(0, 1), "down/bias": None})),
        normuon(0.02, coefficients=polar_express(1e-3, steps=6), compute_dtype=jnp.float32),
        with_bf16_remainder(normuon(0.02, others=optax.lion(1e-4))),
        optax.chain(optax.clip_by_global_norm(1.0), scale_by_normuon(), optax.scale(-0.02)),
        optax.chain(orthogonalize(), to_sphere(0.02)),
        optax.chain(on_matrices(chain_stages(rows, rows)), optax.scale_by_learning_rate(0.1)),
    ]


def figures(params: Params) -> dict[str, float]:
    """What the diagnostics say of one step, by matrix."""
    tx = normuon(0.02)
    updates, state = tx.update(params, tx.init(params), params)
    errors = orthogonality_errors(params, state, params)
    sizes = update_diagnostics(updates, params)
    factor = polar_factor(params["up"]["kernel"], compute_dtype=jnp.float32)
    assert factor.shape == (8, 16)
    sums = {name: float(jnp.max(error)) for name, error in errors.items()}
    return {name: total + float(jnp.max(sizes[name].update_rms)) for name, total in sums.items()}


def main() -> None:
    """Trains a few steps with every variant, and prints the losses."""
    print(describe(start()))
    before, after = train(normuon(0.02, adam_learning_rate=3e-3), steps=5)
    print(f"optax_normuon {optax_normuon.__version__}: loss {before:.3f} -> {after:.3f}")
    assert after < before
    assert all(transformation.init(start()) is not None for transformation in variants())
    assert figures(start())
    foreign = {"torch", "flax", "pytest", "triton"} & {*sys.modules}
    assert not foreign, f"imported though no user of JAX needs it: {foreign}"


if __name__ == "__main__":
    main()
