"""Every container that people keep parameters in, through everything that people do to an optimizer.

The numbers of every cell are those of the same arrays in a dict, stepped eagerly.
"""

import dataclasses
import functools
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from normuon_core import RECIPES, Polar
from normuon_core.polynomials import POLAR_EXPRESS
from optax_normuon import apply, describe, muon, normuon, state_specs, with_bf16_remainder
from tests.in_jax.containers import CONTAINERS, draw, factors, layouts, specs
from tests.in_jax.meshes import mesh_of

# One step of the iteration: the tables are about trees, and one step compiles fastest.
SHORT = dataclasses.replace(RECIPES["normuon"], polar=Polar(POLAR_EXPRESS[:1]))
SEEDS = (1, 2)


def optimizer(tree, learning_rate=0.1, **keywords):
    """NorMuon with every tree of settings in the class of the parameters."""
    return normuon(
        learning_rate,
        recipe=SHORT,
        weight_decay=0.1,
        layout=layouts(tree),
        lr_mul=factors(tree),
        compute_dtype=jnp.float32,
        **keywords,
    )


def step(tx, gradients, state, params) -> Any:
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def eagerly(container):
    params = draw(container, 0)
    tx = optimizer(params)
    state = tx.init(params)
    for seed in SEEDS:
        params, state = step(tx, draw(container, seed), state, params)
    return params, state


def jitted(container):
    params = draw(container, 0)
    tx = optimizer(params)
    state = jax.jit(tx.init)(params)
    compiled: Any = jax.jit(functools.partial(step, tx))
    for seed in SEEDS:
        params, state = compiled(draw(container, seed), state, params)
    assert compiled._cache_size() == 1
    return params, state


def from_abstract_values(container):
    """The state's types are known without arrays, and are those that `init` and `update` make."""
    params = draw(container, 0)
    tx = optimizer(params)
    abstract = jax.eval_shape(lambda: draw(container, 0))
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tx.init, abstract))
    chex.assert_trees_all_equal(state, tx.init(params))
    for seed in SEEDS:
        params, state = step(tx, draw(container, seed), state, params)
    return params, state


def in_a_scan(container):
    params = draw(container, 0)
    tx = optimizer(params)
    gradients = jax.tree.map(lambda *each: jnp.stack(each), *(draw(container, s) for s in SEEDS))

    def body(carry, gradient):
        params, state = carry
        return step(tx, gradient, state, params), None

    carry, _ = jax.lax.scan(body, (params, tx.init(params)), gradients)
    return carry


def over_rates(container):
    """The second of two runs that `vmap` makes at once."""
    params = draw(container, 0)

    def run(rate):
        tx, own = optimizer(params, rate), params
        state = tx.init(own)
        for seed in SEEDS:
            own, state = step(tx, draw(container, seed), state, own)
        return own, state

    both = jax.vmap(run)(jnp.asarray([0.2, 0.1], jnp.float32))
    return jax.tree.map(lambda leaf: leaf[1], both)


def compiled_alike(tx, state, params):
    """`step` as a program that returns leaves: the same for every container, and so compiled once.

    What names a result stands in the program.
    """
    structure = jax.tree.structure((params, state))

    @jax.jit
    def leaves_of_step(*arguments):
        result = step(tx, *arguments)
        assert jax.tree.structure(result) == structure
        return jax.tree.leaves(result)

    return lambda *arguments: structure.unflatten(leaves_of_step(*arguments))


