"""The optimizer of the leaves that are no matrices: AdamW's options, factors by path, `others=`."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_normuon
from optax_normuon import STATIC_ARGS, multipliers_by_path, muon, normuon
from tests.in_jax.meshes import mesh_of
from tests.in_jax.trees import at, random_tree

# These tests are not about matrices, so a stage that compiles quickly takes the iteration's place.
QUICK: dict[str, Any] = {"orthogonalizer": lambda stack: stack / 2}

SHAPES = {"embed": {"embedding": (6, 4)}, "dense": {"bias": (4,), "kernel": (6, 4)}}
MATRIX = ("dense", "kernel")
OTHERS = [("dense", "bias"), ("embed", "embedding")]


def draw(seed: int, dtype: Any = jnp.float32) -> Any:
    return random_tree(SHAPES, seed, dtype)


def run(tx, *, steps: int = 2, dtype: Any = jnp.float32, **extra) -> Any:
    """Parameters after some steps on fixed gradients, and the state."""
    params = draw(0, dtype)
    state = tx.init(params)
    update = jax.jit(optax.with_extra_args_support(tx).update)
    for seed in range(1, steps + 1):
        updates, state = update(draw(seed, dtype), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def only(tree: Any, chosen) -> Any:
    """The tree with `optax.MaskedNode` in place of all but the chosen leaves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if tuple(k.key for k in path) in chosen else optax.MaskedNode(),
        tree,
    )


def labels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "own" if tuple(key.key for key in path) == MATRIX else "rest", params
    )


# AdamW's options

ADAMW: dict[str, dict[str, Any]] = {
    "nesterov": dict(nesterov=True),
    "eps_root": dict(eps_root=0.3),
    "all": dict(nesterov=True, eps_root=0.3, mu_dtype=jnp.float32, weight_decay=0.2),
}


@pytest.mark.parametrize("options", ADAMW.values(), ids=ADAMW.keys())
def test_the_options_of_adamw_are_those_of_optax(options):
    """Largest distance: 1.2e-7."""
    names = {"mu_dtype": "moment_dtype"}
    keywords = {f"adam_{names.get(name, name)}": value for name, value in options.items()}
    mine, _ = run(normuon(0.1, **QUICK, adam_eps=1e-6, **keywords))
    with jax.numpy_dtype_promotion("standard"):  # Optax raises b1 to its integer step count
        theirs, _ = run(optax.adamw(0.1, 0.9, 0.95, 1e-6, **{"weight_decay": 0.0, **options}))
    plain, _ = run(normuon(0.1, **QUICK, adam_eps=1e-6))
    for path in OTHERS:
        np.testing.assert_allclose(at(mine, path), at(theirs, path), rtol=5e-7, atol=5e-7)
        assert not np.allclose(at(mine, path), at(plain, path), rtol=1e-4, atol=1e-5)
    assert np.array_equal(at(mine, MATRIX), at(plain, MATRIX))


