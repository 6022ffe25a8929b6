"""One compiled update: gradients of a batch, the optimizer, and what is logged of it."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import optax_normuon
from examples.gpt import GPTConfig, apply_model, first_parameters
from examples.logged import Logged
from examples.losses import Batch, Loss, Sums
from examples.mesh import batch_sharding, parameter_shardings, specs_on
from examples.optimizers import OptimizerConfig, clipping, compute_dtype, make_optimizer
from optax_normuon import RECIPES


class State(NamedTuple):
    """What a run is between two steps: all that a checkpoint holds.

    `step` is how many updates were made. It is the position in the data and the state of all randomness
    too, since both are functions of the seed and the step.
    """

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is compiled: equal setups share their programs."""

    model: GPTConfig
    optimizer: OptimizerConfig
    steps: int
    loss: Loss
    mesh: Mesh | None = None
    deterministic: bool = True

    @property
    def tx(self) -> optax.GradientTransformation:
        tx = make_optimizer(self.optimizer, self.steps, self.mesh).tx
        if self.model.param_dtype == "bfloat16":
            return optax_normuon.with_bf16_remainder(tx)
        return tx

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """XLA's. A GPU's products differ in their last bits between two compilations, each of which
        takes what it measures to be fastest."""
        on_gpu = jax.default_backend() == "gpu"
        return {"xla_gpu_deterministic_ops": True} if self.deterministic and on_gpu else None

    def forward(self, params, tokens, segments=None) -> jax.Array:
        return apply_model(self.model, params, tokens, segments)


@functools.cache
def abstract_state(setup: Setup) -> State:
    """Shapes, dtypes and places of a state's arrays."""
    params = abstract_parameters(setup.model, setup.mesh)
    shapes = jax.eval_shape(functools.partial(_first_state, setup), params)
    if setup.mesh is None:
        here = _one_device()
        return State(_placed(shapes.step, here), params, _placed(shapes.opt_state, here))
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    specs = optax_normuon.state_specs(setup.tx, shapes.params, places)
    everywhere = NamedSharding(setup.mesh, PartitionSpec())
    return State(_placed(shapes.step, everywhere), params, _placed(shapes.opt_state, specs))


@functools.cache
def abstract_parameters(model: GPTConfig, mesh: Mesh | None = None):
    """Shapes, dtypes and places of a model's parameters."""
    shapes = jax.eval_shape(lambda: first_parameters(model, 0))
    return _placed(shapes, _one_device() if mesh is None else parameter_shardings(shapes, mesh))


def first_state(setup: Setup, seed: int, params: Any = None) -> State:
    """A state before its first step: of random weights, or of given ones."""
    program = _first_state_program(setup, drawn=params is None)
    return program(seed if params is None else params)


@functools.cache
def _first_state_program(setup: Setup, *, drawn: bool):
    """A seed, or parameters, to a state."""
    places = _shardings(abstract_state(setup))
    if not drawn:
        return jax.jit(functools.partial(_first_state, setup), out_shardings=places)

    def draw(seed):
        return _first_state(setup, first_parameters(setup.model, jax.random.key(seed)))

    return jax.jit(draw, out_shardings=places)


@functools.cache
def compiled_step(setup: Setup, shapes: tuple, *, frozen: bool, diagnostics: bool):
    """(state, frozen parameters or None, batch) to (the next state, `Logged`).

    The state is donated.

    Args:
      shapes: of a batch, see `shapes_of`. frozen: whether there are frozen parameters.
      diagnostics: whether what is logged has numbers of every matrix.
    """
    update = functools.partial(_update, setup, diagnostics=diagnostics)
    state, batch = abstract_state(setup), _abstract_batch(shapes, setup.mesh)
    places = None
    if setup.mesh is not None:
        places = (_shardings(state), NamedSharding(setup.mesh, PartitionSpec()))
    program = jax.jit(update, donate_argnums=0, out_shardings=places)
    lowered = program.lower(state, state.params if frozen else None, batch)
    return lowered.compile(setup.compiler_options)


