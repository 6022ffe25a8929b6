"""`optax_normuon.apply`: the bits of `update` and `apply_updates`, added in the kernels if it may be."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import optax_normuon
from normuon_core import MatrixLayout
from optax_normuon.kernels import launcher
from tests.in_jax.engines import KERNELS

SPLIT = MatrixLayout(0, 1, output_splits=(4, 4, 2))
LAYOUT = {"w": MatrixLayout(0, 1), "split": SPLIT, "bias": None}
MATRICES = 2


def normuon(**keywords):
    return optax_normuon.normuon(
        0.1, layout=LAYOUT, weight_decay=0.2, adam_learning_rate=0.3, **KERNELS | keywords
    )


def draw(seed: int, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"w": (6, 10), "split": (6, 10), "bias": (7,)}
    return {name: jnp.asarray(rng.standard_normal(s), dtype) for name, s in shapes.items()}


@pytest.fixture(autouse=True)
def as_users_promote():
    """Some of Optax's own transformations need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def finished(monkeypatch, interpreted):
    """For each launch of the last kernel how many weights it covers, and whether it adds."""
    found = []
    original = launcher.launch

    def launch(own, inputs):
        if own.kernel.__name__ == "finish":
            found.append((own.constants["LEAVES"], own.constants["ADD"]))
        return original(own, inputs)

    monkeypatch.setattr(launcher, "launch", launch)
    return found


def two_ways(tx, dtype=jnp.float32, steps=1):
    """After some steps (parameters, state) by `update` and `apply_updates`, and by `apply`."""
    results = []
    for apply in (_update_and_add, optax_normuon.apply):
        params = draw(0, dtype)
        state = tx.init(params)
        # Not jitted as a whole: every launch is to be seen once a step.
        for seed in range(1, steps + 1):
            params, state = apply(tx, draw(seed, dtype), state, params)
        results.append((params, state))
    return results


