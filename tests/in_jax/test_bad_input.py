"""Bad input is refused in `init` or earlier, by an error that names leaf, value and remedy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optax_normuon import (
    MatrixLayout,
    add_cautious_weight_decay,
    bias_corrected_momentum,
    heavy_ball_momentum,
    layout_by_path,
    lerp_momentum,
    muon,
    normalize_neurons,
    normuon,
    orthogonalize,
    polar_factor,
    scale_by_normuon,
    scale_by_shape,
)

OPTAX_MESSAGE = "You are using a transformation that requires the current value of parameters"
KERNEL = {"mlp": {"kernel": jnp.ones((4, 6))}}


def init(params=None, **keywords):
    return normuon(0.1, **keywords).init(KERNEL if params is None else params)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            MatrixLayout(0, 0),
            r"mlp/kernel: .*reduction_axis=0 .*output_axis=0 overlap.*one side only",
        ),
        (MatrixLayout((0, 1), -1), r"mlp/kernel: .*overlap on shape \(4, 6\)"),
        (MatrixLayout(0, 2), r"mlp/kernel: .*output_axis=2 runs past the rank of shape \(4, 6\)"),
        (MatrixLayout(-3, 1), r"mlp/kernel: .*reduction_axis=-3 runs past.*from -2 to 1"),
        (MatrixLayout((), 1), r"mlp/kernel: .*reduction_axis is empty"),
        (MatrixLayout(0, 1, (2, 3)), r"mlp/kernel: output_splits=\(2, 3\) sum to 5.*6 neurons"),
        (MatrixLayout(0, 1, (6, 0)), r"mlp/kernel: output_splits=\(6, 0\).*positive sizes"),
        ("rows", r"mlp/kernel: a layout must be a MatrixLayout.*got 'rows'"),
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_its_leaf_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        init(layout=layout)


def test_a_layout_tree_that_does_not_match_the_parameters_is_refused():
    with pytest.raises(
        ValueError, match=r"layout does not match the parameters \(leaves: mlp/kernel"
    ):
        init(layout={"attention": MatrixLayout(0, 1)})


def test_a_path_pattern_that_meets_no_leaf_is_refused():
    with pytest.raises(ValueError, match=r"'atention/\*' meets no leaf; the leaves are mlp/kernel"):
        init(layout=layout_by_path({"atention/*": None}))


@pytest.mark.parametrize(("name", "near"), [("normoun", "normuon"), ("moonligt", "moonlight")])
def test_an_unknown_recipe_is_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"unknown recipe '{name}'; did you mean '{near}'"):
        normuon(0.1, recipe=name)


def test_beta2_for_a_recipe_without_neuron_normalization_is_refused():
    with pytest.raises(ValueError, match=r"beta2=0.9 has no effect.*'normuon'"):
        muon(0.1, beta2=0.9)


@pytest.mark.parametrize("make", [lambda: normuon(0.1), lambda: add_cautious_weight_decay(0.1)])
def test_missing_parameters_get_optaxs_own_message(make):
    tx = make()
    state = tx.init(KERNEL)
    with pytest.raises(ValueError, match=OPTAX_MESSAGE):
        tx.update(KERNEL, state)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
@pytest.mark.parametrize("shape", [(4, 6), (4,)])
def test_a_complex_or_integer_leaf_is_refused(dtype, shape):
    params = {"mlp": {"kernel": jnp.ones((4, 6)), "phase": jnp.ones(shape, dtype)}}
    name = jnp.dtype(dtype).name
    with pytest.raises(TypeError, match=f"mlp/phase: dtype {name}.*optax.masked"):
        init(params)


def test_a_gradient_without_a_parameter_is_refused():
    tx = normuon(0.1)
    state = tx.init(KERNEL)
    with pytest.raises(ValueError, match="mlp/bias: a gradient without a parameter"):
        tx.update({"mlp": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}, state, KERNEL)


def test_a_gradient_of_another_shape_is_refused():
    tx = normuon(0.1)
    with pytest.raises(ValueError, match=r"mlp/kernel: .*shape \(6, 4\) .*shape \(4, 6\)"):
        tx.update({"mlp": {"kernel": jnp.ones((6, 4))}}, tx.init(KERNEL), KERNEL)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU has it")
@pytest.mark.parametrize("make", [lambda **k: normuon(0.1, **k), orthogonalize])
def test_the_triton_backend_is_refused_where_triton_cannot_run(make):
    with pytest.raises(ValueError, match=r"backend='triton' needs a CUDA device.*backend='auto'"):
        make(backend="triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend='tritton' is unknown; use one of .*'triton'"):
        normuon(0.1, backend="tritton")


def test_an_orthogonalizer_beside_the_kernels_is_refused():
    with pytest.raises(ValueError, match="leave the orthogonalizer out"):
        normuon(0.1, backend="triton", orthogonalizer=lambda x: x)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"algorithm": "grahm"}, r"unknown algorithm 'grahm'; use one of .*'gram'"),
        ({"shape_scale": "spectrall"}, r"unknown shape scale 'spectrall'; did you mean 'spectral'"),
        ({"max_stack_bytes": 0}, r"max_stack_bytes=0 must be positive"),
    ],
    ids=["algorithm", "shape_scale", "max_stack_bytes"],
)
def test_an_unknown_option_is_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        init(**keywords)


def test_an_integer_compute_dtype_is_refused():
    with pytest.raises(TypeError, match="compute_dtype=.*int32.*not real floating point"):
        orthogonalize(compute_dtype=jnp.int32)


@pytest.mark.parametrize(
    ("lr_mul", "message"),
    [
        (np.ones(3), r"mlp/kernel: lr_mul has shape \(3,\), but .* has no batch axes"),
        ({"attention": 2.0}, "lr_mul does not match the parameters"),
    ],
    ids=["shape", "tree"],
)
def test_a_multiplier_that_does_not_fit_is_refused(lr_mul, message):
    with pytest.raises(ValueError, match=message):
        init(lr_mul=lr_mul)
    with pytest.raises(ValueError, match=message):
        scale_by_shape(lr_mul=lr_mul).init(KERNEL)


def test_a_vector_has_no_polar_factor():
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        polar_factor(jnp.ones(3))
    with pytest.raises(TypeError, match="got int32"):
        polar_factor(jnp.ones((3, 3), jnp.int32))


def test_an_unknown_neuron_axis_is_refused():
    with pytest.raises(ValueError, match="unknown axis 'rows'; did you mean"):
        normalize_neurons(axis="rows")


@pytest.mark.parametrize("make", [normuon, muon], ids=["normuon", "muon"])
@pytest.mark.parametrize(
    "keywords",
    [
        {"learning_rate": -0.1},
        {"learning_rate": np.float32(np.inf)},
        {"weight_decay": -1},
        {"momentum": 1.5},
        {"momentum": float("nan")},
        {"adam_learning_rate": -1.0},
        {"adam_weight_decay": -1.0},
        {"adam_b1": 1.0},
        {"adam_b2": -0.1},
        {"adam_eps": -1e-8},
    ],
    ids=str,
)
def test_a_number_out_of_its_range_is_named(make, keywords):
    ((name, value),) = keywords.items()
    message = re.escape(f"{name}={value}; use a ")
    with pytest.raises(ValueError, match=message):
        make(**{"learning_rate": 0.1, **keywords})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale_by_normuon(momentum=-0.1), r"momentum=-0.1; use a number in \[0, 1\)"),
        (lambda: scale_by_normuon(beta2=1), r"beta2=1; use a number in \[0, 1\)"),
        (lambda: lerp_momentum(1.0), r"momentum=1.0; use a number in \[0, 1\)"),
        (lambda: heavy_ball_momentum(1.5), r"momentum=1.5; use a number in \[0, 1\)"),
        (lambda: bias_corrected_momentum(-1), r"momentum=-1; use a number in \[0, 1\)"),
        (lambda: normalize_neurons(beta2=2.0), r"beta2=2.0; use a number in \[0, 1\)"),
        (lambda: normalize_neurons(rescale="maxx"), "unknown rescale 'maxx'; did you mean 'max'"),
        (lambda: orthogonalize(eps_rule="ad"), "unknown eps_rule 'ad'; did you mean 'add'"),
        (lambda: polar_factor(jnp.ones((2, 2)), eps_rule="min"), "unknown eps_rule 'min'"),
        (lambda: add_cautious_weight_decay(-0.1), "weight_decay=-0.1; use a finite number"),
    ],
)
def test_the_single_stages_check_their_numbers_and_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_schedule_of_beta2_is_sent_to_injection():
    with pytest.raises(TypeError, match=r"inject_hyperparams\(normuon, static_args=STATIC_ARGS\)"):
        normuon(0.1, beta2=lambda count: 0.9)


def test_the_values_of_arrays_tracers_and_schedules_are_not_checked():
    """Their values are not known when they are given, so the caller must keep to the range."""
    normuon(jnp.float32(-1), momentum=lambda count: 2.0, weight_decay=np.asarray(-1.0))
    jax.jit(lambda mu: normuon(mu, momentum=mu, beta2=mu, adam_weight_decay=mu).init(KERNEL))(-1.0)


def test_an_orthogonalizer_that_changes_the_shape_is_refused():
    tx = normuon(0.1, orthogonalizer=lambda stack: stack[:, :2])
    with pytest.raises(ValueError, match=r"orthogonalizer returned shape \(1, 2, 6\)"):
        tx.update(KERNEL, tx.init(KERNEL), KERNEL)


def test_a_zero_gradient_moves_nothing_but_still_decays():
    params = {"kernel": jnp.asarray([[1.0, -2.0], [3.0, 0.5]])}
    zeros = {"kernel": jnp.zeros((2, 2))}
    still, decaying = (normuon(0.1, weight_decay=decay) for decay in (0.0, 0.5))
    updates, _ = still.update(zeros, still.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], 0.0)
    updates, _ = decaying.update(zeros, decaying.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05 * params["kernel"], rtol=1e-6)
