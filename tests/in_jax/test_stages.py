"""Each stage alone: momentum, neuron normalization, cautious decay, shape scaling."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optax_normuon import (
    MatrixLayout,
    add_cautious_weight_decay,
    bias_corrected_momentum,
    heavy_ball_momentum,
    lerp_momentum,
    normalize_neurons,
    scale_by_shape,
)

OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def run(tx, gradients, params=None):
    """All updates of a transformation, and its last state."""
    state = tx.init(gradients[0] if params is None else params)
    updates = []
    for gradient in gradients:
        update, state = tx.update(gradient, state, params)
        updates.append(update)
    return updates, state


@pytest.mark.parametrize("nesterov", [True, False])
def test_heavy_ball_is_optax_trace(nesterov):
    gradients = [draw(seed, 3, 4) for seed in range(4)]
    ours, _ = run(heavy_ball_momentum(0.9, nesterov=nesterov), gradients)
    theirs, _ = run(optax.trace(0.9, nesterov=nesterov), gradients)
    other, _ = run(heavy_ball_momentum(0.9, nesterov=not nesterov), gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)
    assert not np.allclose(ours[-1], other[-1], rtol=1e-3)


def test_lerp_is_an_exponential_mean_from_zero():
    gradients = [draw(seed, 3, 4) for seed in range(4)]
    ours, state = run(lerp_momentum(0.9, nesterov=False), gradients)
    theirs, _ = run(optax.ema(0.9, debias=False), gradients)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert state.count == 4


def test_bias_corrected_momentum_starts_at_the_gradient():
    (first,), _ = run(bias_corrected_momentum(0.9, nesterov=False), [draw(0, 3, 4)])
    chex.assert_trees_all_close(first, draw(0, 3, 4), rtol=1e-6)
    (lerp,), _ = run(lerp_momentum(0.9, nesterov=False), [draw(0, 3, 4)])
    assert not np.allclose(lerp, first, rtol=0.1)


def test_momentum_of_half_precision_is_kept_and_handed_on_in_float32():
    gradient = draw(0, 3, 4).astype(jnp.bfloat16)
    (update,), state = run(lerp_momentum(), [gradient])
    chex.assert_type([update, state.momentum], [jnp.float32, jnp.float32])
    (update,), state = run(lerp_momentum(momentum_dtype=jnp.bfloat16), [gradient])
    chex.assert_type([update, state.momentum], [jnp.float32, jnp.bfloat16])


seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=25, deadline=None)


@few
@given(seed=seeds, steps=st.integers(1, 4), axis=st.sampled_from(["output", "input", "longer"]))
def test_normalization_keeps_each_matrix_norm(seed, steps, axis):
    """Largest relative difference of the norms in 300 draws: 2.4e-7."""
    gradients = [draw((seed, step), 2, 6, 4) for step in range(steps)]
    updates, _ = run(normalize_neurons(axis=axis, layout=OUT_IN), gradients)
    norms = [jnp.linalg.norm(x, axis=(-2, -1)) for x in (updates[-1], gradients[-1])]
    chex.assert_trees_all_close(*norms, rtol=1e-6)
    assert not np.allclose(updates[-1], gradients[-1], rtol=1e-2)


@pytest.mark.parametrize(
    ("shape", "axis", "kept"),
    [
        ((6, 4), "output", (6, 1)),
        ((6, 4), "input", (1, 4)),
        ((6, 4), "longer", (6, 1)),
        ((4, 6), "longer", (1, 6)),
        ((5, 5), "longer", (5, 1)),
        ((3, 6, 4), "output", (3, 6, 1)),
    ],
)
def test_the_second_moment_has_the_leafs_rank_and_one_number_a_neuron(shape, axis, kept):
    tx = normalize_neurons(axis=axis, layout=OUT_IN)
    state = tx.init(draw(0, *shape))
    chex.assert_shape(state.second_moment, kept)
    _, state = tx.update(draw(0, *shape), state)
    chex.assert_shape(state.second_moment, kept)


def test_the_output_axis_is_the_layouts_and_not_the_storages():
    x = draw(0, 6, 4)
    out_in, _ = run(normalize_neurons(layout=OUT_IN), [x])
    in_out, _ = run(normalize_neurons(layout=MatrixLayout(-2, -1)), [x.T])
    wrong, _ = run(normalize_neurons(layout=OUT_IN), [x.T])
    chex.assert_trees_all_close(in_out[0].T, out_in[0], rtol=1e-6)
    assert not np.allclose(wrong[0].T, out_in[0], rtol=1e-2)


def test_a_neuron_that_was_never_fed_stays_still():
    x = draw(0, 6, 4).at[2].set(0.0)
    updates, _ = run(normalize_neurons(layout=OUT_IN), [x, x])
    chex.assert_trees_all_equal(updates[-1][2], jnp.zeros(4))
    assert np.isfinite(updates[-1]).all()


def test_the_second_moment_does_not_feel_a_later_scale():
    """Learning rate, decay and shape scale stand behind it."""
    x = [draw(seed, 6, 4) for seed in range(3)]
    alone, first = run(normalize_neurons(layout=OUT_IN), x)
    chained, state = run(optax.chain(normalize_neurons(layout=OUT_IN), optax.scale(7.0)), x)
    chex.assert_trees_all_equal(first, state[0])
    chex.assert_trees_all_close(chained[-1], 7.0 * alone[-1])


def decayed(update, param, **keywords):
    tx = add_cautious_weight_decay(0.5, **keywords)
    result, _ = tx.update(jnp.asarray(update), tx.init(jnp.asarray(param)), jnp.asarray(param))
    return result.tolist()


def test_decay_is_added_where_update_and_parameter_agree_zero_included():
    update = [1.0, 1.0, -1.0, 0.0, 0.0, 2.0]
    param = [2.0, -2.0, -2.0, 2.0, -2.0, 0.0]
    assert decayed(update, param) == [2.0, 1.0, -2.0, 1.0, -1.0, 2.0]
    assert decayed(update, param, cautious=False) == [2.0, 0.0, -2.0, 1.0, -1.0, 2.0]


def test_the_mask_does_not_feel_underflow():
    """1e-30 times -1e-30 is zero in float32, and zero would count as agreement."""
    assert decayed([1e-30], [-1e-30]) == [np.float32(1e-30)]


def test_in_terms_of_optax_updates_the_mask_is_the_negated_one():
    update, param = draw(0, 6, 4), draw(1, 6, 4)
    tx = optax.chain(add_cautious_weight_decay(0.5), optax.scale_by_learning_rate(0.1))
    negated, _ = tx.update(update, tx.init(param), param)
    by_sign = -0.1 * (update + 0.5 * jnp.where(-0.1 * update * param <= 0, param, 0))
    chex.assert_trees_all_close(negated, by_sign, rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "tall", "wide"),
    [
        ("original", 3**0.5, 1.0),
        ("match_rms_adamw", 0.2 * 12**0.5, 0.2 * 12**0.5),
        ("spectral", 3**0.5, 3**-0.5),
        ("max_dim", 12**0.5, 12**0.5),
        ("none", 1.0, 1.0),
    ],
)
def test_every_shape_rule_has_its_factor(rule, tall, wide):
    """(out, in) = (12, 4) and (4, 12)."""
    for shape, factor in [((12, 4), tall), ((4, 12), wide)]:
        updates, _ = run(scale_by_shape(rule, layout=OUT_IN), [jnp.ones(shape)])
        chex.assert_trees_all_close(updates[0], jnp.full(shape, factor), rtol=1e-6)


def test_rms_gives_each_matrix_the_root_mean_square_of_adamw():
    x = draw(0, 3, 12, 4) * jnp.asarray([1.0, 10.0, 0.1])[:, None, None]
    (update,), _ = run(scale_by_shape("rms", layout=OUT_IN), [x])
    chex.assert_trees_all_close(
        jnp.sqrt(jnp.mean(update**2, (-2, -1))), jnp.full(3, 0.2), rtol=1e-6
    )
    zeros, _ = run(scale_by_shape("rms", layout=OUT_IN), [jnp.zeros((4, 4))])
    chex.assert_trees_all_equal(zeros[0], jnp.zeros((4, 4)))


def test_vectors_have_no_shape_factor():
    (update,), _ = run(scale_by_shape("max_dim"), [{"bias": jnp.ones(9)}])
    chex.assert_trees_all_equal(update["bias"], jnp.ones(9))
