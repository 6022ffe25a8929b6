"""What Optax asks of every transformation, asked of leaves that are matrices, stacks and vectors.

Optax's own contract tests use vectors, which would exercise AdamW alone. Most tests here run eagerly
on one set of shapes, so that all of them share what XLA compiled for the first; those that need `jit`
iterate in float32, which compiles in half the time of bfloat16.
"""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_normuon
from optax_normuon import RECIPES, STATIC_ARGS, MatrixLayout, with_bf16_remainder
from tests.engines import KERNELS

SHAPES = {"blocks": {"up": {"kernel": (3, 6, 7)}}, "dense": {"bias": (6,), "kernel": (7, 6)}}
LAYOUT = {"blocks": MatrixLayout(-2, -1), "dense": {"bias": None, "kernel": MatrixLayout(0, 1)}}
SPLIT = {
    "blocks": MatrixLayout(-2, -1, output_splits=(3, 2, 2)),
    "dense": {"bias": None, "kernel": MatrixLayout(0, 1)},
}
LEAVES = [("blocks", "up", "kernel"), ("dense", "bias"), ("dense", "kernel")]

OPTIMIZERS = {
    "normuon": lambda **keywords: optax_normuon.normuon(0.1, weight_decay=0.1, **keywords),
    "muon": lambda **keywords: optax_normuon.muon(0.1, weight_decay=0.1, **keywords),
    "scale_by_normuon": optax_normuon.scale_by_normuon,
}
STAGES = {
    "lerp_momentum": lambda layout=None: optax_normuon.lerp_momentum(),
    "heavy_ball_momentum": lambda layout=None: optax_normuon.heavy_ball_momentum(),
    "bias_corrected_momentum": lambda layout=None: optax_normuon.bias_corrected_momentum(),
    "orthogonalize": optax_normuon.orthogonalize,
    "normalize_neurons": optax_normuon.normalize_neurons,
    "add_cautious_weight_decay": lambda **keywords: optax_normuon.add_cautious_weight_decay(
        0.1, **keywords
    ),
    "scale_by_shape": optax_normuon.scale_by_shape,
}


def remainder(**keywords):
    return with_bf16_remainder(optax_normuon.normuon(0.1, **keywords))


BY_KERNELS = {
    f"{name} by kernels": functools.partial(make, **KERNELS)
    for name, make in {
        **OPTIMIZERS,
        "orthogonalize": optax_normuon.orthogonalize,
        "with_bf16_remainder": remainder,
    }.items()
}
TRANSFORMATIONS = {**OPTIMIZERS, **STAGES, "with_bf16_remainder": remainder, **BY_KERNELS}


def draw(seed, dtype=jnp.float32) -> Any:
    """A tree with a stack of three matrices, a matrix and a vector."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def one_step(tx, gradients, params) -> Any:
    """Updates and state after the first step."""
    return tx.update(gradients, tx.init(params), params)


def run(tx, params, gradients, **extra_args) -> Any:
    """Parameters and state after one step a gradient tree."""
    state = tx.init(params)
    for gradient in gradients:
        updates, state = tx.update(gradient, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
    return params, state


def at(tree: Any, path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def without(tree, path, value=None) -> Any:
    """The tree with `value` where `path` leads."""
    if not path:
        return value
    return {**tree, path[0]: without(tree[path[0]], path[1:], value)}


def leaves_that_differ(left, right):
    """Paths of SHAPES's leaves that differ by more than rounding; the others must be bit-equal."""
    differ = []
    for path in LEAVES:
        pair = [np.asarray(at(tree, path), np.float32) for tree in (left, right)]
        if np.array_equal(*pair):
            continue
        assert not np.allclose(*pair, rtol=1e-4, atol=1e-5), f"{path} differs by rounding alone"
        differ.append(path)
    return differ


