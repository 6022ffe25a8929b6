"""Training Flax models: NNX's Optimizer and Linen's TrainState around the same transformation."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from optax_normuon import describe, layout_by_path, normuon, with_bf16_remainder

INPUTS = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32))


class MLP(nnx.Module):
    """A first layer, a stack of two hidden ones applied by scan, and an output head."""

    def __init__(self, rngs, dtype=jnp.float32):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def stacked(rngs):
            return nnx.Linear(8, 8, param_dtype=dtype, rngs=rngs)

        self.entry = nnx.Linear(6, 8, param_dtype=dtype, rngs=rngs)
        self.hidden_linear = stacked(rngs)
        self.head = nnx.Linear(8, 3, param_dtype=dtype, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(layer, x):
            return nnx.tanh(layer(x))

        return self.head(through(self.hidden_linear, nnx.tanh(self.entry(x))))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8)(x)), None


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = stack()(nn.tanh(nn.Dense(8)(x)), None)
        return nn.Dense(3, name="head")(x)


def mean_square(model):
    with jax.numpy_rank_promotion("allow"):  # Flax adds a vector of biases to a batch
        return jnp.mean(jnp.square(model(INPUTS) - TARGETS))


def train(model, optimizer, steps):
    """The loss before each step and after the last."""

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(mean_square)(model)
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer)) for _ in range(steps)] + [float(mean_square(model))]


def optimizers_by_leaf(params):
    """The table of `describe` as {path: optimizer}."""
    lines = describe(params).splitlines()[2:]
    return {
        line.split()[0]: "NorMuon" if "  NorMuon " in line else "AdamW" for line in lines
    }


def test_an_nnx_model_learns():
    model = MLP(nnx.Rngs(0))
    assert optimizers_by_leaf(nnx.state(model, nnx.Param)) == {
        "entry/bias": "AdamW",
        "entry/kernel": "NorMuon",
        "head/bias": "AdamW",
        "head/kernel": "AdamW",
        "hidden_linear/bias": "AdamW",
        "hidden_linear/kernel": "NorMuon",
    }
    before = nnx.state(model, nnx.Param)
    tx = optax.chain(optax.clip_by_global_norm(1.0), normuon(0.05, adam_learning_rate=0.02))
    losses = train(model, nnx.Optimizer(model, tx, wrt=nnx.Param), steps=30)
    assert losses[-1] < 0.2 * losses[0]
    moved = jax.tree.map(lambda a, b: not jnp.array_equal(a, b), before, nnx.state(model, nnx.Param))
    assert all(jax.tree.leaves(moved))

    standing = MLP(nnx.Rngs(0))
    stood = train(standing, nnx.Optimizer(standing, normuon(0.0), wrt=nnx.Param), steps=2)
    assert stood[0] == pytest.approx(losses[0]) == stood[-1]


def test_a_step_through_nnx_is_a_step_through_optax():
    model = MLP(nnx.Rngs(0))
    tx = normuon(0.1, weight_decay=0.1, compute_dtype=jnp.float32)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        gradients = nnx.grad(mean_square)(model)
        optimizer.update(model, gradients)
        updates, state = tx.update(nnx.to_pure_dict(gradients), state, params)
        params = optax.apply_updates(params, updates)
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(after, params)
    chex.assert_trees_all_equal(
        [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(optimizer.opt_state)))],
        [np.asarray(leaf) for leaf in jax.tree.leaves(state)],
    )
    start = nnx.to_pure_dict(nnx.state(MLP(nnx.Rngs(0)), nnx.Param))
    differ = jax.tree.map(lambda a, b: not jnp.array_equal(a, b), params, start)
    assert all(jax.tree.leaves(differ))


def test_nnx_layouts_by_path_and_the_bf16_remainder_work_in_an_nnx_optimizer():
    model = MLP(nnx.Rngs(0), dtype=jnp.bfloat16)
    layout = layout_by_path({"head/kernel": None, "*/kernel": None})
    tx = with_bf16_remainder(normuon(0.01, layout=layout))
    with jax.numpy_dtype_promotion("standard"):  # Flax multiplies bf16 weights and float32 inputs
        losses = train(model, nnx.Optimizer(model, tx, wrt=nnx.Param), steps=3)
    assert losses[-1] < losses[0]
    chex.assert_trees_all_equal_dtypes(
        nnx.state(model, nnx.Param), nnx.state(MLP(nnx.Rngs(0), dtype=jnp.bfloat16), nnx.Param)
    )


def test_a_linen_model_learns_in_a_train_state():
    model = LinenMLP()
    with jax.numpy_rank_promotion("allow"):  # Flax adds a vector of biases to a batch
        variables = model.init(jax.random.key(0), INPUTS)
    params = variables["params"]
    routes = optimizers_by_leaf(params)
    assert [path for path, name in routes.items() if name == "NorMuon"] == [
        "Dense_0/kernel",
        "ScanLayer_0/Dense_0/kernel",
    ]
    tx = normuon(0.05, adam_learning_rate=0.02)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

    def loss_of(params):
        return mean_square(lambda x: model.apply({"params": params}, x))

    @jax.jit
    def step(state):
        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert step._cache_size() == 1
    assert state.step == 30


def test_a_step_through_a_train_state_is_a_step_through_optax():
    random = np.random.default_rng(2)
    shapes = {"up": {"kernel": (3, 4, 8)}, "dense": {"kernel": (8, 4), "bias": (4,)}}
    params, gradients = (
        jax.tree.map(
            lambda shape: jnp.asarray(random.normal(size=shape), jnp.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        for _ in range(2)
    )
    tx = normuon(0.1, weight_decay=0.1)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=gradients)
    updates, opt_state = tx.update(gradients, tx.init(params), params)
    chex.assert_trees_all_equal(state.params, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal(state.opt_state, opt_state)
    other = state.apply_gradients(grads=gradients)
    assert not jnp.array_equal(other.params["up"]["kernel"], state.params["up"]["kernel"])
