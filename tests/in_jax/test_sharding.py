"""On any mesh the numbers of one device, and no more collectives than they need."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_normuon
from normuon_core.cost import Iteration
from normuon_core.placement import Spread, place
from normuon_core.polar_iteration import gram_restarts
from optax_normuon import MatrixLayout, normuon
from tests.in_jax.meshes import collectives, compiled_step, counts, draw, mesh_of, put, step_of

EXPLICIT, AUTO = AxisType.Explicit, AxisType.Auto
LAYOUT = {
    "up": MatrixLayout(0, 1),
    "up2": MatrixLayout(0, 1),
    "up3": MatrixLayout(0, 1),
    "down": MatrixLayout(0, 1),
    "heads": MatrixLayout(0, (1, 2)),
    "inner": MatrixLayout(0, (1, 2)),
    "experts": MatrixLayout(-2, -1),
    "scanned": MatrixLayout(1, 2),
    "qkv": MatrixLayout(0, 1, (16, 8, 8)),
    "ragged": MatrixLayout(0, 1),
    "bias": None,
}
SHAPES = {
    "up": (16, 48),
    "up2": (16, 48),
    "up3": (16, 48),
    "down": (48, 16),
    "heads": (16, 8, 4),
    "inner": (16, 4, 8),
    "experts": (8, 24, 16),
    "scanned": (5, 16, 24),
    "qkv": (16, 32),
    "ragged": (7, 11),
    "bias": (16,),
}


def specs_over(fsdp, tp):
    """How a model's leaves lie over two axes; `down` and `up` are cut the other way round."""
    return {
        "up": P(fsdp, tp),
        "up2": P(fsdp, tp),
        "up3": P(fsdp, tp),
        "down": P(tp, fsdp),
        "heads": P(fsdp, tp),
        "inner": P(None, None, (fsdp, tp)),
        "experts": P(tp, fsdp),
        "scanned": P(None, None, fsdp),
        "qkv": P(fsdp, tp),
        "ragged": P(),
        "bias": P(fsdp),
    }


SPECS = specs_over("fsdp", "tp")


def optimizer(**keywords):
    keywords = dict(compute_dtype=jnp.float32, weight_decay=0.1, layout=LAYOUT) | keywords
    return normuon(0.02, **keywords)


STEPS = 50


@functools.cache
def gradients():
    """A leaf's axis 0 is the step. Gaussian, rank one, one huge row, zero and small ones, in turn."""
    rng = np.random.default_rng(1)
    result = {n: rng.standard_normal((STEPS, *s)).astype(np.float32) for n, s in SHAPES.items()}
    for each in result.values():
        if each.ndim > 2:
            each[1::4] = each[1::4, ..., :1] * each[1::4, ..., :1, :]
            each[2::4, ..., :1, :] *= 1e6
        each[3::4] *= 1e-8
    result["up2"][3::4] = 0
    return result


def train(mesh=None, specs=SPECS, **keywords):
    """(parameters, state) after all steps in one `lax.scan`, which also holds their types still."""
    tx = optimizer(**keywords)

    @jax.jit
    def steps(params, state, gradients):
        def step(carry, gradients):
            params, state = carry
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), gradients)[0]

    params = put(draw(SHAPES), specs, mesh)
    all_steps = {name: P(None, *spec) for name, spec in specs.items()}
    return steps(params, tx.init(params), put(gradients(), all_steps, mesh))


def difference(on_mesh, on_one):
    """The largest relative infinity norm of a difference, over the leaves of two trees."""
    pairs = zip(jax.tree.leaves(on_mesh), jax.tree.leaves(on_one), strict=True)
    arrays = [(np.asarray(x), np.asarray(y)) for x, y in pairs]
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) for x, y in arrays)


@pytest.fixture(scope="module")
def on_one_device():
    return train()