def types(tree) -> Any:
    """Shape, dtype and weak type of every leaf."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@pytest.fixture(autouse=True)
def kernels_run_where_a_test_names_them(request):
    if "by kernels" in request.node.name:
        request.getfixturevalue("interpreted")


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request):
    if request.param == "float64":
        if "by kernels" in request.node.name:
            pytest.skip("the kernels take no float64")
        request.getfixturevalue("x64")
    return jnp.dtype(request.param)


def test_the_leaves_of_this_file_are_a_stack_a_matrix_and_a_vector():
    for layout in (None, LAYOUT):
        stack, vector, matrix = (
            optax_normuon.describe(draw(0), layout).split("\n\n")[0].splitlines()[2:]
        )
        assert "3 x (7, 6) " in stack
        assert "AdamW" in vector
        assert "1 x (6, 7) " in matrix
    assert "3 x (3, 6) + 6 x (2, 6)" in optax_normuon.describe(draw(0), SPLIT)


# Types


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_have_the_shapes_and_dtypes_of_the_parameters(name, dtype):
    tx, params = OPTIMIZERS[name](), draw(0, dtype)
    for gradient_dtype in (dtype, jnp.float32):
        updates, _ = jax.eval_shape(tx.update, draw(1, gradient_dtype), tx.init(params), params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("name", ["orthogonalize", "normalize_neurons"])
def test_stages_on_matrices_keep_the_dtype_they_are_given(name, dtype):
    tx, gradients = STAGES[name](), draw(1, dtype)
    updates, _ = jax.eval_shape(tx.update, gradients, tx.init(gradients), None)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)


@pytest.mark.parametrize("name", [name for name in STAGES if "momentum" in name or "shape" in name])
def test_elementwise_stages_hand_on_float32_or_wider(name, dtype):
    tx, gradients = STAGES[name](), draw(1, dtype)
    updates, _ = jax.eval_shape(tx.update, gradients, tx.init(gradients), None)
    wider = jnp.float64 if dtype == jnp.float64 else jnp.float32
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, draw(1, wider))


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_state_types_never_change(name, dtype):
    tx, params, gradients = TRANSFORMATIONS[name](), draw(0, dtype), draw(1, dtype)
    state = jax.eval_shape(tx.init, params)

    def step(state):
        return tx.update(gradients, state, params)[1]

    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(step, state), state)
    assert types(jax.eval_shape(step, state)) == types(state)
    # Both raise where the step changes a type.
    jax.eval_shape(lambda state: jax.lax.cond(True, step, lambda same: same, state), state)
    jax.eval_shape(lambda state: jax.lax.fori_loop(0, 3, lambda _, s: step(s), state), state)


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_types_never_change_in_any_recipe(normuon, recipe):
    params, gradients = draw(0, jnp.bfloat16), draw(1, jnp.bfloat16)
    tx = normuon(0.1, weight_decay=0.1, recipe=recipe, layout=SPLIT)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    assert types(after) == types(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("layout", [None, SPLIT], ids=["routed", "split"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_init_takes_abstract_values(name, layout):
    params = draw(0, jnp.bfloat16)
    tx = TRANSFORMATIONS[name](layout=layout)
    abstract_params = jax.eval_shape(lambda: params)
    concrete, traced = tx.init(params), jax.eval_shape(tx.init, params)
    untraced = tx.init(abstract_params)
    chex.assert_trees_all_equal_structs(concrete, traced, untraced)
    chex.assert_trees_all_equal_shapes_and_dtypes(concrete, traced, untraced)
    assert types(concrete) == types(traced)


def test_momentum_is_float32_for_half_precision_parameters_unless_asked_otherwise(normuon):
    params = draw(0, jnp.bfloat16)
    for asked, want in (
        (None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16),
    ):
        tx = normuon(0.1, momentum_dtype=asked)
        state = jax.eval_shape(tx.init, params)
        assert at(optax.tree.get(state, "momentum"), ("dense", "kernel")).dtype == want
        _, after = jax.eval_shape(tx.update, params, state, params)
        assert types(after) == types(state)


# Leaves that are not there


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_leaf_that_is_none_passes(name, path):
    params, gradients = without(draw(0), path), without(draw(1), path)
    tx = TRANSFORMATIONS[name]()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("shapes", [(), ((0, 4), (0,))], ids=["no leaves", "no entries"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_empty_trees_and_empty_leaves_pass(name, shapes):
    params = {f"dense_{i}": {"kernel": jnp.zeros(shape)} for i, shape in enumerate(shapes)}
    tx = TRANSFORMATIONS[name]()
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    chex.assert_trees_all_equal_shapes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("layout", [None, SPLIT], ids=["routed", "split"])
@pytest.mark.parametrize("path", LEAVES, ids="/".join)
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_parameter_without_gradient_gets_no_update_and_keeps_its_state(name, path, layout):
    params, gradients = draw(0), without(draw(1), path)
    tx = TRANSFORMATIONS[name](layout=layout)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    assert at(updates, path) is None
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_the_other_leaves_do_not_notice_a_leaf_that_is_none(normuon, path):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, weight_decay=0.1)
    alone, _ = one_step(tx, without(gradients, path), without(params, path))
    together, _ = one_step(tx, gradients, params)
    chex.assert_trees_all_equal(alone, without(together, path))


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_the_other_leaves_do_not_notice_a_missing_gradient(normuon, path):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, weight_decay=0.1)
    alone, state = one_step(tx, without(gradients, path), params)
    together, _ = one_step(tx, gradients, params)
    assert at(alone, path) is None
    chex.assert_trees_all_equal(alone, without(together, path))
    # Its momentum is what it was before: zero.
    if path != ("dense", "bias"):
        assert not jnp.any(at(optax.tree.get(state, "momentum"), path))


@pytest.mark.parametrize("name", ["orthogonalize", "normalize_neurons", "scale_by_shape"])
def test_a_missing_bias_gradient_does_not_change_how_the_kernel_is_read(name):
    # The shape of the bias tells a stack of 1-D convolutions from one 2-D convolution.
    kernel = at(draw(0), ("blocks", "up", "kernel")).reshape(3, 2, 3, 7)
    params: Any = {"conv": {"kernel": kernel, "bias": jnp.zeros((3, 7))}}
    assert "3 x (7, 6)" in optax_normuon.describe(params)
    tx: Any = optax_normuon.scale_by_shape("rms") if name == "scale_by_shape" else STAGES[name]()
    state = tx.init(params)
    whole, _ = tx.update(params, state, params)
    kernel_alone, _ = tx.update(without(params, ("conv", "bias")), state, params)
    chex.assert_trees_all_equal(kernel_alone["conv"]["kernel"], whole["conv"]["kernel"])


# Composition


@pytest.mark.parametrize("path", LEAVES, ids="/".join)
def test_masked_leaves_pass_and_the_others_make_the_same_step(normuon, path):
    params, gradients = draw(0), draw(1)
    mask = without(jax.tree.map(lambda _: True, params), path, False)
    plain, masked = (
        normuon(0.1, weight_decay=0.1),
        optax.masked(normuon(0.1, weight_decay=0.1), mask),
    )
    everywhere, _ = one_step(plain, gradients, params)
    updates, _ = one_step(masked, gradients, params)
    chex.assert_trees_all_equal(at(updates, path), at(gradients, path))
    assert leaves_that_differ(updates, everywhere) == [path]


@pytest.mark.parametrize("layout", [None, LAYOUT, SPLIT], ids=["routed", "tree", "split"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_masking_works_with_every_transformation(name, layout):
    params, gradients = draw(0), draw(1)
    for hidden in (*LEAVES, ()):
        mask = without(jax.tree.map(lambda _: True, params), hidden, False)
        tx = optax.masked(TRANSFORMATIONS[name](layout=layout), mask)
        state = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, gradients, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, gradients)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


def test_partition_gives_each_leaf_its_own_optimizer(normuon):
    params, gradients = draw(0), draw(1)
    labels = {"blocks": "slow", "dense": {"bias": "sgd", "kernel": "fast"}}
    slow, fast = normuon(0.1), normuon(0.4)
    tx = optax.partition({"slow": slow, "fast": fast, "sgd": optax.sgd(1.0)}, labels)
    updates, _ = one_step(tx, gradients, params)
    slowly, _ = one_step(slow, gradients, params)
    quickly, _ = one_step(fast, gradients, params)
    chex.assert_trees_all_equal(updates["blocks"], slowly["blocks"])
    chex.assert_trees_all_equal(updates["dense"]["kernel"], quickly["dense"]["kernel"])
    chex.assert_trees_all_equal(updates["dense"]["bias"], -gradients["dense"]["bias"])
    assert leaves_that_differ(slowly, quickly) == LEAVES


def test_a_clipped_chain_equals_clipping_by_hand(normuon):
    params = draw(0)
    gradients = [draw(1), jax.tree.map(lambda g: 100 * g, draw(2)), draw(3)]
    clip = optax.clip_by_global_norm(1.0)
    by_hand = [clip.update(gradient, clip.init(params))[0] for gradient in gradients]
    chained, _ = run(optax.chain(clip, normuon(0.1)), params, gradients)
    chex.assert_trees_all_equal(chained, run(normuon(0.1), params, by_hand)[0])
    assert leaves_that_differ(chained, run(normuon(0.1), params, gradients)[0]) == LEAVES


def test_muon_is_the_chain_of_its_stages():
    params, gradients = draw(0), [draw(1), draw(2)]
    matrices = {**params, "dense": {"kernel": params["dense"]["kernel"]}}
    gradients = [{**g, "dense": {"kernel": g["dense"]["kernel"]}} for g in gradients]
    stages = [
        optax_normuon.lerp_momentum(),
        optax_normuon.orthogonalize(),
        optax_normuon.add_cautious_weight_decay(0.1),
        optax_normuon.scale_by_shape("original"),
        optax.scale_by_learning_rate(0.1),
    ]
    whole, _ = run(OPTIMIZERS["muon"](), matrices, gradients)
    chex.assert_trees_all_equal(run(optax.chain(*stages), matrices, gradients)[0], whole)

    with_neurons = [*stages[:2], optax_normuon.normalize_neurons(), *stages[2:]]
    nor, _ = run(OPTIMIZERS["normuon"](), matrices, gradients)
    # Between two stages apart the compute dtype is rounded to float32 and back, which loses nothing.
    chex.assert_trees_all_close(
        run(optax.chain(*with_neurons), matrices, gradients)[0], nor, rtol=1e-2, atol=1e-3
    )
    chained = optax.chain(optax_normuon.scale_by_normuon(), *stages[2:])
    chex.assert_trees_all_equal(run(chained, matrices, gradients)[0], nor)
    assert not jnp.array_equal(nor["blocks"]["up"]["kernel"], whole["blocks"]["up"]["kernel"])


@pytest.mark.parametrize("name", [*STAGES, "scale_by_normuon"])
def test_each_stage_can_stand_alone_in_a_chain(name):
    params, gradients = draw(0), draw(1)
    stage = {**STAGES, **OPTIMIZERS}[name]()
    tx = optax.chain(optax.clip_by_global_norm(1.0), stage, optax.scale_by_learning_rate(0.1))
    updates, _ = one_step(tx, gradients, params)
    chex.assert_tree_all_finite(updates)
    clipped_sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_learning_rate(0.1))
    plain, _ = one_step(clipped_sgd, gradients, params)
    changed = leaves_that_differ(updates, plain)
    on_matrices = name in ("orthogonalize", "normalize_neurons")
    if name == "scale_by_shape":
        # The 6x7 matrix has more inputs than outputs, so its factor is 1.
        assert changed == [("blocks", "up", "kernel")]
    else:
        assert changed == [path for path in LEAVES if not (on_matrices and "bias" in path)]


def test_two_accumulated_gradients_make_the_step_of_their_mean(normuon):
    params, first, second = draw(0), draw(1), draw(2)
    tx = normuon(0.1, weight_decay=0.1, compute_dtype=jnp.float32)
    accumulating = optax.MultiSteps(tx, every_k_schedule=2)

    @jax.jit
    def accumulate(gradients, state, params):
        # Optax multiplies the updates by a boolean.
        with jax.numpy_dtype_promotion("standard"):
            return accumulating.update(gradients, state, params)

    nothing, state = accumulate(first, accumulating.init(params), params)
    updates, state = accumulate(second, state, params)
    chex.assert_trees_all_equal(nothing, optax.tree.zeros_like(params))
    mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
    of_the_mean, _ = one_step(tx, mean, params)
    of_one, _ = one_step(tx, first, params)
    chex.assert_trees_all_close(updates, of_the_mean, rtol=1e-4, atol=1e-6)
    assert float(jnp.abs(of_one["dense"]["kernel"] - updates["dense"]["kernel"]).max()) > 1e-3
    assert accumulating.has_updated(state)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf], ids=["nan", "inf"])
def test_a_bad_gradient_reaches_only_its_own_matrix(normuon, bad):
    params, gradients = draw(0), draw(1)
    spoiled = gradients["blocks"]["up"]["kernel"].at[1, 0, 0].set(bad)
    tx = normuon(0.1)
    clean, _ = one_step(tx, gradients, params)
    updates, _ = one_step(tx, without(gradients, ("blocks", "up", "kernel"), spoiled), params)
    stack, clean_stack = updates["blocks"]["up"]["kernel"], clean["blocks"]["up"]["kernel"]
    assert jnp.isnan(stack[1]).all()
    chex.assert_trees_all_equal((stack[0], stack[2]), (clean_stack[0], clean_stack[2]))
    chex.assert_trees_all_equal(updates["dense"], clean["dense"])


def test_apply_if_finite_rejects_a_bad_step_and_keeps_the_state(normuon):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, compute_dtype=jnp.float32)
    guarded = optax.apply_if_finite(tx, max_consecutive_errors=3)
    update = jax.jit(guarded.update)
    _, state = update(gradients, guarded.init(params), params)
    for path in LEAVES:
        spoiled = without(gradients, path, at(gradients, path).at[0].set(jnp.nan))
        updates, after = update(spoiled, state, params)
        chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        assert not after.last_finite
    resumed, _ = update(gradients, after, params)
    uninterrupted, _ = update(gradients, state, params)
    chex.assert_trees_all_equal(resumed, uninterrupted)
    assert float(jnp.abs(resumed["blocks"]["up"]["kernel"]).min()) > 0


# Arguments


@pytest.mark.parametrize("name", [*OPTIMIZERS, "with_bf16_remainder"])
def test_extra_arguments_are_tolerated(name):
    params, gradients = draw(0), draw(1)
    tx = TRANSFORMATIONS[name]()
    state = jax.eval_shape(tx.init, params)
    for other in (tx, optax.chain(tx, optax.identity())):
        state = jax.eval_shape(other.init, params)
        updates, _ = jax.eval_shape(
            lambda g, s, p, other=other: other.update(g, s, p, value=jnp.ones([]), loss="unused"),
            gradients,
            state,
            params,
        )
        chex.assert_trees_all_equal_shapes(updates, params)


def test_extra_arguments_change_nothing(normuon):
    params, gradients = draw(0), [draw(1), draw(2)]
    tx = normuon(0.1)
    chex.assert_trees_all_equal(
        run(tx, params, gradients, value=1.0, grad=gradients[0]), run(tx, params, gradients)
    )


@pytest.mark.parametrize(
    "name", ["normuon", "muon", "add_cautious_weight_decay", "with_bf16_remainder"]
)
def test_missing_parameters_are_asked_for_in_optax_words(name):
    tx, params = TRANSFORMATIONS[name](), draw(0)
    state = jax.eval_shape(tx.init, params)
    with pytest.raises(ValueError, match="params") as own:
        optax.add_decayed_weights(0.1).update(params, optax.EmptyState(), None)
    with pytest.raises(ValueError, match="params") as raised:
        tx.update(params, state)
    assert str(raised.value) == str(own.value)


def test_scale_by_normuon_needs_no_parameters():
    gradients = draw(1)
    tx = optax_normuon.scale_by_normuon()
    alone, _ = tx.update(gradients, tx.init(gradients))
    with_params, _ = tx.update(gradients, tx.init(gradients), draw(0))
    chex.assert_trees_all_equal(alone, with_params)


def test_a_step_compiles_once_and_may_donate_its_state(normuon):
    params = draw(0)
    rate = optax.linear_schedule(0.1, 0.0, 10)
    tx = normuon(rate, weight_decay=0.1, compute_dtype=jnp.float32)
    step: Any = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for seed in range(4):
        before, (updates, state) = state, step(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
        assert at(optax.tree.get(before, "momentum"), ("dense", "kernel")).is_deleted()
    assert step._cache_size() == 1
    step(draw(5, jnp.bfloat16), state, params)
    assert step._cache_size() == 2


def test_a_jitted_step_agrees_with_an_eager_one(normuon):
    params, gradients = draw(0), [draw(1), draw(2)]
    tx = normuon(0.1, weight_decay=0.1, compute_dtype=jnp.float32)
    jitted = optax.GradientTransformation(tx.init, jax.jit(tx.update))
    chex.assert_trees_all_close(
        run(jitted, params, gradients)[0], run(tx, params, gradients)[0], rtol=1e-5, atol=1e-5
    )


# vmap


@pytest.fixture
def steps_over_rates(normuon):
    """Two steps as a function of the learning rate and the seed's data, compiled for three of them."""

    def train(rate, params, first, second):
        tx = normuon(rate, weight_decay=rate, compute_dtype=jnp.float32)
        return run(tx, params, [first, second])[0]

    return train