def on_a_mesh(container, *, mode):
    mesh = mesh_of(mode, fsdp=2, tp=4)
    params = draw(container, 0)
    own = specs(params)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        jax.tree.leaves(own, is_leaf=lambda node: isinstance(node, jax.P)),
    )

    def put(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(map(jax.device_put, leaves, shardings))

    params = put(params)
    tx = optimizer(params, param_specs=own if mode == AxisType.Auto else None)
    with jax.set_mesh(mesh):
        state = tx.init(params)
        compiled = compiled_alike(tx, state, params)
        for seed in SEEDS:
            params, state = compiled(put(draw(container, seed)), state, params)
        moments = optax.tree.get(state, "second_moment")
        for moment in jax.tree.leaves(moments):
            assert moment.sharding.spec in (jax.P(None, "tp"), jax.P(None, None, "tp"))
    return jax.device_get((params, state))


def through_orbax(container, path):
    """The state saved after the first step, read into the state that `init` makes, for the second."""
    params = draw(container, 0)
    tx = optimizer(params)
    first, state = step(tx, draw(container, 1), tx.init(params), params)
    leaves, structure = jax.tree.flatten((first, state))
    with ocp.StandardCheckpointer() as checkpointer:
        # As Flax's and Equinox's own guides do it: arrays with names, by the tree's paths.
        names = [
            jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path((first, state))
        ]
        checkpointer.save(path, dict(zip(names, leaves, strict=True)))
        checkpointer.wait_until_finished()
        target = jax.tree.leaves((params, tx.init(params)))
        restored = checkpointer.restore(path, dict(zip(names, target, strict=True)))
    first, state = structure.unflatten(restored[name] for name in names)
    return step(tx, draw(container, 2), state, first)


def by_apply(container):
    params = draw(container, 0)
    tx = optimizer(params)
    state = tx.init(params)
    for seed in SEEDS:
        params, state = apply(tx, draw(container, seed), state, params)
    return params, state


WAYS = {
    "eager": eagerly,
    "apply": by_apply,
    "jit": jitted,
    "abstract": from_abstract_values,
    "scan": in_a_scan,
    "vmap": over_rates,
    "automatic mesh": functools.partial(on_a_mesh, mode=AxisType.Auto),
    "explicit mesh": functools.partial(on_a_mesh, mode=AxisType.Explicit),
    "orbax": through_orbax,
}


@functools.cache
def expected():
    return [np.asarray(leaf) for leaf in jax.tree.leaves(eagerly("dict"))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_makes_the_steps_of_a_dict(container, way, tmp_path):
    arguments = (tmp_path / "state",) if way == "orbax" else ()
    after = WAYS[way](container, *arguments)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(after)]
    # Compiled as a whole, XLA fuses and rounds otherwise: 1.03e-7 (1 + |x|) at most.
    chex.assert_trees_all_close(leaves, expected(), rtol=4e-7, atol=4e-7)
    params = draw(container, 0)
    assert jax.tree.structure(after[0]) == jax.tree.structure(params)
    for leaf in jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), after[0], params)):
        assert not leaf


def with_a_remainder(container, way):
    params = draw(container, 0, jnp.bfloat16)
    tx = with_bf16_remainder(optimizer(params))
    state = tx.init(params)
    # Its updates of bfloat16 parameters are float32.
    with jax.numpy_dtype_promotion("standard"):
        for seed in SEEDS:
            params, state = way(tx, draw(container, seed, jnp.bfloat16), state, params)
    return params, state


@functools.cache
def expected_with_a_remainder():
    return jax.tree.leaves(with_a_remainder("dict", step))


@pytest.mark.parametrize("way", [step, apply], ids=["update", "apply"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_keeps_a_remainder(container, way):
    after = with_a_remainder(container, way)
    chex.assert_trees_all_equal(jax.tree.leaves(after), expected_with_a_remainder())
    assert jax.tree.structure(after[0]) == jax.tree.structure(draw(container, 0))


@pytest.mark.parametrize("container", CONTAINERS)
def test_describe_takes_trees_of_the_models_own_class(container):
    params = draw(container, 0)
    table = describe(params, layouts(params), param_specs=specs(params), mesh=mesh_of(fsdp=2, tp=4))
    assert "1 x (12, 6)" in table
    assert "2 x (12, 6)" in table
    assert "layout: None" in table
    # In bytes: 216 entries of momentum, a second moment of 12 + 24; two moments of 12.
    normuon_row, adamw_row = (
        next(line for line in table.splitlines() if line.startswith(name))
        for name in ("NorMuon", "AdamW")
    )
    assert "momentum 864, second moment 144" in normuon_row
    assert "first moment 48, second moment 48" in adamw_row


def test_describe_names_the_others_where_they_are_not_adamw():
    table = describe(draw("dict", 0), layouts, others=optax.sgd(0.1, momentum=0.9))
    rows = [line.split() for line in table.splitlines()]
    assert ["bias", "12", "others", "layout:", "None"] in rows
    assert any(row[:2] == ["others", "1"] and "trace" in row for row in rows)


@pytest.mark.parametrize("container", CONTAINERS)
def test_state_specs_divide_what_the_parameters_divide_and_no_reduced_axis(container):
    params = draw(container, 0)
    tx = optimizer(params)
    found = state_specs(tx, params, specs(params))
    state = tx.init(params)
    assert jax.tree.structure(found, is_leaf=lambda n: isinstance(n, jax.P)) == jax.tree.structure(
        state
    )
    by_shape = {
        (12,): jax.P("tp"),
        (6, 12): jax.P("fsdp", "tp"),
        (2, 6, 12): jax.P(None, "fsdp", "tp"),
        (1, 12): jax.P(None, "tp"),
        (2, 1, 12): jax.P(None, None, "tp"),
        (): jax.P(),
    }
    leaves = zip(
        jax.tree.leaves(found, is_leaf=lambda n: isinstance(n, jax.P)),
        jax.tree.leaves(state),
        strict=True,
    )
    for spec, leaf in leaves:
        assert spec == by_shape[leaf.shape]


def test_a_prefix_may_be_given_for_a_subtree_of_any_class():
    params = {"model": draw("Equinox", 0), "other": draw("tuple", 0)}
    tree = {"model": layouts(params["model"]), "other": None}
    tx = normuon(0.1, recipe=SHORT, layout=tree, compute_dtype=jnp.float32)
    moments = optax.tree.get(tx.init(params), "second_moment")
    assert [leaf.shape for leaf in jax.tree.leaves(moments)] == [(1, 12), (2, 1, 12)]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"w": None}}, "at the root layout has 'a' and no 'b'"),
        ({"a": {"v": None}, "b": None}, "at a layout has 'v' and no 'w'"),
        ({"a": None, "b": None, "c": None}, "layout has 'c', but there is only 'a', 'b'"),
        ({"a": {"w": {"x": None}}, "b": None}, "at a/w there is a leaf, but layout has 'x'"),
    ],
)
def test_a_tree_that_does_not_fit_says_where(tree, message):
    params = {"a": {"w": jnp.ones((4, 6))}, "b": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match=message):
        normuon(0.1, layout=tree).init(params)