@pytest.mark.parametrize(
    ("mode", "sizes"),
    [
        (EXPLICIT, dict(fsdp=1, tp=1)),
        (EXPLICIT, dict(fsdp=8, tp=1)),
        (AUTO, dict(fsdp=4, tp=2)),
        (EXPLICIT, dict(data=2, fsdp=2, tp=2)),
    ],
    ids=lambda value: "x".join(map(str, value.values())) if isinstance(value, dict) else value.name,
)
def test_every_mesh_trains_as_one_device_does(on_one_device, mode, sizes):
    """50 steps, float32 compute: parameters, momentum and second moment."""
    mesh = mesh_of(mode, **sizes)
    params, state = train(mesh, param_specs=SPECS if mode == AUTO else None)
    measured = difference(params, on_one_device[0]), difference(state, on_one_device[1])
    assert measured[0] < BOUNDS["parameters"]
    assert measured[1] < BOUNDS["state"]
    for name, array in params.items():
        assert array.sharding.is_equivalent_to(NamedSharding(mesh, SPECS[name]), array.ndim)


BOUNDS = {"parameters": 1.6e-6, "state": 4e-5, "update": 2.7e-5}
"""Four times the largest of all these meshes, 3.9e-7 and 9.1e-6, and of an update's, 6.7e-6."""


def test_a_slightly_different_momentum_breaks_the_bounds(on_one_device):
    other, _ = train(momentum=0.9501)
    assert difference(other, on_one_device[0]) > 10 * BOUNDS["parameters"]


@pytest.mark.parametrize(
    ("mode", "keywords"),
    [
        *itertools.product(
            (EXPLICIT, AUTO), (dict(recipe="normuon_paper"), dict(shape_scale="spectral"))
        ),
        (EXPLICIT, dict(recipe="nanochat")),
    ],
)
def test_the_scale_of_a_divided_matrix_is_that_of_the_whole_one(mode, keywords):
    """By its norm, by the shape of its blocks (of heads, and of a fused leaf cut through them), and by
    the norms of its rows."""
    mesh = mesh_of(mode, fsdp=4, tp=2)
    on_mesh = first_update(mesh, SPECS if mode == AUTO else None, **keywords)
    assert difference(on_mesh, first_update_on_one(**keywords)) < BOUNDS["state"]


def first_update(mesh=None, specs=None, **keywords):
    tx = optimizer(param_specs=specs, steps=1, **keywords)
    params = put(draw(SHAPES), SPECS, mesh)
    return jax.jit(tx.update)(params, tx.init(params), params)[0]


first_update_on_one = functools.cache(first_update)


def test_mesh_axes_may_have_any_name():
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.float32)
    shapes, specs = stack_of(3, P("x", "model"))
    on_mesh, on_one = (
        step_of(tx)(params, tx.init(params), params)
        for params in (put(draw(shapes), specs, m) for m in (mesh_of(x=2, model=2), None))
    )
    assert difference(on_mesh, on_one) < BOUNDS["update"]


ALIKE = {f"w{i}": MatrixLayout(0, 1) for i in range(8)}


def stack_of(count, spec, shape=(32, 64)):
    names = list(ALIKE)[:count]
    return dict.fromkeys(names, shape), dict.fromkeys(names, spec)