def test_vmap_over_learning_rates_equals_separate_runs(steps_over_rates):
    params, first, second = draw(0), draw(1), draw(2)
    rates = jnp.asarray([0.0, 0.01, 0.1], jnp.float32)
    together = jax.jit(jax.vmap(steps_over_rates, in_axes=(0, None, None, None)))(
        rates, params, first, second
    )
    for i, rate in enumerate(rates):
        ran = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        alone = steps_over_rates(float(rate), params, first, second)
        chex.assert_trees_all_close(ran, alone, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], together), params)
    assert (
        leaves_that_differ(*(jax.tree.map(lambda x, i=i: x[i], together) for i in (1, 2))) == LEAVES
    )


def test_vmap_over_seeds_equals_separate_runs(steps_over_rates):
    trees = [[draw(10 * seed + i) for i in range(3)] for seed in range(3)]
    stacked = [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *which)
        for which in zip(*trees, strict=True)
    ]
    together = jax.jit(jax.vmap(steps_over_rates, in_axes=(None, 0, 0, 0)))(0.1, *stacked)
    for i, tree in enumerate(trees):
        ran = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        chex.assert_trees_all_close(ran, steps_over_rates(0.1, *tree), rtol=1e-5, atol=1e-5)
        assert leaves_that_differ(ran, steps_over_rates(0.1, *trees[i - 1])) == LEAVES


