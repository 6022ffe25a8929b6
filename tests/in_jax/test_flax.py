"""Training Flax models: NNX's Optimizer and Linen's TrainState around the same transformation."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

from optax_normuon import MatrixLayout, describe, layout_by_path, normuon, with_bf16_remainder
from tests.in_jax.tables import leaf_rows
from tests.in_jax.trees import random_tree

INPUTS = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
TARGETS = np.tanh(INPUTS @ np.random.default_rng(1).normal(size=(8, 3)).astype(np.float32))


class MLP(nnx.Module):
    """A first layer, a stack of two hidden ones applied by scan, and an output head.

    All matrices have one shape, which compiles fastest.
    """

    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def stacked(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.entry = nnx.Linear(8, 8, rngs=rngs)
        self.hidden_linear = stacked(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

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


def arrays(tree) -> Any:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def one_step(tx, gradients, params) -> Any:
    """Updates and state after the first step."""
    return tx.update(gradients, tx.init(params), params)


def train(model, optimizer, steps) -> Any:
    """The loss before each step and after the last."""

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(mean_square)(model)
        optimizer.update(model, gradients)
        return loss

    return [float(step(model, optimizer)) for _ in range(steps)] + [float(mean_square(model))]


def optimizers_by_leaf(params):
    """The table of `describe` as {path: optimizer}."""
    return {path: row["optimizer"] for path, row in leaf_rows(describe(params)).items()}


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
    before = arrays(nnx.state(model, nnx.Param))
    tx = optax.chain(optax.clip_by_global_norm(1.0), normuon(0.05, adam_learning_rate=0.02))
    losses = train(model, nnx.Optimizer(model, tx, wrt=nnx.Param), steps=30)
    assert losses[-1] < 0.2 * losses[0]
    after = arrays(nnx.state(model, nnx.Param))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


class StackAndLinear(nnx.Module):
    """A model whose leaves are those of `draw`: a stack of three matrices, a matrix and a vector."""

    def __init__(self, dtype=jnp.float32):
        tree = draw(0, dtype)
        self.dense = nnx.Linear(8, 4, param_dtype=dtype, rngs=nnx.Rngs(0))
        self.dense.kernel[...] = tree["dense"]["kernel"]
        self.up = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
        self.up.kernel = nnx.Param(tree["up"]["kernel"])


def draw(seed, dtype=jnp.float32) -> Any:
    shapes = {"dense": {"bias": (4,), "kernel": (8, 4)}, "up": {"kernel": (3, 4, 8)}}
    return random_tree(shapes, seed, dtype)


def test_a_step_through_nnx_is_a_step_through_optax():
    model = StackAndLinear()
    tx = normuon(0.1, weight_decay=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    first, state = jax.tree.leaves(params), tx.init(params)
    for seed in (1, 2):
        gradients = nnx.state(StackAndLinear(), nnx.Param)
        nnx.replace_by_pure_dict(gradients, draw(seed))
        optimizer.update(model, gradients)
        updates, state = tx.update(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Param)), params)
    chex.assert_trees_all_equal(arrays(optimizer.opt_state), arrays(state))
    assert all(not np.array_equal(a, b) for a, b in zip(first, arrays(params), strict=True))


def test_paths_of_nnx_parameters_are_written_without_the_variables_value():
    layout = layout_by_path({"dense/kernel": MatrixLayout(1, 0), "up/*": None})
    table = describe(nnx.state(StackAndLinear(), nnx.Param), layout)
    assert "dense/kernel  8x4    1 x (8, 4)            NorMuon" in table
    assert "up/kernel     3x4x8                        AdamW" in table


def test_the_bf16_remainder_works_in_an_nnx_optimizer():
    model, gradients = StackAndLinear(jnp.bfloat16), nnx.state(StackAndLinear(), nnx.Param)
    nnx.replace_by_pure_dict(gradients, draw(1, jnp.bfloat16))
    tx = with_bf16_remainder(normuon(0.01, compute_dtype=jnp.float32))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = arrays(nnx.state(model, nnx.Param))
    with jax.numpy_dtype_promotion("standard"):  # Optax adds the float32 update to a bf16 weight
        nnx.jit(nnx.Optimizer.update)(optimizer, model, gradients)
    after = arrays(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in after} == {jnp.dtype("bfloat16")}
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


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
    state = state.replace(
        step=jnp.zeros([], jnp.int32)
    )  # Flax starts from Python's 0, another type

    def loss_of(params):
        return mean_square(lambda x: model.apply({"params": params}, x))

    def step(state):
        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    jitted: Any = jax.jit(step)
    for _ in range(30):
        state, loss = jitted(state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]
    assert jitted._cache_size() == 1
    assert state.step == 30


def test_a_step_through_a_train_state_is_a_step_through_optax():
    params, gradients = draw(0), draw(1)
    tx = normuon(0.1, weight_decay=0.1)
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.apply_gradients(grads=gradients)
    updates, opt_state = one_step(tx, gradients, params)
    chex.assert_trees_all_equal(state.params, optax.apply_updates(params, updates))
    chex.assert_trees_all_equal(state.opt_state, opt_state)
    moved = jax.tree.map(lambda a, b: not jnp.array_equal(a, b), state.params, params)
    assert all(jax.tree.leaves(moved))