@pytest.mark.parametrize(
    ("count", "compute_dtype"), [(8, jnp.bfloat16), (3, jnp.bfloat16), (8, jnp.float32)]
)
@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        (dict(fsdp=8), P("fsdp")),
        (dict(fsdp=8), P(None, "fsdp")),
        (dict(fsdp=4, tp=2), P("fsdp", "tp")),
        (dict(fsdp=4, tp=2), P(("tp", "fsdp"), None)),
    ],
    ids=str,
)
def test_a_stack_takes_two_all_to_alls_and_three_small_collectives(
    sizes, spec, count, compute_dtype
):
    """Also over two mesh axes: one hop. None in a loop; matrices cross in the compute dtype."""
    shapes, specs = stack_of(count, spec)
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=compute_dtype, algorithm="standard")
    found = collectives(compiled_step(tx, shapes, specs, mesh_of(**sizes)))
    assert not any(in_loop for _, _, in_loop in found)
    whole = -(-count // 8) * 32 * 64 * jnp.dtype(compute_dtype).itemsize
    large = [(operation, size) for operation, size, _ in found if size >= whole]
    small = [(operation, size) for operation, size, _ in found if size < whole]
    # A device receives as much as it sends: the matrices that it owns, in parts, and its own parts back.
    assert large == [("all-to-all", whole)] * 2
    assert len(small) <= 3
    neurons = -(-count // 8) * 64 * 4
    assert all(size <= 8 * neurons for _, size in small)


ALIKE_LAYOUT = MatrixLayout(0, 1)


def test_bytes_sent_are_the_bound_where_the_devices_divide_the_count():
    """4 (P/W) (W-1)/W bytes of matrices in bfloat16; with norms and statistics 3 % more."""
    shapes, specs = stack_of(8, P("fsdp"), (256, 512))
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.bfloat16)
    found = collectives(compiled_step(tx, shapes, specs, mesh_of(fsdp=8)))
    sent = sum(
        size * 7 / 8 * (2 if operation == "all-reduce" else 1) for operation, size, _ in found
    )
    bound = 4 * (8 * 256 * 512 / 8) * 7 / 8
    assert bound <= sent <= 1.05 * bound


def test_a_single_matrix_stays_divided():
    """Two all-reduces of its Gram matrix, one of its norm and one of its statistics."""
    shapes, specs = stack_of(1, P(None, "fsdp"), (32, 2048))
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.float32)
    found = collectives(compiled_step(tx, shapes, specs, mesh_of(fsdp=8)))
    # The first two steps and the last three share a Gram matrix, and another restart for few rows.
    gram = [size for _, size, _ in found if size == 32 * 32 * 4]
    assert {operation for operation, _, _ in found} == {"all-reduce"}
    assert len(gram) == len(gram_restarts(5, 32)) + 1
    assert len(found) - len(gram) <= 2
    assert all(size <= 32 * 4 for _, size, _ in found if size != 32 * 32 * 4)


def test_a_single_large_matrix_takes_two_gram_matrices():
    assert len(gram_restarts(5, 512)) + 1 == 2
    spread = Spread(1, 1024, 8192, column_parts=8)
    asked = Iteration(5, compute_dtype="float32", on_gpu=False, symmetric=False)
    placement = place(spread, asked, may_stay=True)
    assert placement.strategy == "shards"
    assert placement.bytes_sent == 2 * 7 / 8 * 2 * 1024**2 * 4


@pytest.mark.parametrize("spec", [P(None, "fsdp"), P("fsdp"), P("fsdp", "tp")])
@pytest.mark.parametrize("shape", [(24, 520), (520, 24)])
def test_a_single_sharded_matrix_is_what_it_is_on_one_device(spec, shape):
    """In float32: largest difference measured 3.9e-6. A side that is cut is turned first."""
    shapes, specs = stack_of(1, P(*spec), shape)
    mesh = mesh_of(fsdp=4, tp=2)
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.float32, algorithm="gram")
    assert "all-gather" not in counts(compiled_step(tx, shapes, specs, mesh))
    params = put(draw(shapes), specs, mesh)
    on_mesh = step_of(tx)(params, tx.init(params), params)
    assert difference(on_mesh, single_matrix_on_one(shape)) < 1.6e-5


@functools.cache
def single_matrix_on_one(shape):
    params = put(draw({"w0": shape}), None, None)
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.float32, algorithm="gram")
    return step_of(tx)(params, tx.init(params), params)


@pytest.mark.parametrize("sizes", [dict(fsdp=1), dict(fsdp=1, tp=1)])
def test_one_device_communicates_nothing(sizes):
    shapes, specs = stack_of(3, P("fsdp"))
    tx = normuon(0.1, layout=ALIKE_LAYOUT)
    assert not counts(compiled_step(tx, shapes, specs, mesh_of(**sizes)))