# Hyperparameters in the state


def injected(normuon, *arguments, hyperparam_dtype=None, **keywords):
    make = optax.inject_hyperparams(
        normuon, static_args=STATIC_ARGS, hyperparam_dtype=hyperparam_dtype
    )
    return make(*arguments, **keywords)


@pytest.fixture
def standard_promotion():
    """Optax's Adam computes 1 - b1 and its power of the step count from whatever it is given."""
    with jax.numpy_dtype_promotion("standard"):
        yield


CONSTANTS = {
    "rate": dict(learning_rate=0.1, weight_decay=0.2),
    "all": dict(
        learning_rate=0.1,
        weight_decay=0.2,
        momentum=0.9,
        beta2=0.8,
        adam_learning_rate=0.05,
        adam_b1=0.8,
        adam_b2=0.9,
        adam_eps=1e-6,
        adam_weight_decay=0.1,
    ),
    "static": dict(
        learning_rate=0.1,
        compute_dtype=jnp.float32,
        momentum_dtype=jnp.float32,
        layout=optax_normuon.layout_by_path({"blocks/*": MatrixLayout(2, 1)}),
        lr_mul=lambda params: jax.tree.map(lambda p: float(p.ndim), params),
        wd_mul=lambda params: {"blocks": params["blocks"]["up"]["kernel"].ndim, "dense": 1.0},
        weight_decay=0.1,
        nesterov=False,
        shape_scale="spectral",
        max_stack_bytes=1,
    ),
    "orthogonalizer": dict(learning_rate=0.1, orthogonalizer=lambda stack: stack / 2),
    "recipe": dict(learning_rate=0.1, recipe="dion_normuon", weight_decay=0.1),
}


