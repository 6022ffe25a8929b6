"""A stage on matrices is given parts of them only if it says that it can work on parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from normuon_core import POLYNOMIALS, RECIPES, Polar
from normuon_core.placement import Placement
from optax_normuon import MatrixLayout, MatrixStage, chain_stages, on_matrices
from optax_normuon.stages.neuron_norm import neuron_norm_stage
from optax_normuon.stages.norm_setting import norm_setting_stage
from optax_normuon.stages.orthogonalization import orthogonalization_stage
from optax_normuon.stages.row_equilibration import equilibrated
from tests.in_jax.meshes import collectives, mesh_of

# A single matrix, so wide that the polar factor alone is best made of its parts as they lie.
X = np.random.default_rng(0).standard_normal((32, 2048)).astype(np.float32)


def unit_rows(stack, state):
    """A norm along the inputs, which is wrong of a part of them."""
    norms = jnp.linalg.norm(stack.values, axis=-1, keepdims=True)
    return stack.with_values(stack.values / norms), state


def unit_rows_of_shards(stack, state):
    squares = stack.sum_over(jnp.square(stack.values), (-1,))
    return stack.with_values(stack.values / jnp.sqrt(squares)), state


def nothing(stack):
    return optax.EmptyState()


POLAR = orthogonalization_stage(
    **vars(RECIPES["normuon"].polar), compute_dtype=jnp.float32, algorithm="auto", backend="xla"
)
AOL = orthogonalization_stage(
    **vars(Polar(POLYNOMIALS["aol"], preconditioning="aol")),
    compute_dtype=jnp.float32,
    algorithm="auto",
    backend="xla",
)
NEURONS = neuron_norm_stage(**vars(RECIPES["normuon"].neuron_norm))
IGNORANT = MatrixStage(nothing, unit_rows)
AWARE = MatrixStage(nothing, unit_rows_of_shards, takes_shards=True)


def run(stage, mesh=None):
    tx = on_matrices(stage, layout=MatrixLayout(0, 1))
    x = {"w": jnp.asarray(X)}
    if mesh is not None:
        x = {"w": jax.device_put(X, NamedSharding(mesh, jax.P(None, "f")))}
    step = jax.jit(lambda x: tx.update(x, tx.init(x))[0])
    text = step.lower(x).compile().as_text()
    return np.asarray(step(x)["w"]), {name for name, _, _ in collectives(text)}


@pytest.mark.parametrize(
    ("stages", "stays"),
    [
        ([POLAR], True),
        ([AOL], True),
        ([POLAR, NEURONS], True),
        ([POLAR, AWARE], True),
        ([equilibrated(POLAR, 1e-6), norm_setting_stage(1e-6)], True),
        ([equilibrated(IGNORANT, 1e-6)], False),
        ([AWARE], False),
        ([IGNORANT], False),
        ([POLAR, IGNORANT], False),
        ([IGNORANT, POLAR], False),
        ([NEURONS, IGNORANT], False),
        ([POLAR, NEURONS, IGNORANT], False),
    ],
)
def test_a_chain_stays_divided_only_if_all_of_its_stages_can(stages, stays):
    chain = chain_stages(*stages)
    one, _ = run(chain)
    many, moved = run(chain, mesh_of(f=8))
    # 9.9e-7 at most, of entries up to 0.1.
    np.testing.assert_allclose(many, one, rtol=0, atol=4e-6)
    assert ("all-to-all" not in moved) == stays


def test_a_stage_that_asks_for_shards_without_taking_them_is_refused():
    def place(spread, may_stay):
        return Placement("shards", 1, spread.count, 0, 0.0, 0.0)

    with pytest.raises(ValueError, match="as shards without `takes_shards`"):
        run(MatrixStage(nothing, unit_rows, place=place), mesh_of(f=8))