def test_batch_axes_that_are_divided_move_nothing():
    """Experts, or a pipeline's stacked layers, over their own axis."""
    shapes, specs = {"w0": (8, 16, 32)}, {"w0": P("stage")}
    tx = normuon(0.1, layout={"w0": MatrixLayout(1, 2)})
    assert not counts(compiled_step(tx, shapes, specs, mesh_of(stage=8)))


def test_replicas_share_the_work_where_that_is_faster():
    """Replicated over `data`: each does a part, and gathers the others' results in the compute dtype."""
    shapes, specs = stack_of(4, P(), (1024, 1024))
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.bfloat16)
    found = collectives(compiled_step(tx, shapes, specs, mesh_of(data=2)))
    assert ("all-gather", 4 * 1024**2 * 2, False) in found
    small, specs = stack_of(4, P(), (32, 32))
    assert not counts(compiled_step(tx, small, specs, mesh_of(data=2)))


def test_a_ceiling_bounds_the_stacks_of_a_device():
    shapes, specs = stack_of(8, P("fsdp"))
    tx = normuon(
        0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.bfloat16, max_stack_bytes=4 * 32 * 64 * 4
    )
    text = compiled_step(tx, shapes, specs, mesh_of(fsdp=4))
    assert sum(size >= 32 * 64 * 2 for _, size, _ in collectives(text)) == 4


@pytest.mark.parametrize(
    "stage",
    ["equilibrate_rows", "orthogonalize", "set_norm", "normalize_neurons", "scale_by_normuon"],
)
def test_stages_alone_work_on_a_mesh(stage):
    make = getattr(optax_normuon, stage)
    with_products = stage in ("orthogonalize", "scale_by_normuon")
    keywords = {"compute_dtype": jnp.float32, "steps": 1} if with_products else {}
    tx = make(layout=LAYOUT, **keywords)
    mesh = mesh_of(fsdp=4, tp=2)
    on_mesh, on_one = (
        jax.jit(tx.update)(put(draw(SHAPES), SPECS, m), tx.init(put(draw(SHAPES), SPECS, m)))
        for m in (mesh, None)
    )
    assert difference(on_mesh, on_one) < BOUNDS["update"]


def test_without_specs_automatic_mode_is_left_to_the_compiler():
    mesh = mesh_of(AUTO, fsdp=4, tp=2)
    tx = optimizer(steps=1)
    params = put(draw(SHAPES), SPECS, mesh)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    alone = put(draw(SHAPES), SPECS, None)
    expected, _ = jax.jit(tx.update)(alone, tx.init(alone), alone)
    assert difference(updates, expected) < BOUNDS["update"]


def test_within_a_shard_map_matrices_are_the_devices_own():
    """Manual axes are the caller's; over the others the optimizer still moves its matrices."""
    mesh = mesh_of(stage=2, fsdp=4)
    tx = normuon(0.1, layout=MatrixLayout(-2, -1), compute_dtype=jnp.float32)
    x = jnp.asarray(draw({"w": (2, 16, 24)})["w"])
    params = put({"w": x}, {"w": P("stage", "fsdp")}, mesh)

    def local(params):
        return tx.update(params, tx.init(params), params)[0]

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=P("stage"),
        out_specs=P("stage"),
        axis_names={"stage"},
        check_vma=False,
    )
    expected, _ = tx.update({"w": x}, tx.init({"w": x}), {"w": x})
    assert difference(jax.jit(mapped)(params), expected) < BOUNDS["update"]