@pytest.mark.parametrize("keywords", CONSTANTS.values(), ids=CONSTANTS.keys())
def test_injected_constants_make_the_same_steps(normuon, keywords):
    if "orthogonalizer" in keywords and normuon is not optax_normuon.normuon:
        pytest.skip("the kernels have their own orthogonalization")
    params, gradients = draw(0), [draw(1), draw(2)]
    after, state = run(injected(normuon, **keywords), params, gradients)
    plain, _ = run(normuon(**keywords), params, gradients)
    # Not bit-equal: the constants are float32 now, where Optax's Adam has Python's 1 - b1.
    chex.assert_trees_all_close(after, plain, rtol=1e-5, atol=1e-6)
    numbers = {name for name, value in keywords.items() if type(value) is float}
    assert numbers <= set(state.hyperparams)
    assert not set(STATIC_ARGS) & set(state.hyperparams)
    default, _ = run(normuon(0.1), params, gradients)
    stacks = [tree["blocks"]["up"]["kernel"] for tree in (after, default)]
    assert not jnp.allclose(*stacks, rtol=1e-3)


def test_an_injected_schedule_makes_the_steps_of_a_plain_one(normuon):
    params, gradients = draw(0), [draw(1), draw(2), draw(3)]
    keywords: dict[str, Any] = dict(
        learning_rate=optax.linear_schedule(0.1, 0.0, 4),
        momentum=optax.linear_schedule(0.8, 0.95, 4),
        weight_decay=optax.linear_schedule(0.4, 0.1, 4),
    )
    after, state = run(injected(normuon, **keywords), params, gradients)
    plain, _ = run(normuon(**keywords), params, gradients)
    chex.assert_trees_all_close(after, plain, rtol=1e-5, atol=1e-6)
    assert leaves_that_differ(after, run(normuon(0.1), params, gradients)[0]) == LEAVES
    # The values of the third step.
    chex.assert_trees_all_close(state.hyperparams["learning_rate"], jnp.float32(0.05), rtol=1e-6)
    chex.assert_trees_all_close(state.hyperparams["momentum"], jnp.float32(0.875), rtol=1e-6)


