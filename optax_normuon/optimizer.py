"""The optimizer: stages of matrices assembled from a recipe, and AdamW for everything else."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from normuon_core.cost import Algorithm
from normuon_core.hyperparameters import check_count, check_decay, check_rate
from normuon_core.moving.settings import settings_of_adamw, settings_of_recipe
from normuon_core.polynomials import Coefficients
from normuon_core.recipes import Recipe, find_recipe
from normuon_core.shape_rules import ShapeRule
from optax_normuon.direction import direction_of
from optax_normuon.kernels.backend import Backend
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.multipliers import Multipliers, MultiplierTree, resolve_multipliers
from optax_normuon.leaves.others import check_no_multipliers
from optax_normuon.leaves.parameters import check_leaves, require_params
from optax_normuon.leaves.paths import named_leaves
from optax_normuon.leaves.precision import as_schedule, in_working_precision
from optax_normuon.mesh.found_views import note_settings
from optax_normuon.mesh.specs import Specs, SpecTree, resolve_specs
from optax_normuon.plans import Execution
from optax_normuon.stages.adamw import scale_by_adam
from optax_normuon.stages.chain import chain_of_stages
from optax_normuon.stages.every_steps import every_steps
from optax_normuon.stages.hyperball import to_hyperball
from optax_normuon.stages.increment import decay_and_scale
from optax_normuon.stages.orthogonalization import Orthogonalizer
from optax_normuon.stages.shape_scaling import scale_by_shape
from optax_normuon.stages.weight_decay import add_cautious_weight_decay
from optax_normuon.steps.in_place import stand_ins


@refuse_injection_of_static_arguments
def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    recipe: str | Recipe = "normuon",
    weight_decay: optax.ScalarOrSchedule = 0.0,
    momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool | None = None,
    beta2: float | jax.Array | None = None,
    layout: LayoutTree = None,
    lr_mul: MultiplierTree = None,
    wd_mul: MultiplierTree = None,
    shape_scale: ShapeRule | None = None,
    coefficients: str | Coefficients | None = None,
    steps: int | None = None,
    eps: float | None = None,
    orthogonalizer: Orthogonalizer | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: float = 0.9,
    adam_b2: float = 0.95,
    adam_eps: float = 1e-10,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    adam_nesterov: bool = False,
    adam_eps_root: float = 0.0,
    adam_moment_dtype: DTypeLike | None = None,
    adam_cautious: bool = False,
    adam_every: int | None = None,
    others: optax.GradientTransformation | None = None,
    momentum_dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    param_specs: SpecTree = None,
    max_stack_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NorMuon for the matrices of a model, AdamW for everything else.

    The default for training a Flax model: `optax.chain(optax.clip_by_global_norm(1.0), normuon(0.02,
    adam_learning_rate=3e-3))`. Print `describe(params)` once to see what becomes of each leaf. A
    matrix's update is momentum, polar factor, neuron normalization, cautious weight decay, shape scale,
    learning rate; `docs/stages.md` derives each. `docs/migration.md` has the calls that repeat other
    optimizers.

    Args:
      learning_rate: eta, a number or a schedule.
      recipe: a name of `RECIPES`, or a Recipe (`dataclasses.replace` makes variants).
      weight_decay: lambda, a number or a schedule. It enters as lr * weight_decay, as in AdamW (as
        lr^2 * weight_decay in modded-nanogpt's recipes).
      momentum, nesterov, beta2, shape_scale: None is the recipe's own; `momentum` may be a schedule.
      coefficients, steps, eps: of the polar factor, in place of the recipe's own. `coefficients` is a
        name of `POLYNOMIALS` ("newton_schulz") or one (a, b, c) a step; `steps` makes the set longer or
        shorter (`normuon_core.polynomials.with_steps`: Polar Express is derived for any number); `eps`
        follows the recipe's rule, an addend of the norm or its floor.
      layout: which axes of a leaf are the sides of its matrices. A `MatrixLayout` (or
        `optax.contrib.MuonDimensionNumbers`), None for AdamW, a tree or prefix tree of these, or a
        callable from the parameters to one; `layout_by_path` makes the latter. None at the root
        decides by path and shape.
      lr_mul, wd_mul: factors on learning rate and weight decay: a number, an array over a leaf's
        batch axes (one number a matrix), a tree or prefix tree of these, or a callable;
        `multipliers_by_path` makes the latter.
      orthogonalizer: replaces stage 2, a function (batch, rows, columns) -> the same; it is given
        the momentum in float32 and its result's dtype is kept.
      adam_learning_rate: for the leaves that are no matrices. None is `learning_rate`, which is mostly
        far too high for embeddings.
      adam_b1, adam_b2, adam_eps, adam_weight_decay, adam_nesterov, adam_eps_root: see `optax.adamw`.
      adam_moment_dtype: dtype in which AdamW's first moment is kept (Optax's `mu_dtype`); None is
        float32, or the parameter's dtype where that is wider. The second moment is always that.
      adam_cautious: AdamW's decay reaches only the entries that its update pulls towards zero as well,
        or does not move (`add_cautious_weight_decay`).
      adam_every: k: AdamW updates at the k-th, 2k-th, ... step, by the mean of the gradients since the
        last update; matrices are stepped at every one. Its schedules count all steps. None is 1.
      others: a transformation in AdamW's place for the leaves that are no matrices, with its own
        learning rate inside, such as `optax.lion(1e-4)`. It is given these leaves as `optax.partition`
        would give them, in their own dtypes; `lr_mul` and `wd_mul` are then for matrices only.
      momentum_dtype: None is float32, or the parameter's dtype where that is wider.
      compute_dtype, algorithm, backend: see `polar_factor`.
      param_specs: over which mesh axes each leaf is divided: a PartitionSpec, a tree or prefix tree of
        them (NamedShardings too), or a callable from the parameters. For meshes in automatic mode; in
        explicit mode the arrays' types say it, and None is right. Without it a leaf in automatic mode
        is left to XLA's partitioner.
      max_stack_bytes: a ceiling for the working memory of one stack of matrices, see `on_matrices`.

    Returns:
      A transformation whose updates have the parameters' dtypes; arithmetic outside the polar factor
      and all state are float32, or the parameter's dtype where that is wider. It needs parameters.

    Raises:
      ValueError: here: an unknown recipe (with the nearest name), rule, algorithm or backend, a number
        out of its range (a negative rate, a momentum or beta outside [0, 1), a count below 1), "triton"
        where it cannot run or beside an `orthogonalizer`, `beta2` for a recipe without neuron
        normalization, or AdamW's keywords beside `others`; in `init` and `update`: a layout or a
        multiplier that does not fit its leaf or the tree, or is for a leaf of `others`, a leaf that can
        be read in two ways, a dtype that "triton" does not take, or missing parameters.
      TypeError: a complex or integer leaf, a leaf that is no array, a schedule of `beta2`, or `others`
        that is no transformation.

    References:
      NorMuon, arXiv 2510.05491; Muon, https://kellerjordan.github.io/posts/muon; Polar Express, arXiv
      2505.16932; cautious weight decay, arXiv 2510.12402.
    """
    for name, rate in {
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "adam_learning_rate": adam_learning_rate,
        "adam_weight_decay": adam_weight_decay,
        "adam_eps": adam_eps,
    }.items():
        check_rate(name, rate)
    if adam_every is not None:
        check_count("adam_every", adam_every)
    check_decay("adam_b1", adam_b1)
    check_decay("adam_b2", adam_b2)
    chosen = find_recipe(recipe).override(
        momentum=momentum,
        nesterov=nesterov,
        beta2=beta2,
        shape_scale=shape_scale,
        coefficients=coefficients,
        steps=steps,
        eps=eps,
    )
    execution = Execution(
        chosen,
        orthogonalizer=orthogonalizer,
        momentum_dtype=momentum_dtype,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
        max_stack_bytes=max_stack_bytes,
    )
    direction = direction_of(execution)
    decay_rate = as_schedule(weight_decay)
    if chosen.decay.rate_power == 2:
        decay_rate = _product_of(as_schedule(learning_rate), decay_rate)

    settings = settings_of_recipe(chosen)
    adamw_settings = settings_of_adamw(
        b1=adam_b1,
        b2=adam_b2,
        eps=adam_eps,
        eps_root=adam_eps_root,
        nesterov=adam_nesterov,
        cautious=adam_cautious,
        every=adam_every,
    )

    def matrices(
        by_kernels: bool,
        views: Views,
        specs: Specs | None,
        lr_factors: Multipliers,
        wd_factors: Multipliers,
    ) -> optax.GradientTransformation:
        # On a hyperball the size of an update is nothing, and lr_mul a factor of the rate.
        scales = lr_factors if chosen.hyperball is None else Multipliers()
        chain = in_working_precision(
            chain_of_stages(
                direction(views, specs),
                decay_and_scale(chosen, decay_rate, views, scales, wd_factors),
                _scale_by_rate(learning_rate)
                if chosen.hyperball is None
                else to_hyperball(
                    learning_rate, **vars(chosen.hyperball), lr_mul=lr_factors, layout=views
                ),
            )
        )
        if not by_kernels:
            return chain
        from optax_normuon.steps.fused import with_kernels

        return with_kernels(
            chain,
            execution.kernels(),
            views=views,
            specs=specs,
            learning_rate=learning_rate,
            decay_rate=decay_rate,
            lr_factors=lr_factors,
            wd_factors=wd_factors,
        )

    def adamw(lr_factors: Multipliers, wd_factors: Multipliers) -> optax.GradientTransformation:
        rate = learning_rate if adam_learning_rate is None else adam_learning_rate
        moments = scale_by_adam(
            *(adam_b1, adam_b2, adam_eps, adam_eps_root),
            nesterov=adam_nesterov,
            moment_dtype=adam_moment_dtype,
        )
        increment = (
            add_cautious_weight_decay(
                adam_weight_decay, cautious=adam_cautious, wd_mul=wd_factors, layout=Views()
            ),
            scale_by_shape("none", lr_mul=lr_factors, layout=Views()),
            _scale_by_rate(rate),
        )
        if adam_every in (None, 1):
            return in_working_precision(optax.chain(moments, *increment))
        return in_working_precision(every_steps(adam_every, moments, optax.chain(*increment)))

    def partition(
        params: optax.Params, *trees: optax.Params
    ) -> optax.GradientTransformationExtraArgs:
        """The chains for these parameters; `trees`, of parameters and gradients, tell the dtypes."""
        views = resolve_layouts(layout, params)
        specs = resolve_specs(param_specs, params)
        lr_factors = resolve_multipliers(lr_mul, params, views, what="lr_mul")
        wd_factors = resolve_multipliers(wd_mul, params, views, what="wd_mul")
        by_kernels = execution.takes_kernels(
            _matrix_dtypes(views, *trees), specs_known=specs is not None
        )
        if others is not None:
            check_no_multipliers(params, views, lr_factors, "lr_mul")
            check_no_multipliers(params, views, wd_factors, "wd_mul")
        rest = "adamw" if others is None else "others"
        note_settings(
            lambda: {
                path: settings if path in views else adamw_settings
                for path, _, _ in named_leaves(params)
                if path in views or others is None
            }
        )
        labels = _labels(params, views, rest)
        return optax.partition(
            {
                "matrices": matrices(by_kernels, views, specs, lr_factors, wd_factors),
                rest: adamw(lr_factors, wd_factors) if others is None else others,
            },
            # Optax calls labels that are callable, as a tree of the model's class may be.
            lambda _: labels,
        )

    def init(params: optax.Params) -> optax.OptState:
        return partition(params, params).init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args,
    ) -> tuple[optax.Updates, optax.OptState]:
        params = require_params(params)
        check_leaves(updates, params)
        if (stand_in := stand_ins(params)) is not None:
            return stand_in, state
        chain = partition(params, params, updates)
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _scale_by_rate(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Multiplies by minus the rate. A constant is taken for a schedule: both then have states alike."""
    return optax.scale_by_learning_rate(as_schedule(learning_rate))


def _product_of(first: optax.Schedule, second: optax.Schedule) -> optax.Schedule:
    return lambda count: jnp.asarray(first(count)) * jnp.asarray(second(count))


def _matrix_dtypes(views: Views, *trees: optax.Params) -> set[jnp.dtype]:
    leaves = [named for tree in trees for named in named_leaves(tree)]
    return {leaf.dtype for path, _, leaf in leaves if path in views}


def _labels(params: optax.Params, views: Views, rest: str) -> optax.Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "matrices" if path in views else rest, params
    )