# Models, as their frameworks train them


INPUTS = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32))


def losses_of(loss_of, params, tx, apply_updates=optax.apply_updates):
    state = tx.init(params)

    @jax.jit
    def train(params, state):
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return apply_updates(params, updates), state, loss

    losses = []
    for _ in range(30):
        params, state, loss = train(params, state)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("make", [normuon, muon])
def test_an_equinox_model_learns(make):
    model = eqx.nn.MLP(8, 3, 8, 2, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss_of(params):
        outputs = jax.vmap(eqx.combine(params, rest))(INPUTS)
        return jnp.mean(jnp.square(outputs - TARGETS))

    tx = make(0.05, adam_learning_rate=0.02)
    losses = losses_of(loss_of, params, tx, eqx.apply_updates)
    assert losses[-1] < 0.2 * losses[0]


def test_a_haiku_model_learns():
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 8, 3])(x)))
    with jax.numpy_rank_promotion("allow"):  # Haiku adds a vector of biases to a batch
        params = model.init(jax.random.key(0), INPUTS)

    def loss_of(params):
        with jax.numpy_rank_promotion("allow"):
            return jnp.mean(jnp.square(model.apply(params, INPUTS) - TARGETS))

    losses = losses_of(loss_of, params, normuon(0.05, adam_learning_rate=0.02))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    "tx",
    [normuon(0.1), optax.chain(optax.clip_by_global_norm(1.0), muon(0.1))],
    ids=["alone", "chain"],
)
def test_a_model_that_was_not_filtered_is_refused_by_the_name_of_its_first_leaf(tx):
    model = eqx.nn.MLP(8, 3, 8, 2, key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"activation: a leaf of type .* is no array.*eqx\.filter"):
        tx.init(model)
    with pytest.raises(TypeError, match=r"1: a leaf of type float is no array.*jnp\.asarray"):
        with_bf16_remainder(normuon(0.1)).init((jnp.ones(3), 1.0))


# Flax's parameters with sharding metadata, by the recipes of Flax's guides


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tp"))
        return nn.Dense(16, use_bias=False, kernel_init=init, name="up")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tp"))
        self.up = nnx.Linear(8, 16, use_bias=False, kernel_init=init, rngs=rngs)


OPTIMIZERS = {
    "normuon": normuon(0.1, recipe=SHORT),
    "remainder": with_bf16_remainder(normuon(0.1, recipe=SHORT)),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), normuon(0.1, recipe=SHORT)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_boxed_linen_parameters_and_their_state_lie_on_a_mesh(name):
    mesh, tx = mesh_of(AxisType.Auto, fsdp=2, tp=4), OPTIMIZERS[name]

    def init():
        params = Linen().init(jax.random.key(0), jnp.ones((2, 8)))["params"]
        return params, tx.init(params)

    with jax.set_mesh(mesh):
        wanted = nn.get_partition_spec(jax.eval_shape(init))
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec), wanted, is_leaf=lambda s: isinstance(s, jax.P)
        )
        params, state = jax.jit(init, out_shardings=shardings)()
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.cos, params), state, params)
    assert updates["up"]["kernel"].names == ("fsdp", "tp")
    momentum = optax.tree.get(state, "momentum")["up"]["kernel"]
    assert momentum.value.sharding.spec == jax.P("fsdp", "tp")
    assert optax.tree.get(state, "second_moment")["up"]["kernel"].shape == (1, 16)


@pytest.mark.parametrize(
    ("mode", "name"),
    [(AxisType.Explicit, "normuon"), *((AxisType.Auto, name) for name in OPTIMIZERS)],
)
def test_nnx_parameters_with_partitioning_and_their_state_lie_on_a_mesh(mode, name):
    with jax.set_mesh(mesh_of(mode, fsdp=2, tp=4)):
        model = Nnx(nnx.Rngs(0))
        before = np.asarray(model.up.kernel[...])
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)

        @nnx.jit
        def train(model, optimizer):
            optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))

        train(model, optimizer)
        after = model.up.kernel[...]
    assert after.sharding.spec == jax.P("fsdp", "tp")
    assert not np.array_equal(before, after)
