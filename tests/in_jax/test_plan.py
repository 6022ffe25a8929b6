"""`describe` prints the plan that the step makes: by each engine, group by group."""

from itertools import groupby

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from normuon_core.cost import Iteration
from normuon_core.recipes import find_recipe
from optax_normuon import MatrixLayout, describe, normuon
from optax_normuon.kernels.engine import Kernels
from optax_normuon.leaves.layout import resolve_layouts
from optax_normuon.matrices import on_matrices
from optax_normuon.matrices.plan import plan
from optax_normuon.mesh.leaf_on_mesh import leaf_on_mesh
from optax_normuon.mesh.specs import resolve_specs
from tests.in_jax.meshes import mesh_of

SHAPES = {
    "up": (64, 256),
    "down": (256, 64),
    "experts": (4, 64, 256),
    "kept_sharded": (16, 4096),
    "qkv": (64, 96),
    "cut_through": (64, 96),
    "bias": (64,),
}
SPECS = {
    "up": P("fsdp", "tp"),
    "down": P("tp", "fsdp"),
    "experts": P("tp", "fsdp"),
    "kept_sharded": P(None, ("fsdp", "tp")),
    "qkv": P("fsdp"),
    "cut_through": P(None, "fsdp"),
    "bias": P("fsdp"),
}
LAYOUT = {
    "up": MatrixLayout(0, 1),
    "down": MatrixLayout(1, 0),
    "experts": MatrixLayout(1, 2),
    "kept_sharded": MatrixLayout(0, 1),
    "qkv": MatrixLayout(0, 1, (32, 32, 32)),
    "cut_through": MatrixLayout(0, 1, (32, 32, 32)),
    "bias": None,
}
PARAMS = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}


def lines(engine, stacks):
    """The cells of `describe` that a plan decides."""
    for key, group in groupby(stacks, key=lambda stack: stack.key):
        alike = list(group)
        first, wave = alike[0], alike[-1].wave
        placement = first.placement
        yield [
            f"{first.group_size} x ({key.rows}, {key.columns})",
            engine,
            placement.strategy,
            *map(str, (placement.owners, placement.each, placement.padding, len(alike))),
            "-" if wave is None else str(wave + 1),
        ]


@pytest.fixture
def planned(monkeypatch):
    """The stacks of every plan that a step makes, by the engine that steps them."""
    from optax_normuon.steps import fused

    made = []
    for module in (on_matrices, fused):

        def recorded(leaves, dtypes, engine, specs, *, ceiling, plan=module.plan):
            stacks = plan(leaves, dtypes, engine, specs, ceiling=ceiling)
            made.append((engine.name, stacks))
            return stacks

        monkeypatch.setattr(module, "plan", recorded)
    return made


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tp=2), dict(fsdp=2, tp=2, replica=2)], ids=str)
@pytest.mark.parametrize("engine", ["xla", "kernels"])
def test_the_table_is_the_plan_of_the_step(planned, request, engine, sizes):
    keywords = dict(compute_dtype=jnp.float32, layout=LAYOUT, param_specs=SPECS)
    if engine == "kernels":
        request.getfixturevalue("interpreted")
        keywords["backend"] = "triton"
    mesh = mesh_of(AxisType.Auto, **sizes)
    tx = normuon(0.1, **keywords)
    with jax.set_mesh(mesh):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), PARAMS)
        text = describe(PARAMS, mesh=mesh, **keywords)
    rows = [line.split("  ") for line in text.split("\n\n")[1].splitlines()[2:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    printed = [[row[0], *row[2:9]] for row in cells]
    ran = [line for each in planned for line in lines(*each)]
    assert sorted(printed) == sorted(ran)
    engines = {row[1] for row in printed}
    assert engines == ({"xla"} if engine == "xla" else {"xla", "kernels"})
    assert {"owners", "shards"} <= {row[2] for row in printed}


def test_divided_matrices_whose_rows_are_equilibrated_are_left_to_xla(interpreted):
    """The kernels step those that a device has whole, as experts over their own axis."""
    params = {name: PARAMS[name] for name in ("up", "experts")}
    keywords = dict(
        backend="triton",
        algorithm="standard",
        compute_dtype=jnp.float32,
        layout={name: LAYOUT[name] for name in params},
        param_specs={"up": SPECS["up"], "experts": P("tp")},
    )
    mesh, engines = mesh_of(AxisType.Auto, fsdp=4, tp=2), {}
    for recipe in ("normuon", "nanochat"):
        text = describe(params, mesh=mesh, recipe=recipe, **keywords)
        rows = [line.split("  ") for line in text.split("\n\n")[1].splitlines()[2:]]
        cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
        engines[recipe] = {row[0]: row[2] for row in cells}
    assert set(engines["normuon"].values()) == {"kernels"}
    assert engines["nanochat"] == {"1 x (64, 256)": "xla", "2 x (64, 256)": "kernels"}


KERNELS = Kernels(find_recipe("normuon"), Iteration(5), ceiling=2**30)


def planned_for(shapes, spec, mesh, engine=KERNELS):
    """The stacks of leaves (..., out, in) that are all divided alike; without a mesh, of one device."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    views = resolve_layouts(MatrixLayout(-1, -2), params)
    specs = None
    if mesh is not None:
        with jax.set_mesh(mesh):
            specs = resolve_specs(spec, params)
    leaves = {path: leaf_on_mesh(view, path, specs) for path, view in views.items()}
    dtypes = dict.fromkeys(leaves, jnp.dtype("float32"))
    return plan(leaves, dtypes, engine, specs, ceiling=engine.ceiling)


@pytest.mark.parametrize("shape", [(2048, 2048), (8192, 2048), (2048, 8192)], ids=str)
def test_an_owner_has_as_many_matrices_of_a_stack_as_one_device(shape):
    """The ceiling bounds what a device works on, not what all devices hold."""
    mesh = mesh_of(AxisType.Auto, fsdp=4)
    stacked = planned_for({"layers": (64, *shape)}, P(None, "fsdp"), mesh)
    alone = planned_for({"layers": (16, *shape)}, None, None)
    assert [stack.count for stack in stacked] == [4 * stack.count for stack in alone]