@pytest.mark.parametrize(
    ("dtype", "given", "first"),
    [
        (jnp.float32, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    ],
)
def test_only_the_first_moment_is_kept_in_the_dtype_that_is_asked_for(dtype, given, first):
    tx = normuon(0.1, **QUICK, adam_moment_dtype=given)
    params = draw(0, dtype)
    state = tx.init(params)
    _, after = tx.update(draw(1, dtype), state, params)
    for each in (state, after):
        (adam,) = [
            node
            for node in jax.tree.leaves(
                each, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
            )
            if isinstance(node, optax.ScaleByAdamState)
        ]
        assert {leaf.dtype for leaf in jax.tree.leaves(adam.mu)} == {jnp.dtype(first)}
        assert {leaf.dtype for leaf in jax.tree.leaves(adam.nu)} == {jnp.dtype(jnp.float32)}


def test_a_first_moment_of_integers_is_refused():
    with pytest.raises(ValueError, match="adam_moment_dtype=int32 .*floating dtype"):
        normuon(0.1, **QUICK, adam_moment_dtype=jnp.int32).init(draw(0))


@pytest.mark.parametrize(
    "inject",
    [
        optax_normuon.inject_hyperparams,
        lambda make: optax.inject_hyperparams(make, static_args=STATIC_ARGS),
    ],
    ids=["ours", "optax's"],
)
@pytest.mark.parametrize("make", [normuon, muon])
def test_injection_leaves_the_options_of_adamw_as_they_are(inject, make):
    keywords: dict[str, Any] = dict(
        adam_nesterov=True, adam_eps_root=0.3, adam_moment_dtype=jnp.float32, adam_cautious=True
    )
    keywords |= dict(adam_every=2)
    with jax.numpy_dtype_promotion("standard"):
        mine, state = run(inject(make)(0.1, **QUICK, **keywords))
    plain, _ = run(make(0.1, **QUICK, **keywords))
    for path in OTHERS:
        np.testing.assert_allclose(at(mine, path), at(plain, path), rtol=1e-5, atol=1e-6)
    assert state.hyperparams["adam_eps_root"] == jnp.float32(0.3)
    static = {"adam_nesterov", "adam_moment_dtype", "adam_cautious", "adam_every"}
    assert not static & set(state.hyperparams)


# Updates at every k-th step

STEADY = draw(7)


def steady_run(tx, steps: int) -> tuple[list[Any], Any]:
    """The parameters after each step by one and the same gradient, and the last state."""
    params, history = draw(0), []
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(STEADY, state, params)
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def test_every_second_step_moves_as_half_as_many_steps_at_the_rates_of_those_steps():
    def rate(count):
        return 0.1 / (1 + jnp.asarray(count, jnp.float32))

    keywords: dict[str, Any] = dict(**QUICK, adam_weight_decay=0.2, adam_cautious=True)
    sparse, state = steady_run(normuon(0.1, adam_learning_rate=rate, adam_every=2, **keywords), 5)
    dense, _ = steady_run(
        normuon(0.1, adam_learning_rate=lambda count: rate(2 * count + 1), **keywords), 5
    )
    for path in OTHERS:
        start = at(draw(0), path)
        chex.assert_trees_all_equal(at(sparse[0], path), start)
        for update, step in ((0, 1), (0, 2), (1, 3), (1, 4)):
            wanted = at(dense[update], path)
            np.testing.assert_allclose(at(sparse[step], path), wanted, rtol=1e-6, atol=1e-7)
        assert not np.allclose(at(dense[1], path), at(dense[0], path), rtol=1e-4)
        kept = at(state.inner_states["adamw"].inner_state.gradient_sum, path)
        chex.assert_trees_all_equal(kept, at(STEADY, path))
    for step in range(5):
        np.testing.assert_allclose(at(sparse[step], MATRIX), at(dense[step], MATRIX), rtol=1e-6)


def test_a_leaf_without_gradient_keeps_its_sum_and_its_place():
    tx = normuon(0.1, **QUICK, adam_every=2)
    params = draw(0)
    state = tx.init(params)
    absent = {**STEADY, "embed": {"embedding": None}}
    for gradient in (STEADY, absent):
        updates, state = tx.update(gradient, state, params)
    assert updates["embed"]["embedding"] is None
    assert np.any(updates["dense"]["bias"])
    kept = state.inner_states["adamw"].inner_state.gradient_sum
    chex.assert_trees_all_equal(kept["embed"], STEADY["embed"])
    assert not np.any(kept["dense"]["bias"])


@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_on_a_mesh_it_moves_as_on_one_device(mode):
    mesh = mesh_of(mode, fsdp=2)
    specs = {"embed": {"embedding": P("fsdp")}, "dense": {"bias": P("fsdp"), "kernel": P("fsdp")}}
    keywords: dict[str, Any] = dict(
        **QUICK, adam_every=2, adam_cautious=True, adam_weight_decay=0.2
    )

    def moved(tx, put):
        params = put(draw(0))
        state = tx.init(params)
        for seed in (1, 2):
            updates, state = jax.jit(tx.update)(put(draw(seed)), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    def put(tree):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    one, _ = moved(normuon(0.1, **keywords), lambda tree: tree)
    many, state = moved(normuon(0.1, **keywords, param_specs=specs), put)
    chex.assert_trees_all_close(many, one, rtol=1e-5, atol=1e-6)
    kept = state.inner_states["adamw"].inner_state.gradient_sum["embed"]["embedding"]
    assert kept.sharding.is_equivalent_to(NamedSharding(mesh, P("fsdp")), 2)
    given = optax_normuon.state_specs(normuon(0.1, **keywords), draw(0), specs)
    assert given.inner_states["adamw"].inner_state.gradient_sum["embed"]["embedding"] == P(
        "fsdp", None
    )


@pytest.mark.parametrize("every", [0, 1.5, True, "2"])
def test_a_count_of_steps_that_is_none_is_refused(every):
    with pytest.raises(ValueError, match="adam_every=.*whole number of at least 1"):
        normuon(0.1, adam_every=every)


# Another transformation in AdamW's place


class Seen(NamedTuple):
    count: Any
    like: Any


def scale_by_the_loss() -> optax.GradientTransformationExtraArgs:
    """Needs an extra argument, and keeps what it was given."""

    def update(updates, state, params=None, *, loss, **extra):
        del params, extra
        return jax.tree.map(lambda u: -loss * u, updates), Seen(state.count + 1, updates)

    return optax.GradientTransformationExtraArgs(
        lambda params: Seen(jnp.zeros([], jnp.int32), params), update
    )


def test_others_sees_what_partition_would_give_it_and_the_matrices_do_not_feel_it():
    mine, state = run(normuon(0.1, **QUICK, others=scale_by_the_loss()), loss=jnp.float32(0.5))
    by_hand = {"own": normuon(0.1, **QUICK), "rest": scale_by_the_loss()}
    theirs, other = run(optax.partition(by_hand, labels), loss=jnp.float32(0.5))
    chex.assert_trees_all_close(mine, theirs, rtol=1e-6)
    kept, expected = state.inner_states["others"], other.inner_states["rest"]
    assert jax.tree.structure(kept) == jax.tree.structure(expected)
    chex.assert_trees_all_equal(kept.inner_state.like, only(draw(2), OTHERS))
    assert not np.allclose(
        at(mine, OTHERS[0]), at(run(normuon(0.1, **QUICK))[0], OTHERS[0]), rtol=1e-3
    )


def test_others_gets_half_precision_as_it_is():
    _, state = run(
        normuon(0.1, **QUICK, others=scale_by_the_loss()),
        dtype=jnp.bfloat16,
        loss=jnp.bfloat16(0.5),
    )
    seen = state.inner_states["others"].inner_state.like
    assert {leaf.dtype for leaf in jax.tree.leaves(seen)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "keywords",
    [
        dict(adam_learning_rate=3e-3),
        dict(adam_b2=0.95),  # also where it is the default
        dict(adam_nesterov=True),
    ],
)
@pytest.mark.parametrize("make", [normuon, muon])
def test_keywords_of_adamw_beside_others_are_refused(make, keywords):
    (name,) = keywords
    message = f"{name} would do nothing: `others` takes AdamW's place"
    with pytest.raises(ValueError, match=message):
        make(0.1, **QUICK, others=optax.sgd(0.1), **keywords)
    with pytest.raises(ValueError, match=message):
        optax_normuon.inject_hyperparams(make)(0.1, **QUICK, others=optax.sgd(0.1), **keywords)


def test_others_that_is_no_transformation_is_refused():
    with pytest.raises(TypeError, match=r"others=0.1 is no optax.GradientTransformation"):
        normuon(0.1, **QUICK, others=0.1)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("make", [normuon, muon])
def test_others_under_injection_has_no_hyperparameters_of_adamw(make):
    mine, state = run(optax_normuon.inject_hyperparams(make)(0.1, **QUICK, others=optax.sgd(0.01)))
    plain, _ = run(make(0.1, **QUICK, others=optax.sgd(0.01)))
    chex.assert_trees_all_close(mine, plain, rtol=1e-6)
    assert "learning_rate" in state.hyperparams
    assert not [name for name in state.hyperparams if name.startswith("adam_")]


@pytest.mark.parametrize("what", ["lr_mul", "wd_mul"])
def test_a_multiplier_for_a_leaf_of_others_is_refused(what):
    for_matrices = multipliers_by_path({"dense/kernel": 0.5})
    normuon(0.1, **QUICK, others=optax.sgd(0.1), **{what: for_matrices}).init(draw(0))
    for_others = multipliers_by_path({"embed/*": 0.5})
    with pytest.raises(ValueError, match=rf"embed/embedding: {what}=0.5 would do nothing.*others"):
        normuon(0.1, **QUICK, others=optax.sgd(0.1), **{what: for_others}).init(draw(0))


# Multipliers by path

BY_PATH = {"*bias": 4.0, "dense/*": 0.5}
AS_TREE = {"embed": {"embedding": 2.0}, "dense": {"bias": 4.0, "kernel": 0.5}}


@pytest.mark.parametrize("what", ["lr_mul", "wd_mul"])
def test_multipliers_by_path_are_the_tree_that_they_describe(what):
    rates = dict(weight_decay=0.3, adam_weight_decay=0.3)
    by_path = {what: multipliers_by_path(BY_PATH, default=2.0)}
    mine, _ = run(normuon(0.1, **QUICK, **rates, **by_path))
    tree, _ = run(normuon(0.1, **QUICK, **rates, **{what: AS_TREE}))
    plain, _ = run(normuon(0.1, **QUICK, **rates))
    chex.assert_trees_all_close(mine, tree, rtol=1e-6)
    for path in [MATRIX, *OTHERS]:
        assert not np.allclose(at(mine, path), at(plain, path), rtol=1e-4)


def test_the_first_pattern_counts_and_others_have_one():
    factors = multipliers_by_path(BY_PATH)(draw(0))
    assert factors == {**AS_TREE, "embed": {"embedding": 1.0}}


def test_a_pattern_may_give_one_factor_a_matrix():
    params = {"experts": {"kernel": jnp.ones((3, 4, 5))}, "bias": jnp.ones(5)}
    per_matrix = np.asarray([0.5, 1.0, 2.0], np.float32)
    layout = {"experts": optax_normuon.MatrixLayout(1, 2), "bias": None}
    updates = [
        tx.update(params, tx.init(params), params)[0]["experts"]["kernel"]
        for tx in (
            normuon(
                0.1, **QUICK, layout=layout, lr_mul=multipliers_by_path({"experts/*": per_matrix})
            ),
            normuon(0.1, **QUICK, layout=layout),
        )
    ]
    np.testing.assert_allclose(updates[0], updates[1] * per_matrix[:, None, None], rtol=1e-6)


def test_a_pattern_that_meets_no_leaf_is_refused():
    tx = normuon(0.1, **QUICK, lr_mul=multipliers_by_path({"*embde*": 0.1}))
    with pytest.raises(ValueError, match=r"pattern '\*embde\*' meets no leaf; .*embed/embedding"):
        tx.init(draw(0))


def test_patterns_may_be_about_leaves_that_are_masked_away():
    factors = multipliers_by_path({"embed/*": 0.1, "*kernel": 0.5})
    whole, _ = run(normuon(0.1, **QUICK, lr_mul=factors))
    masked, _ = run(
        optax.masked(normuon(0.1, **QUICK, lr_mul=factors), {"embed": False, "dense": True})
    )
    # Another program is compiled anew and may round otherwise.
    chex.assert_trees_all_close(masked["dense"], whole["dense"], rtol=1e-6)
    parts = {
        "own": normuon(0.1, **QUICK, lr_mul=factors),
        "rest": normuon(0.1, **QUICK, lr_mul=factors),
    }
    chex.assert_trees_all_close(run(optax.partition(parts, labels))[0], whole, rtol=1e-6)
    assert not np.allclose(
        whole["dense"]["kernel"], run(normuon(0.1, **QUICK))[0]["dense"]["kernel"]
    )