def _update_and_add(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def added(finished) -> list[bool]:
    return [adds for _, adds in finished]


ENDS_IN_OURS: dict[str, Callable] = {
    "alone": normuon,
    "behind clipping": lambda: optax.chain(optax.clip_by_global_norm(1.0), normuon()),
    "named": lambda: optax.named_chain(("clip", optax.clip(1.0)), ("ours", normuon())),
    "injected": lambda: optax_normuon.inject_hyperparams(optax_normuon.normuon)(
        0.1, layout=LAYOUT, weight_decay=0.2, adam_learning_rate=0.3, **KERNELS
    ),
    "masked": lambda: optax.masked(normuon(), {"w": True, "split": True, "bias": True}),
    "with extra arguments": lambda: optax.with_extra_args_support(normuon()),
}

DOES_NOT: dict[str, Callable] = {
    "scaled behind": lambda: optax.chain(normuon(), optax.scale(0.5)),
    "kept in a state": lambda: optax.chain(normuon(), _keeping(lambda u: u)),
    "measured in a state": lambda: optax.chain(normuon(), _keeping(optax.global_norm)),
    "every step of one": lambda: optax.MultiSteps(normuon(), 1).gradient_transformation(),
    "unless not finite": lambda: optax.apply_if_finite(normuon(), 3),
    "of other parameters": lambda: _on_other_parameters(normuon()),
    "compiled by itself": lambda: _compiled(normuon()),
}


def _keeping(what: Callable) -> optax.GradientTransformation:
    """Hands updates on as they are, and keeps something of them."""

    def update(updates, state, params=None):
        del state, params
        return updates, what(updates)

    return optax.GradientTransformation(
        lambda params: what(jax.tree.map(jnp.zeros_like, params)), update
    )


def _on_other_parameters(tx) -> optax.GradientTransformation:
    """Gives the transformation other weights than those that its updates are added to."""

    def update(updates, state, params=None):
        return tx.update(updates, state, jax.tree.map(lambda p: 2 * p, params))

    return optax.GradientTransformation(tx.init, update)


def _compiled(tx) -> optax.GradientTransformation:
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


@pytest.mark.parametrize("name", ENDS_IN_OURS)
def test_a_chain_that_ends_in_ours_is_added_in_the_kernels(finished, name):
    tx = ENDS_IN_OURS[name]()
    expected, found = two_ways(tx)
    assert_same_bits(found, expected)
    half = len(finished) // 2
    assert not any(added(finished[:half]))
    assert all(added(finished[half:]))
    assert half > 0


@pytest.mark.parametrize("name", DOES_NOT)
def test_an_update_that_something_else_reads_is_handed_out(finished, name):
    tx = DOES_NOT[name]()
    expected, found = two_ways(tx)
    assert_same_bits(found, expected)
    assert finished
    assert not any(added(finished))


def test_a_partition_is_added_where_it_is_ours(finished):
    def both():
        ours = optax_normuon.normuon(0.1, layout=LAYOUT, **KERNELS)
        halved = optax.chain(optax_normuon.normuon(0.1, layout=LAYOUT, **KERNELS), optax.scale(0.5))
        return optax.partition(
            {"ours": ours, "halved": halved}, {"w": "ours", "split": "halved", "bias": "ours"}
        )

    expected, found = two_ways(both())
    assert_same_bits(found, expected)
    assert {*added(finished)} == {True, False}


@pytest.mark.parametrize("name", ["alone", "behind clipping"])
def test_the_joined_weight_of_a_remainder_is_stepped_in_place(finished, name):
    """Within `update` too: the float32 weight is the wrapper's own, and it alone reads the update."""
    tx = optax_normuon.with_bf16_remainder(ENDS_IN_OURS[name]())
    expected, found = two_ways(tx, jnp.bfloat16)
    assert_same_bits(found, expected)
    assert finished
    assert all(added(finished))


def test_a_remainder_beside_float32_leaves_hands_their_updates_out(finished):
    tx = optax_normuon.with_bf16_remainder(normuon())
    params = draw(0) | {"w": draw(0)["w"].astype(jnp.bfloat16)}
    grads = draw(1) | {"w": draw(1)["w"].astype(jnp.bfloat16)}
    state = tx.init(params)
    assert_same_bits(
        optax_normuon.apply(tx, grads, state, params), _update_and_add(tx, grads, state, params)
    )
    assert {*added(finished)} == {True, False}


def test_a_tree_with_holes_is_stepped_in_place(finished):
    """A model filtered for its arrays has None elsewhere, and a frozen part may have no gradients."""
    ours = optax_normuon.normuon(0.1, layout=MatrixLayout(0, 1), **KERNELS)
    tx = optax_normuon.with_bf16_remainder(ours)
    w = draw(0, jnp.bfloat16)["w"]
    params = {"activation": None, "frozen": w, "w": w + 1, "z": {"none": None}}
    grads = {
        "activation": None,
        "frozen": None,
        "w": draw(1, jnp.bfloat16)["w"],
        "z": {"none": None},
    }
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["frozen"] is None
    assert added(finished) == [True]


def test_an_array_that_is_two_parameters_is_added_outside(finished):
    tx = optax_normuon.normuon(0.1, layout=MatrixLayout(0, 1), **KERNELS)
    tied = draw(0)["w"]
    params = {"a": tied, "b": tied}
    grads = {"a": draw(1)["w"], "b": draw(2)["w"]}
    state = tx.init(params)
    found = optax_normuon.apply(tx, grads, state, params)
    assert not any(added(finished))
    assert_same_bits(found, _update_and_add(tx, grads, state, params))


@pytest.mark.parametrize("wrap", ["jitted", "vmapped"])
def test_a_program_around_it_changes_nothing(finished, wrap):
    tx = normuon()
    params, grads = draw(0), draw(1)
    if wrap == "vmapped":
        params, grads = (jax.tree.map(lambda x: jnp.stack([x, 3 * x]), t) for t in (params, grads))
        state = jax.vmap(tx.init)(params)
    else:
        state = tx.init(params)

    def run(way):
        def step(g, s, p):
            return way(tx, g, s, p)

        wrapped = jax.jit(step) if wrap == "jitted" else jax.vmap(step)
        return wrapped(grads, state, params)

    expected = run(_update_and_add)
    del finished[:]
    assert_same_bits(run(optax_normuon.apply), expected)
    assert all(added(finished))


def test_on_a_mesh_each_device_adds_to_its_part(finished):
    mesh = jax.make_mesh((4,), ("fsdp",))
    specs = {"w": P(None, "fsdp"), "split": P(None, None), "bias": P()}
    tx = normuon(param_specs=specs)
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 12), "split": (6, 10), "bias": (7,)}
    params, grads = (
        {n: jnp.asarray(rng.standard_normal(s), jnp.float32) for n, s in shapes.items()}
        for _ in range(2)
    )
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        expected = jax.jit(functools.partial(_update_and_add, tx))(grads, state, params)
        del finished[:]
        found = jax.jit(functools.partial(optax_normuon.apply, tx))(grads, state, params)
    assert_same_bits(found, expected)
    assert finished
    assert all(added(finished))


class InPlace(nnx.Optimizer):
    """As docs/training.md and README show it."""

    def update(self, model, grads, /, **extra):
        params, own = (nnx.as_pure(nnx.state(each, self.wrt)) for each in (model, grads))
        params, state = optax_normuon.apply(
            self.tx, own, nnx.as_pure(self.opt_state), params, **extra
        )
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(state))
        self.step[...] += 1


def test_an_nnx_optimizer_that_steps_in_place(finished):
    def trained(kind):
        model = nnx.Linear(6, 10, rngs=nnx.Rngs(0))
        tx = optax_normuon.normuon(0.1, adam_learning_rate=0.3, **KERNELS)
        optimizer = kind(model, tx, wrt=nnx.Param)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6)), jnp.float32)

        @nnx.jit
        def step(model, optimizer):
            grads = nnx.grad(lambda m: (m(x) ** 2).mean())(model)
            optimizer.update(model, grads)

        for _ in range(2):
            step(model, optimizer)
        return nnx.state(model), nnx.state(optimizer)

    expected = trained(nnx.Optimizer)
    del finished[:]
    assert_same_bits(jax.tree.leaves(trained(InPlace)), jax.tree.leaves(expected))
    assert all(added(finished))


@pytest.mark.parametrize(
    "tx",
    [optax.adamw(0.1), optax_normuon.normuon(0.1, layout=LAYOUT, **KERNELS | {"backend": "xla"})],
    ids=["optax.adamw", "normuon by XLA"],
)
def test_without_kernels_it_is_the_two_calls(tx):
    expected, found = two_ways(tx)
    assert_same_bits(found, expected)


def test_without_parameters_it_says_what_optax_says():
    tx = normuon(backend="xla")
    with pytest.raises(ValueError, match="params"):
        optax_normuon.apply(tx, draw(1), tx.init(draw(0)), None)