def test_a_rate_set_in_the_state_takes_effect(normuon):
    params, gradients = draw(0), draw(1)
    tx = injected(normuon, 0.1)
    state: Any = tx.init(params)
    updates, _ = tx.update(gradients, state, params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2, jnp.float32)
    doubled, state = tx.update(gradients, state, params)
    chex.assert_trees_all_close(doubled, jax.tree.map(lambda u: 2 * u, updates), rtol=1e-6)
    assert state.hyperparams["learning_rate"] == jnp.float32(0.2)


def test_injected_state_types_never_change(normuon):
    params, gradients = draw(0, jnp.bfloat16), draw(1, jnp.bfloat16)
    tx = injected(
        normuon, optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.1, hyperparam_dtype=jnp.float32
    )
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, gradients, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_float32_hyperparameters_spare_bfloat16_parameters_a_rounding(normuon):
    params, gradients = draw(0, jnp.bfloat16), [draw(1, jnp.bfloat16), draw(2, jnp.bfloat16)]
    keywords: dict[str, Any] = dict(beta2=0.95, momentum=0.9, compute_dtype=jnp.float32)
    _, exact = run(
        injected(normuon, 0.1, **keywords, hyperparam_dtype=jnp.float32), params, gradients
    )
    _, rounded = run(injected(normuon, 0.1, **keywords), params, gradients)
    _, plain = run(normuon(0.1, **keywords), params, gradients)
    assert float(exact.hyperparams["beta2"]) == np.float32(0.95)
    assert float(rounded.hyperparams["beta2"]) == 0.94921875
    for statistic in ("momentum", "second_moment"):
        want = optax.tree.get(plain, statistic)["blocks"]["up"]["kernel"]
        got, off = (
            optax.tree.get(state.inner_state, statistic)["blocks"]["up"]["kernel"]
            for state in (exact, rounded)
        )
        chex.assert_trees_all_close(got, want, rtol=1e-5)
        assert not jnp.allclose(off, want, rtol=1e-3)