def test_state_specs_say_how_the_state_lies():
    """With wrappers around it; reduced axes and a fused leaf's blocks are not divided."""
    mesh = mesh_of(fsdp=4, tp=2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer())
    params = put(draw(SHAPES), SPECS, mesh)
    state = tx.init(params)
    specs = optax_normuon.state_specs(tx, params, SPECS)
    assert jax.tree.structure(specs) == jax.tree.structure(state)
    for leaf, spec in zip(jax.tree.leaves(state), jax.tree.leaves(specs), strict=True):
        # A counter is made on one device.
        assert leaf.ndim == 0 or leaf.sharding.is_equivalent_to(
            NamedSharding(mesh, spec), leaf.ndim
        )
    moment = optax.tree.get(specs, "second_moment")
    assert (moment["up"], moment["down"]) == (P(None, "tp"), P(None, "fsdp"))
    assert moment["qkv"] == P(None, None)
    assert optax.tree.get(specs, "momentum")["experts"] == P("tp", "fsdp", None)
    named = jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS)
    placed = jax.device_put(state, optax_normuon.state_specs(tx, params, named))
    for leaf, spec in zip(jax.tree.leaves(placed), jax.tree.leaves(specs), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim)


@pytest.mark.parametrize("wrapper", ["MultiSteps", "inject_hyperparams", "remainder"])
def test_state_specs_reach_into_wrappers(wrapper):
    params, specs = {"w": jnp.zeros((8, 4), jnp.bfloat16)}, {"w": P("fsdp", "tp")}
    tx = {
        "MultiSteps": lambda: optax.MultiSteps(
            normuon(0.1, layout=ALIKE_LAYOUT), 2
        ).gradient_transformation(),
        "inject_hyperparams": lambda: optax.inject_hyperparams(
            normuon, static_args=optax_normuon.STATIC_ARGS
        )(0.1, layout=ALIKE_LAYOUT),
        "remainder": lambda: optax_normuon.with_bf16_remainder(normuon(0.1, layout=ALIKE_LAYOUT)),
    }[wrapper]()
    found = optax_normuon.state_specs(tx, params, specs)
    assert optax.tree.get(found, "momentum")["w"] == P("fsdp", "tp")
    assert optax.tree.get(found, "second_moment")["w"] == P(None, "tp")


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (
            {"w": P("fsdp", None, "tp")},
            "w: spec .*'fsdp', None, 'tp'.*fsdp=4, tp=2.*3 entries.*2 axes",
        ),
        ({"w": P("rows")}, "w: spec .*'rows'.*fsdp=4, tp=2.*no axis 'rows'; use fsdp, tp"),
        ({"w": P("fsdp", "fsdp")}, "w: spec .*fsdp=4, tp=2.*'fsdp' is named twice"),
        ({"w": P(P.UNCONSTRAINED)}, "w: spec .*fsdp=4, tp=2.*unconstrained"),
        ({"v": P("fsdp")}, "param_specs does not match the parameters"),
    ],
)
def test_specs_that_do_not_fit_name_leaf_spec_and_mesh(specs, message):
    mesh = mesh_of(AUTO, fsdp=4, tp=2)
    params = put({"w": np.ones((8, 4), np.float32)}, {"w": P()}, mesh)
    tx = normuon(0.1, layout=ALIKE_LAYOUT, param_specs=specs)
    with pytest.raises(ValueError, match=message):
        tx.init(params)


def test_a_mesh_that_is_set_must_be_the_arrays_own():
    params = put({"w": np.ones((8, 4), np.float32)}, {"w": P("fsdp")}, mesh_of(fsdp=4, tp=2))
    tx = normuon(0.1, layout=ALIKE_LAYOUT)
    with jax.set_mesh(mesh_of(data=8)):
        with pytest.raises(ValueError, match=r"w: spec .*'fsdp'.*fsdp=4, tp=2.*data=8"):
            tx.init(params)
        named = {"w": NamedSharding(mesh_of(AUTO, fsdp=4, tp=2), P("fsdp"))}
        other = normuon(0.1, layout=ALIKE_LAYOUT, param_specs=named)
        with pytest.raises(ValueError, match=r"w: spec .*'fsdp'.*fsdp=4, tp=2.*data=8"):
            other.init({"w": jnp.ones((8, 4))})


