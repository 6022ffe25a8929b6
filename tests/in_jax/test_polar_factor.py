"""Properties of the polar factor, whatever the matrix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_core import POLYNOMIALS
from normuon_core.cost import GRAM_RATE, gram_saves
from normuon_core.polar_iteration import FEW_ROWS, iterate
from normuon_core.polynomials import cubic_steps
from optax_normuon import orthogonalize, polar_factor

SHAPE = (3, 6, 10)
FORMS = ["standard", "gram"]

exact = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)
factor = jax.jit(
    lambda x, algorithm: polar_factor(x, compute_dtype=jnp.float32, algorithm=algorithm, eps=1e-30),
    static_argnames="algorithm",
)


def draw(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("algorithm", FORMS)
@exact
@given(seed=seeds, exponent=st.integers(-20, 20))
def test_a_power_of_two_changes_no_bit(algorithm, seed, exponent):
    x = draw(seed)
    chex.assert_trees_all_equal(factor(x * 2.0**exponent, algorithm), factor(x, algorithm))


@exact
@given(seed=seeds, scale=st.floats(1e-6, 1e6))
def test_positive_scaling_changes_nothing_but_rounding(seed, scale):
    """Largest difference in 300 draws: 6.6e-6."""
    x = draw(seed)
    scaled = factor(x * np.float32(scale), "standard")
    chex.assert_trees_all_close(scaled, factor(x, "standard"), atol=5e-5)


@pytest.mark.parametrize("algorithm", FORMS)
@exact
@given(seed=seeds)
def test_the_transpose_has_the_transposed_factor(algorithm, seed):
    x = draw(seed)
    transposed = factor(x.swapaxes(1, 2), algorithm).swapaxes(1, 2)
    chex.assert_trees_all_close(transposed, factor(x, algorithm), atol=5e-5)


@pytest.mark.parametrize("algorithm", FORMS)
@exact
@given(seed=seeds, order=st.permutations(range(SHAPE[0])))
def test_permuting_a_batch_permutes_the_factors(algorithm, seed, order):
    x = draw(seed)
    chex.assert_trees_all_equal(
        factor(x[order, :, :], algorithm), factor(x, algorithm)[order, :, :]
    )


@pytest.mark.parametrize("algorithm", FORMS)
@exact
@given(
    seed=seeds, where=st.integers(0, SHAPE[0] - 1), bad=st.sampled_from([np.nan, np.inf, -np.inf])
)
def test_a_bad_entry_reaches_only_its_own_matrix(algorithm, seed, where, bad):
    x = draw(seed)
    y = x.copy()
    y[where, 2, 3] = bad
    result, clean = np.array(factor(y, algorithm)), factor(x, algorithm)
    assert np.isnan(result[where]).all()
    result[where] = clean[where]
    chex.assert_trees_all_equal(result, np.asarray(clean))


@pytest.mark.parametrize("algorithm", FORMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_zero_matrix_stays_zero(algorithm, dtype):
    x = np.zeros((2, 4, 6), np.float32)
    chex.assert_trees_all_equal(polar_factor(x, compute_dtype=dtype, algorithm=algorithm), x)


@pytest.mark.parametrize("algorithm", FORMS)
def test_an_overflowed_norm_is_nan_and_not_a_silent_zero(algorithm):
    """Finite entries of 1e30 have a norm beyond float32."""
    assert np.isnan(polar_factor(1e30 * draw(0), algorithm=algorithm)).all()
    assert np.isfinite(polar_factor(1e15 * draw(0), algorithm=algorithm)).all()


@pytest.mark.parametrize("algorithm", FORMS)
def test_singular_vectors_are_kept_and_values_driven_to_one(algorithm):
    x = draw(1, (1, 8, 24))
    u, _, vt = np.linalg.svd(x[0], full_matrices=False)
    result = polar_factor(
        x,
        compute_dtype=jnp.float32,
        algorithm=algorithm,
        coefficients=POLYNOMIALS["quintic_taylor"] * 3,
    )
    chex.assert_trees_all_close(np.asarray(result[0]), u @ vt, atol=2e-5)


def test_leading_axes_are_batches_and_the_dtype_is_kept():
    x = jnp.asarray(draw(0, (2, 3, 4, 5)), jnp.bfloat16)
    result = polar_factor(x)
    chex.assert_shape(result, (2, 3, 4, 5))
    chex.assert_type(result, jnp.bfloat16)
    chex.assert_trees_all_equal(result[1, 2], polar_factor(x[1, 2]))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="auto takes the Gram form on a GPU")
@pytest.mark.parametrize("compute_dtype", [None, "float16", "bfloat16"])
def test_auto_is_the_standard_form_off_the_gpu(compute_dtype):
    x = draw(0, (1, 8, 64))
    auto, standard, gram = (
        polar_factor(x, compute_dtype=compute_dtype, algorithm=algorithm)
        for algorithm in ("auto", "standard", "gram")
    )
    chex.assert_trees_all_equal(auto, standard)
    assert not np.array_equal(auto, gram)


class CountedProducts:
    """Multiplies nothing, and adds up what that would cost in units of short^3."""

    def __init__(self, ratio: float, *, symmetric: bool):
        self.ratio, self.square, self.cost = ratio, 1 if symmetric else 2, 0.0

    def gram(self, x, *, alpha):
        self.cost += self.square * self.ratio
        return "R"

    def multiply(self, s, t, *, alpha, addends=(), diagonal=0.0):
        self.cost += self.square
        return "S T"

    def apply(self, s, x, *, alpha, addend=0.0):
        self.cost += 2 * self.ratio
        return "S X"


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("short", [FEW_ROWS // 4, FEW_ROWS])
@pytest.mark.parametrize("name", ["quintic_taylor", "cubic"])
def test_auto_counts_the_operations_that_the_iteration_makes(name, short, symmetric, steps):
    coefficients = POLYNOMIALS[name][:1] * steps
    cubics = cubic_steps(coefficients)
    for ratio in (1.0, 1.125, 1.25, 1.5, 1.625, 2.0, 4.0):
        cost = {}
        for form in FORMS:
            products = CountedProducts(ratio, symmetric=symmetric)
            iterate(
                "X",
                coefficients,
                products,
                algorithm=form,
                short=short,
                scales=(1.0, 1.0),
            )
            cost[form] = products.cost
        if symmetric:
            cost["gram"] /= GRAM_RATE
        saves = gram_saves(short, int(ratio * short), steps, symmetric=symmetric, cubics=cubics)
        assert saves == (cost["gram"] < cost["standard"])


def test_orthogonalize_leaves_vectors_alone():
    tx = orthogonalize(compute_dtype=jnp.float32)
    updates = {"bias": np.arange(3.0, dtype=np.float32), "kernel": draw(0, (6, 10))}
    result, _ = tx.update(updates, tx.init(updates))
    chex.assert_trees_all_equal(result["bias"], updates["bias"])
    chex.assert_trees_all_close(
        result["kernel"], polar_factor(updates["kernel"], compute_dtype=jnp.float32), atol=1e-6
    )