# State trees


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"layout": LAYOUT},
        {"layout": lambda params: jax.tree.map(lambda p: None, params)},
        {"lr_mul": lambda params: {"blocks": 0.5, "dense": params["dense"]["bias"][0]}},
        {"wd_mul": {"blocks": np.ones(3, np.float32), "dense": 1.0}},
    ],
    ids=["routed", "tree", "callable", "lr_mul callable", "wd_mul per matrix"],
)
def test_map_params_pairs_the_state_with_a_tree_like_the_parameters(normuon, keywords):
    params = draw(0)
    names = {
        "blocks": {"up": {"kernel": "stack"}},
        "dense": {"bias": "vector", "kernel": "matrix"},
    }
    tx = normuon(0.1, **keywords)
    paired = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else f"{name} {leaf.shape}",
        tx.init(params),
        names,
        transform_non_params=lambda leaf: "count",
        is_leaf=is_masked,
    )
    found = {leaf for leaf in jax.tree.leaves(paired, is_leaf=is_masked) if not is_masked(leaf)}
    if keywords.get("layout") not in (None, LAYOUT):
        assert found == {"stack (3, 6, 7)", "matrix (7, 6)", "vector (6,)", "count"}
        return
    statistics = {"stack (3, 1, 7)", "matrix (1, 6)"}
    assert found == {"stack (3, 6, 7)", "matrix (7, 6)", "vector (6,)", "count", *statistics}
    momentum = optax.tree.get(paired, "momentum")
    assert momentum["dense"]["kernel"] == "matrix (7, 6)"
    assert is_masked(momentum["dense"]["bias"])