@functools.cache
def compiled_evaluation(setup: Setup, shapes: tuple, *, frozen: bool):
    """(parameters, frozen parameters or None, batch) to the batch's sums."""
    params, batch = abstract_state(setup).params, _abstract_batch(shapes, setup.mesh)
    places = None if setup.mesh is None else NamedSharding(setup.mesh, PartitionSpec())
    program = jax.jit(functools.partial(setup.loss, setup.forward), out_shardings=places)
    lowered = program.lower(params, params if frozen else None, batch)
    return lowered.compile(setup.compiler_options)


def shapes_of(batch: dict[str, Any]) -> tuple:
    """Names, shapes and dtypes of a batch, to be looked up by."""
    return tuple((name, value.shape, str(value.dtype)) for name, value in sorted(batch.items()))


def means(sums: Sums) -> Sums:
    """Each sum over the weight."""
    weight = jnp.maximum(sums["weight"], 1.0)
    return {name: total / weight for name, total in sums.items() if name != "weight"}


def _first_state(setup: Setup, params) -> State:
    return State(jnp.zeros([], jnp.int32), params, setup.tx.init(params))


def _update(setup: Setup, state: State, frozen, batch: Batch, *, diagnostics: bool):
    gradients, sums = _gradients(setup, state.params, frozen, batch)
    updates = None
    if diagnostics:
        updates, opt_state = setup.tx.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    else:
        # The same numbers: where nothing reads the updates, the kernels add them.
        params, opt_state = optax_normuon.apply(setup.tx, gradients, state.opt_state, state.params)
    followed = make_optimizer(setup.optimizer, setup.steps, setup.mesh).followed
    logged: dict[str, Any] = {
        **means(sums),
        "gradient_norm": optax.tree.norm(gradients),
        **{name: jnp.asarray(rate(state.step)) for name, rate in followed.items()},
    }
    if updates is not None:
        logged["matrices"] = _diagnostics(setup, state, gradients, updates)
    return State(state.step + 1, params, opt_state), Logged.of(logged)


def _gradients(setup: Setup, params, frozen, batch: Batch):
    """Of the mean loss, with the batch taken in parts one after the other."""

    def loss(params, part):
        sums = setup.loss(setup.forward, params, frozen, part)
        return sums["loss"], sums

    parts = setup.optimizer.accumulation
    differentiated = jax.grad(loss, has_aux=True)
    if parts == 1:
        total, sums = differentiated(params, batch)
    else:
        # Part i has the rows i, i + parts, ...: each device keeps its own rows.
        split = {
            name: value.reshape(-1, parts, *value.shape[1:]).swapaxes(0, 1)
            for name, value in batch.items()
        }

        def add(so_far, part):
            more = differentiated(params, part)
            return jax.tree.map(lambda total, x: total + x.astype(jnp.float32), so_far, more), None

        abstract = jax.eval_shape(differentiated, params, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), abstract)
        (total, sums), _ = jax.lax.scan(add, zeros, split)
    weight = jnp.maximum(sums["weight"], 1.0)
    # Divided in float32: a bfloat16 weight would be another number of tokens.
    return jax.tree.map(lambda g: (g.astype(jnp.float32) / weight).astype(g.dtype), total), sums


def _diagnostics(setup: Setup, state: State, gradients, updates):
    numbers = {
        path: each._asdict()
        for path, each in optax_normuon.update_diagnostics(updates, state.params).items()
    }
    name = setup.optimizer.optimizer
    if name in RECIPES:
        clip = clipping(setup.optimizer)
        clipped, _ = clip.update(gradients, clip.init(state.params))
        followed = make_optimizer(setup.optimizer, setup.steps, setup.mesh).followed
        errors = optax_normuon.orthogonality_errors(
            clipped,
            state.opt_state,
            state.params,
            recipe=name,
            momentum=followed["momentum"](state.step),
            compute_dtype=compute_dtype(),
            param_specs=specs_on(setup.mesh),
        )
        for path, error in errors.items():
            numbers[path]["orthogonality_error"] = error
    return numbers


def _abstract_batch(shapes: tuple, mesh: Mesh | None):
    place = None if mesh is None else batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, shape, dtype in shapes
    }


def _shardings(state: State) -> State:
    return jax.tree.map(lambda leaf: leaf.sharding, state)


def _one_device() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def _placed(shapes, places):
    """Abstract arrays with their places: a tree like them, or one for all."""
    if isinstance(places, jax.sharding.Sharding):
        places = jax.tree.map(lambda _: places, shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        places,
    )
