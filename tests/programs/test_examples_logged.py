"""What a step logs comes off the device as one array, and is what it was."""

import jax
import jax.numpy as jnp
import numpy as np

from examples.gpt import GPTConfig
from examples.logged import Logged
from examples.losses import next_token
from examples.optimizers import OptimizerConfig
from examples.step import Setup, compiled_step, first_state, shapes_of


def test_a_tree_comes_back_with_every_number():
    tree = {
        "loss": jnp.float32(1 / 3),
        "matrices": {
            "b": {"error": jnp.array([0.25, 1e-30]), "none": jnp.zeros([0])},
            "a": {"error": jnp.arange(3.0)},
        },
    }
    logged = jax.device_get(jax.jit(Logged.of)(tree))
    assert isinstance(logged.numbers, np.ndarray)
    assert logged.as_tree() == jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), tree)


def test_a_step_with_diagnostics_of_every_matrix_gives_one_array_more():
    model = GPTConfig(width=16, depth=1, heads=2, kv_heads=1, context=8)
    optimizer = OptimizerConfig("normuon", learning_rate=0.02, adam_learning_rate=0.01)
    setup, batch = Setup(model, optimizer, 10, next_token), {"tokens": jnp.ones((2, 9), jnp.int32)}
    step = compiled_step(setup, shapes_of(batch), frozen=False, diagnostics=True)
    _, logged = step(first_state(setup, 0), None, batch)
    assert [leaf.ndim for leaf in jax.tree.leaves(logged)] == [1]
    matrices = logged.as_tree()["matrices"]
    assert len(matrices) == 6
    assert {len(numbers) for numbers in matrices.values()} == {5}