def test_map_params_reaches_the_blocks_of_a_split_leaf_together(normuon):
    params = draw(0)
    names = {"blocks": {"up": {"kernel": "stack"}}, "dense": {"bias": "vector", "kernel": "matrix"}}
    tx = normuon(0.1, layout=SPLIT)
    paired: Any = optax.tree.map_params(
        tx,
        lambda leaf, name: leaf if is_masked(leaf) else (name, jax.tree.map(jnp.shape, leaf)),
        tx.init(params),
        names,
        is_leaf=lambda node: is_masked(node) or type(node) is tuple,
    )
    name, shapes = optax.tree.get(paired, "second_moment")["blocks"]["up"]["kernel"]
    assert (name, shapes) == ("stack", (3, 1, 7))
    assert optax.tree.get(paired, "momentum")["dense"]["kernel"] == ("matrix", (7, 6))


@pytest.mark.parametrize("name", ["normuon", "muon", "scale_by_normuon", "lerp_momentum"])
def test_tree_get_finds_the_momentum(name):
    params, gradients = draw(0), draw(1)
    tx = optax.chain(optax.clip_by_global_norm(1e9), TRANSFORMATIONS[name]())
    _, state = one_step(tx, gradients, params)
    momentum = optax.tree.get(state, "momentum")
    # One lerp step from zero.
    for path in [("blocks", "up", "kernel"), ("dense", "kernel")]:
        chex.assert_trees_all_close(at(momentum, path), 0.05 * at(gradients, path), rtol=1e-5)


def test_tree_get_finds_the_second_moment_of_each_optimizer_by_name(normuon):
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1)
    _, state = one_step(tx, gradients, params)
    neurons = optax.tree.get(state, "second_moment")
    assert (neurons["blocks"]["up"]["kernel"] > 0).all()
    adam = optax.tree.get(state, "nu")
    chex.assert_trees_all_close(
        adam["dense"]["bias"], 0.05 * gradients["dense"]["bias"] ** 2, rtol=1e-5
    )


# bf16 parameters


def joined_weights(params, state) -> Any:
    """The float32 weights whose high halves are the parameters."""

    def join(high, low):
        bits = jax.lax.bitcast_convert_type(high, jnp.uint16).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits | low.astype(jnp.uint32), jnp.float32)

    return jax.tree.map(join, params, state.remainder)


def test_the_bf16_remainder_wraps_normuon_under_jit(normuon):
    params = draw(0, jnp.bfloat16)
    tx = with_bf16_remainder(normuon(0.01, layout=SPLIT, compute_dtype=jnp.float32))
    step: Any = jax.jit(tx.update)
    state: Any = tx.init(params)
    for seed in range(3):
        updates, state = step(draw(seed, jnp.bfloat16), state, params)
        with jax.numpy_dtype_promotion("standard"):
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_equal_dtypes(updates, draw(0))
        # What is left over is smaller than the weight's last place.
        chex.assert_trees_all_close(
            joined_weights(params, state), optax.tree.cast(params, jnp.float32), rtol=2**-7
        )
    assert step._cache_size() == 1
    assert all(leaf.any() for leaf in jax.tree.leaves(state.remainder))


# Recipes as data


def test_a_recipe_object_and_its_name_make_the_same_step(normuon):
    params, gradients = draw(0), [draw(1)]
    named, _ = run(normuon(0.1, recipe="moonlight"), params, gradients)
    chex.assert_trees_all_equal(
        run(normuon(0.1, recipe=RECIPES["moonlight"]), params, gradients)[0], named
    )
    variant = dataclasses.replace(RECIPES["moonlight"], shape_scale="spectral")
    changed = leaves_that_differ(run(normuon(0.1, recipe=variant), params, gradients)[0], named)
    assert changed == [path for path in LEAVES if "bias" not in path]
