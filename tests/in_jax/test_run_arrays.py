"""The state of an Optax transformation as named arrays, and back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from normuon_core.moving.format import read_metadata
from optax_normuon import (
    MatrixLayout,
    normuon,
    parameter_shapes,
    parameters_from_arrays,
    parameters_to_arrays,
    scale_by_normuon,
    state_from_arrays,
    state_to_arrays,
    with_bf16_remainder,
)
from tests.in_jax.meshes import mesh_of

KEYWORDS: dict[str, Any] = {"adam_learning_rate": 3e-3, "compute_dtype": jnp.float32}


def tree(dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return {
        "up": {"kernel": draw(8, 16), "bias": draw(16)},
        "blocks": {"down": {"kernel": draw(4, 16, 8)}},
        "embed": {"embedding": draw(8, 4)},
    }


LAYOUT = {
    "up": {"kernel": MatrixLayout(0, 1, output_splits=(8, 4, 4)), "bias": None},
    "blocks": {"down": {"kernel": MatrixLayout(-2, -1)}},
    "embed": None,
}


def filled(tx, params):
    """A state that no initial state equals: every array counts on, and counters are 5, those of updates
    at every second step 2."""
    state = jax.jit(tx.init)(params)
    leaves, structure = jax.tree_util.tree_flatten_with_path(state)
    new = []
    for number, (path, leaf) in enumerate(leaves):
        if leaf.ndim == 0:
            counts_updates = jax.tree_util.GetAttrKey("direction") in path
            new.append(jnp.full_like(leaf, 2 if counts_updates else 5))
        else:
            values = np.arange(leaf.size).reshape(leaf.shape) + number
            new.append(jnp.asarray(values.astype(leaf.dtype)))
    return structure.unflatten(new)


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (own.dtype, own.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(own, other)


OPTIMIZERS = {
    "normuon": normuon(0.02, layout=LAYOUT, **KEYWORDS),
    "spheres, in a chain": optax.chain(
        optax.clip_by_global_norm(1.0),
        normuon(lambda count: 0.1 / (1 + count), recipe="normuon_h", layout=LAYOUT, **KEYWORDS),
    ),
    "AdamW at every second step": normuon(0.02, layout=LAYOUT, adam_every=2, **KEYWORDS),
    "a stage alone": scale_by_normuon(layout=LAYOUT),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_comes_back_as_it_was(name):
    params, tx = tree(), OPTIMIZERS[name]
    state = filled(tx, params)
    arrays = state_to_arrays(tx, state, params)
    assert arrays["count"] == 5
    assert_same(state_from_arrays(tx, arrays, params), state)


def test_parts_of_a_partition_come_back_as_they_were():
    params = tree()
    layout = {"up": LAYOUT["up"], "blocks": LAYOUT["blocks"]}
    tx = optax.partition(
        {"first": normuon(0.02, layout=lambda _: {**layout, "embed": None}, **KEYWORDS)}
        | {"second": optax.adamw(1e-3)},
        {"up": "first", "blocks": "first", "embed": "second"},
    )
    state = filled(tx, params)
    arrays = state_to_arrays(tx, state, params)
    assert arrays["exp_avg/embed/embedding"].shape == (8, 4)
    assert_same(state_from_arrays(tx, arrays, params), state)


def test_a_remainder_and_half_precision_states_come_back_bit_for_bit():
    params = tree(jnp.bfloat16)
    keywords = {**KEYWORDS, "momentum_dtype": jnp.bfloat16, "adam_moment_dtype": jnp.bfloat16}
    tx = with_bf16_remainder(normuon(0.02, layout=LAYOUT, **keywords))
    state = filled(tx, params)
    arrays = state_to_arrays(tx, state, params) | parameters_to_arrays(params)
    assert arrays["remainder/up/kernel"].dtype == np.uint16
    assert arrays["parameter/up/kernel"].dtype == arrays["exp_avg/up/bias"].dtype == jnp.bfloat16
    assert_same(state_from_arrays(tx, arrays, params), state)
    assert_same(parameters_from_arrays(arrays, params), params)
    plain = normuon(0.02, layout=LAYOUT, **keywords)
    with pytest.raises(ValueError, match="with_bf16_remainder"):
        state_from_arrays(plain, arrays, params)


@pytest.mark.parametrize("mode", [AxisType.Explicit, AxisType.Auto])
def test_arrays_lie_on_a_mesh_as_the_optimizer_would_lay_them(mode):
    mesh = mesh_of(mode, fsdp=4, tp=2)
    specs = {
        "up": {"kernel": jax.P("fsdp", None), "bias": jax.P()},
        "blocks": {"down": {"kernel": jax.P("fsdp", "tp", None)}},
        "embed": {"embedding": jax.P(None, "tp")},
    }
    params = tree()
    tx = normuon(0.02, recipe="normuon_h", layout=LAYOUT, adam_every=2, **KEYWORDS)
    state = filled(tx, params)
    arrays = state_to_arrays(tx, state, params) | parameters_to_arrays(params)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    abstract = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        shardings,
    )
    with jax.set_mesh(mesh):
        placed = parameters_from_arrays(arrays, abstract)
        moved = state_from_arrays(tx, arrays, abstract)
        momentum = optax.tree.get(moved, "momentum")
        second = optax.tree.get(moved, "second_moment")
        gradient_sum = optax.tree.get(moved, "gradient_sum")
        assert_same(moved, state)
        back = state_to_arrays(tx, moved, placed) | parameters_to_arrays(placed)
    assert momentum["blocks"]["down"]["kernel"].sharding.spec == specs["blocks"]["down"]["kernel"]
    # It has one number for each output, of which no device has less than all.
    assert second["blocks"]["down"]["kernel"].sharding.spec[:1] == ("fsdp",)
    assert gradient_sum["embed"]["embedding"].sharding.spec == specs["embed"]["embedding"]
    assert jax.tree.map(lambda x: x.sharding, placed) == shardings
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(back[key], array, strict=True)


def test_the_boxes_of_flax_are_no_part_of_the_names():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = normuon(0.02, **KEYWORDS)
    state = filled(tx, params)
    arrays = state_to_arrays(tx, state, params)
    assert {*parameter_shapes(params)} == {"kernel", "bias"}
    assert arrays["second_moment/kernel"].shape == (1, 6)
    assert_same(state_from_arrays(tx, arrays, params), state)
    assert_same(parameters_from_arrays(parameters_to_arrays(params), params), params)


def test_a_run_of_optaxs_own_muon_goes_on(x64):
    params = {"up": {"kernel": tree()["up"]["kernel"]}, "norm": {"scale": tree()["up"]["bias"]}}
    params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    theirs = optax.contrib.muon(
        0.02, weight_decay=0.1, adam_b2=0.9, adam_weight_decay=0.2, adam_learning_rate=0.01
    )
    ours = normuon(
        0.02,
        recipe="optax_muon",
        weight_decay=0.1,
        adam_learning_rate=0.01,
        adam_b2=0.9,
        adam_eps=1e-8,
        adam_weight_decay=0.2,
        adam_nesterov=True,
        compute_dtype=jnp.float64,
    )

    def run(tx, state, params, steps):
        for step in steps:
            draw = np.random.default_rng(step).standard_normal
            grads = jax.tree.map(lambda x, draw=draw: jnp.asarray(draw(x.shape)), params)
            updates, state = update(tx, grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    @jax.jit(static_argnums=0)
    def update(tx, grads, state, params):
        # Optax raises a float to an integer count.
        with jax.numpy_dtype_promotion("standard"):
            return tx.update(grads, state, params)

    params, state = run(theirs, theirs.init(params), params, range(3))
    arrays = state_to_arrays(theirs, state, params)
    moved, _ = run(ours, state_from_arrays(ours, arrays, params), params, range(3, 6))
    whole, _ = run(theirs, state, params, range(3, 6))
    fresh, _ = run(ours, ours.init(params), params, range(3, 6))
    for name in ("up", "norm"):
        (own,), (other,), (left,) = (jax.tree.leaves(each[name]) for each in (moved, whole, fresh))
        # Measured: 4e-16.
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-12)
        assert np.abs(left - other).max() > 1e-3
    with pytest.raises(ValueError, match="rule is bias_corrected in the file and lerp here"):
        state_from_arrays(normuon(0.02, **KEYWORDS), arrays, params)
    with pytest.raises(ValueError, match=r"constant at .*ns_coeffs.*recipe='optax_muon'"):
        state_from_arrays(theirs, arrays, params)


def state_of(tx, params=None):
    params = tree() if params is None else params
    return state_to_arrays(tx, jax.jit(tx.init)(params), params)


NORMUON = normuon(0.02, layout=LAYOUT, **KEYWORDS)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"recipe": "muon"}, r"kernel: .* neuron_norm is .* and none here.* recipe='normuon' to"),
        ({"recipe": "moonlight"}, "recipe='normuon' to continue"),
        ({"momentum": 0.9}, "momentum=0.95 to continue"),
        ({"adam_b2": 0.99}, "embedding: .* b2 is 0.95 in the file and 0.99 here.* adam_b2=0.95"),
        (
            {"layout": {**LAYOUT, "embed": MatrixLayout(0, 1)}},
            "embed/embedding: .* as AdamW, and here it goes to matrices",
        ),
        ({"layout": {**LAYOUT, "blocks": None}}, "down/kernel: .* as matrices .* goes to AdamW"),
        (
            {"layout": {**LAYOUT, "up": {"kernel": MatrixLayout(0, 1), "bias": None}}},
            r"up/kernel: .* one of \(8, 8\) and 2 matrices of \(4, 8\), .* one of \(16, 8\); .*_splits",
        ),
        ({"momentum_dtype": jnp.bfloat16}, "has float32, .* bfloat16; .*momentum_dtype=float32"),
        (
            {"layout": {**LAYOUT, "blocks": {"down": {"kernel": MatrixLayout(-1, -2)}}}},
            r"down/kernel: .* 4 matrices of \(8, 16\), and here it is 4 matrices of \(16, 8\)",
        ),
    ],
    ids=str,
)
def test_another_optimizer_is_told_what_it_would_have_to_be(keywords, message):
    arrays, params = state_of(NORMUON), tree()
    other = normuon(0.02, **{"layout": LAYOUT, **KEYWORDS, **keywords})
    with pytest.raises(ValueError, match=message):
        state_from_arrays(other, arrays, params)


def test_other_parameters_are_refused_by_name():
    arrays = state_of(NORMUON)
    params = tree()
    fewer = {name: params[name] for name in ("up", "blocks")}
    tx = normuon(0.02, layout={name: LAYOUT[name] for name in fewer}, **KEYWORDS)
    with pytest.raises(ValueError, match="has 'embed/embedding', which are not among"):
        state_from_arrays(tx, arrays, fewer)
    with pytest.raises(ValueError, match="lacks 'embed/embedding', which the optimizer steps"):
        state_from_arrays(NORMUON, state_of(tx, fewer), params)
    with pytest.raises(ValueError, match="two parameters are called 'a/b'"):
        parameter_shapes({"a": {"b": jnp.zeros(2)}, "a/b": jnp.zeros(2)})


def test_a_scheduled_momentum_is_not_compared():
    scheduled = normuon(0.02, momentum=lambda count: 0.9, layout=LAYOUT, **KEYWORDS)
    arrays = state_of(scheduled)
    assert "momentum" not in read_metadata(arrays)["up/kernel"].settings["momentum"]
    state_from_arrays(NORMUON, arrays, tree())


def test_steps_that_one_counter_cannot_count_are_refused_where_they_matter():
    arrays = state_of(NORMUON)
    for key in arrays:
        if key.startswith("step/"):
            arrays[key] = np.array(4 if "blocks" in key else 7)
    state = state_from_arrays(NORMUON, arrays, tree())
    assert {int(x) for x in jax.tree.leaves(state) if x.ndim == 0} == {int(arrays["count"]), 7}
    corrected = normuon(0.02, recipe="optax_muon", layout=LAYOUT, **KEYWORDS)
    own = state_of(corrected)
    own["step/blocks/down/kernel"] = np.array(0)
    own["step/up/kernel"] = np.array(7)
    with pytest.raises(ValueError, match="step/blocks/down/kernel: it has been stepped 0 times"):
        state_from_arrays(corrected, own, tree())


def test_arrays_that_the_format_has_no_name_for_are_refused():
    steps = optax.MultiSteps(NORMUON, 2).gradient_transformation()
    with pytest.raises(ValueError, match=r"array at \.mini_step .*state.inner_opt_state"):
        state_of(steps)
    state = NORMUON.init(tree())
    uneven = jax.tree_util.tree_map_with_path(
        lambda path, x: x + 1 if ".count" in str(path[-1]) and "[1]" in str(path[-2]) else x, state
    )
    with pytest.raises(ValueError, match="schedules of the state have counted differently"):
        state_to_arrays(NORMUON, uneven, tree())


def test_a_run_of_another_adam_every_is_refused():
    params, tx = tree(), OPTIMIZERS["AdamW at every second step"]
    state = filled(tx, params)
    arrays = state_to_arrays(tx, state, params)
    third = normuon(0.02, layout=LAYOUT, **KEYWORDS, adam_every=3)
    for other in (third, NORMUON):
        with pytest.raises(ValueError, match=r"every is 2 .* adam_every=2 .* cannot be changed"):
            state_from_arrays(other, arrays, params, changed=["every"])
    with pytest.raises(ValueError, match=r"made 2 updates in 5 steps, .*adam_every=3 .* be 1;"):
        state_to_arrays(third, state, params)
    arrays["step/up/bias"] = np.array(3)
    with pytest.raises(ValueError, match="step/up/bias: it has been stepped 3 times and others 5"):
        state_from_arrays(tx, arrays, params)


def test_adamws_settings_are_compared():
    params = tree()
    arrays = state_to_arrays(NORMUON, filled(NORMUON, params), params)
    other = normuon(0.02, layout=LAYOUT, **KEYWORDS, adam_b2=0.99, adam_cautious=True)
    with pytest.raises(ValueError, match=r"b2 .* cautious is False .*adam_cautious=False"):
        state_from_arrays(other, arrays, params)
    state_from_arrays(other, arrays, params, changed=["b2", "cautious"])


def test_a_momentum_goes_from_floats_to_int8_where_that_is_said():
    in_int8 = normuon(0.02, layout=LAYOUT, momentum_dtype="int8", **KEYWORDS)
    params = tree()
    arrays = state_to_arrays(NORMUON, filled(NORMUON, params), params)
    with pytest.raises(ValueError, match="is none in the file and int8 .*momentum_dtype=None"):
        state_from_arrays(in_int8, arrays, params)
    state = state_from_arrays(in_int8, arrays, params, changed=["momentum_dtype"])
    rounded = state_to_arrays(in_int8, state, params)
    assert rounded.keys() == arrays.keys()
    with pytest.raises(ValueError, match="is int8 in the file and none .*momentum_dtype='int8'"):
        state_from_arrays(NORMUON, rounded, params)
    for key in ("momentum/up/kernel", "momentum/blocks/down/kernel"):
        assert rounded[key].dtype == arrays[key].dtype
        # Half a scale of 127 steps, of which bfloat16 keeps eight bits.
        largest = np.abs(arrays[key]).max()
        assert 0 < np.abs(rounded[key] - arrays[key]).max() < 1.01 * largest / 254