def test_specs_that_contradict_the_arrays_and_specs_without_a_mesh_are_refused():
    mesh = mesh_of(fsdp=4, tp=2)
    params = put({"w": np.ones((8, 4), np.float32)}, {"w": P("fsdp")}, mesh)
    with pytest.raises(
        ValueError, match=r"w: spec .*'tp'.*fsdp=4, tp=2.*the array's own is .*fsdp"
    ):
        normuon(0.1, layout=ALIKE_LAYOUT, param_specs={"w": P("tp")}).init(params)
    with pytest.raises(ValueError, match=r"w: spec .*'tp'.* no mesh"):
        normuon(0.1, layout=ALIKE_LAYOUT, param_specs={"w": P("tp")}).init({"w": jnp.ones((8, 4))})


def test_a_mesh_axis_of_a_surrounding_shard_map_is_refused_in_specs():
    mesh = mesh_of(fsdp=4, tp=2)
    tx = normuon(0.1, layout=ALIKE_LAYOUT, param_specs={"w": P("fsdp")})

    def local(params):
        return tx.update(params, tx.init(params), params)[0]

    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
    with pytest.raises(
        ValueError, match=r"w: spec .*'fsdp'.*fsdp=4, tp=2.*cannot leave axis 'fsdp'"
    ):
        mapped(put({"w": np.ones((8, 4), np.float32)}, {"w": P("fsdp")}, mesh))


def test_describe_shows_where_each_group_goes():
    mesh = mesh_of(AUTO, fsdp=4, tp=2)
    params = {
        "up": jax.ShapeDtypeStruct((6, 2048, 1024), jnp.float32),
        "kept_sharded": jax.ShapeDtypeStruct((512, 65536), jnp.float32),
        "bias": jax.ShapeDtypeStruct((16,), jnp.float32),
    }
    specs = {"up": P(None, "fsdp", "tp"), "kept_sharded": P(None, ("fsdp", "tp")), "bias": P()}
    layout = {"up": MatrixLayout(1, 2), "kept_sharded": MatrixLayout(0, 1), "bias": None}
    text = optax_normuon.describe(params, layout, mesh=mesh, param_specs=specs)
    rows = [line.split("  ") for line in text.split("\n\n")[1].splitlines()[2:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0][:6] == ["1 x (512, 65536)", "- x fsdp+tp", "xla", "shards", "1", "1"]
    assert cells[1][:6] == ["6 x (2048, 1024)", "fsdp x tp", "xla", "owners", "8", "1"]
    sent = 2 * 7 / 8 * 2048 * 1024 * 2
    assert float(cells[1][10]) == pytest.approx(sent, rel=1e-2)
    placed = put({"w": np.ones((8, 4), np.float32)}, {"w": P("fsdp")}, mesh)
    assert "fsdp x -" in optax_normuon.describe(placed, ALIKE_LAYOUT)
    assert "strategy" not in optax_normuon.describe({"w": jnp.ones((8, 4))}, ALIKE_LAYOUT)


@pytest.mark.parametrize("devices", [3, 7])
def test_a_device_count_that_divides_nothing_works(devices):
    """Such arrays are on every device, whatever specs ask for; the work is shared or repeated."""
    shapes, specs = stack_of(5, P("fsdp"), (16, 32))
    mesh = mesh_of(AUTO, fsdp=devices)
    updates = []
    for where, given in ((mesh, specs), (None, None)):
        tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.float32, param_specs=given)
        params = put(draw(shapes), dict.fromkeys(shapes, P()), where)
        updates.append(step_of(tx)(params, tx.init(params), params))
    assert difference(*updates) < BOUNDS["update"]
    shapes, specs = stack_of(5, P("fsdp"), (3 * 7, 32))
    tx = normuon(0.1, layout=ALIKE_LAYOUT, compute_dtype=jnp.float32)
    on_mesh, on_one = (
        step_of(tx)(params, tx.init(params), params)
        for params in (put(draw(shapes), specs, m) for m in (mesh_of(fsdp=devices), None))
    )
    assert difference(on_mesh, on_one) < BOUNDS["update"]
