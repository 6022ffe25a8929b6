"""The optimizer of nGPT: matrices, tables and vectors each by a chain of its own, weights on spheres."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import optax_normuon
from examples.errors import BadInput
from examples.mesh import specs_on
from examples.ngpt import Axes, role_of, sphere_axes
from examples.optimizers import OptimizerConfig, compute_dtype, is_matrix
from normuon_core.recipes import Recipe, find_recipe
from optax_normuon import MatrixLayout

Path = Literal["projection", "retraction", "geodesic", "hyperball"]
Angle = Literal["rate", "tangent"]
DIRECTIONS = ("adamw", "muon", "normuon")
TABLES = ("embed", "position", "lm_head")


@dataclasses.dataclass(frozen=True)
class SphereConfig(OptimizerConfig):
    """The optimizer, and its rates over the run."""

    optimizer: str = "normuon"
    """What gives the matrices their direction: adamw, muon or normuon. AdamW trains the rest."""
    learning_rate: float | None = None
    """Peak rate of the matrices. None: the preset."""
    adam_learning_rate: float | None = None
    """Peak rate of the AdamW of embedding, head and vectors. None: the preset."""
    path: Path = "geodesic"
    """How a slice of a matrix moves: a plain step and then a projection, along the sphere (geodesic or
    retraction), or the whole matrix on a hyperball. Embedding and head take a plain step and a
    projection."""
    angle: Angle = "tangent"
    """Of geodesic and retraction: the rate times the tangent's length, or the rate alone."""
    axes: Axes = "embedding"
    """Along which axes slices lie: the model's channels, as in the paper, or every neuron's inputs."""
    project_every: int = 1
    """Steps from one projection to the next, the first step's among them."""
    adam_b2: float = 0.95
    """Of every AdamW here."""
    adam_eps: float = 1e-10
    """Of every AdamW here."""
    warmup: float = 0.0
    """Fraction of the steps over which the rates rise; nGPT needs none."""

    def __post_init__(self):
        super().__post_init__()
        if self.optimizer not in DIRECTIONS:
            raise BadInput(
                f"optimizer={self.optimizer!r} gives no direction here: choose {', '.join(DIRECTIONS)}."
            )
        if self.project_every < 1:
            raise BadInput(f"project_every={self.project_every} is below 1.")

    @property
    def peaks(self) -> dict[str, float | None]:
        return {"lr_matrices": self.learning_rate, "lr_adamw": self.adam_learning_rate}

    def transformation(
        self, followed: Mapping[str, optax.Schedule], mesh: Mesh | None
    ) -> optax.GradientTransformation:
        adam = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=self.adam_b2, eps=self.adam_eps),
            optax.add_decayed_weights(self.weight_decay),
        )
        direction = adam
        if self.optimizer != "adamw":
            direction = matrix_direction(
                self.optimizer,
                weight_decay=self.weight_decay,
                momentum=followed["momentum"],
                param_specs=specs_on(mesh),
            )
        projected = functools.partial(
            along_spheres, path="projection", axes=self.axes, project_every=self.project_every
        )
        return by_kind(
            matrices=along_spheres(
                direction,
                followed["lr_matrices"],
                path=self.path,
                angle=self.angle,
                axes=self.axes,
                project_every=self.project_every,
            ),
            tables=projected(adam, followed["lr_adamw"]),
            vectors=optax.chain(adam, optax.scale_by_learning_rate(followed["lr_adamw"])),
        )

    def description(self, params: Any) -> str:
        if self.optimizer == "adamw":
            return "adamw trains every parameter; matrices and tables are on spheres."
        table = optax_normuon.describe(
            params, recipe=self.optimizer, layout=matrix_layout, compute_dtype=compute_dtype()
        )
        return f"{table}\nMatrices, embedding and head are on spheres."


def matrix_direction(
    recipe: str | Recipe,
    *,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    momentum: optax.ScalarOrSchedule | None = None,
    param_specs: Any = None,
    **keywords: Any,
) -> optax.GradientTransformation:
    """A recipe's direction of ascent for the blocks' matrices: its stages without the learning rate.

    Args:
      keywords: of `optax_normuon.scale_by_normuon`.
    """
    chosen = find_recipe(recipe)
    return optax.chain(
        optax_normuon.scale_by_normuon(
            recipe=chosen,
            momentum=momentum,
            layout=matrix_layout,
            compute_dtype=compute_dtype(),
            param_specs=param_specs,
            **keywords,
        ),
        optax_normuon.add_cautious_weight_decay(weight_decay, cautious=chosen.decay.cautious),
        optax_normuon.scale_by_shape(chosen.shape_scale, layout=matrix_layout),
    )


def along_spheres(
    direction: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    path: Path,
    angle: Angle = "tangent",
    axes: Axes = "embedding",
    project_every: int | jax.Array = 1,
) -> optax.GradientTransformation:
    """A direction of ascent as a whole optimizer that holds weights on their spheres.

    Args:
      angle: of geodesic and retraction.
      project_every: of projection, from the first step on; a number, which may be traced.
    """
    axis = sphere_axes(axes)
    if path == "hyperball":
        end = optax_normuon.to_hyperball(learning_rate, layout=matrix_layout)
        return optax.chain(direction, end)
    if path != "projection":
        end = optax_normuon.to_sphere(learning_rate, axis=axis, path=path, angle=angle)
        return optax.chain(direction, end)
    project = optax_normuon.project_to_sphere(axis=axis)
    if not isinstance(project_every, int) or project_every > 1:
        project = optax.conditionally_transform(
            project, lambda step, **_: jnp.asarray(step) % project_every == 0
        )
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate), project)


def by_kind(
    *,
    matrices: optax.GradientTransformation,
    tables: optax.GradientTransformation,
    vectors: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Each to its kind of parameters: the blocks' kernels, embeddings and head, and all scales."""

    def kind(path: tuple, _: jax.Array) -> str:
        if is_matrix(path):
            return "matrices"
        return "tables" if role_of(path) in TABLES else "vectors"

    return optax.partition(
        {"matrices": matrices, "tables": tables, "vectors": vectors},
        lambda params: jax.tree_util.tree_map_with_path(kind, params),
    )


def matrix_layout(params: Any) -> Any:
    """A `layout` that says which parameters are matrices, where some vectors are stacked."""
    sides = MatrixLayout(-2, -1)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: sides if is_matrix(path) else None, params
    )
