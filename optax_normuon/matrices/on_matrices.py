"""A stage on matrices as a transformation of a tree: it stacks the matrices of many leaves.

Layouts, splits, memory and meshes meet here. A stage does not know where the matrices of its stack are
from.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from normuon_core.layout import MatrixView
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.matrices.plan import plan, stack_ceiling
from optax_normuon.matrices.stack import MatrixStage, abstract_state
from optax_normuon.matrices.stages_on_xla import StagesOnXla, step_stacks
from optax_normuon.matrices.views import statistic_leaf_shape
from optax_normuon.mesh.collectives import reshard_as, run_on_mesh
from optax_normuon.mesh.found_views import note_views
from optax_normuon.mesh.leaf_on_mesh import leaf_on_mesh, state_axes
from optax_normuon.mesh.specs import Specs, SpecTree, resolve_specs
from optax_normuon.mesh.statistics import zeros_beside


def on_matrices(
    inner: MatrixStage,
    *,
    layout: LayoutTree | Views = None,
    max_stack_bytes: int | None = None,
    param_specs: SpecTree | Specs = None,
) -> optax.GradientTransformation:
    """Runs `inner` on the matrices of a tree.

    Matrices of one shape, orientation and dtype are stacked across leaves, and `inner` is called once
    for each stack. Leaves that are no matrices, and `None`, pass unchanged. Results come back in the
    leaf's dtype.

    On a mesh, the matrices of a stack are also divided in the same way. Each of them goes whole to one
    owner and comes back, or all stay divided, as `inner.place` says.

    `inner`'s state is kept in trees like the parameters. For each leaf of matrices an array has the
    leaf's rank, with size 1 where a side is reduced; a leaf that is no matrix has an `optax.MaskedNode`.
    The array stands where the leaf does, but outside of the leaf's Flax box, which names the axes of
    another shape.
    With `output_splits` the blocks' statistics stand side by side on the output axis: one for each
    output, or one for each block where a block has a single one. In one case they do not fit beside each
    other: where the blocks have different sizes, and some have their statistics along the outputs and
    others along the inputs (`axis="longer"`). Such a leaf has a tuple of one array for each block.

    Args:
      inner: one stage, or several joined by `chain_stages`.
      layout, param_specs: see `normuon`.
      max_stack_bytes: a ceiling for the working memory of one stack on one device, estimated as four
        times the bytes of its whole matrices. What does not fit makes further stacks, and they run one
        after the other. A matrix that is larger is a stack by itself. None is 1 GiB.

    Raises:
      ValueError: `max_stack_bytes` is not positive; in `init` and `update` see `normuon`.
    """
    ceiling = stack_ceiling(max_stack_bytes)

    template = jax.tree.structure(abstract_state(inner, (1, 1, 1), jnp.float32, -1))

    def block_states(view: MatrixView, dtype: DTypeLike) -> list[list[jax.ShapeDtypeStruct]]:
        """For each output block of a leaf the state's arrays, (batch, rows or 1, columns or 1)."""
        of_size = {
            run.size: jax.tree.leaves(
                abstract_state(
                    inner, view.block_stack_shape(run.size), dtype, view.output_stack_axis
                )
            )
            for run in view.runs
        }
        return [of_size[size] for size in view.output_sizes]

    def init(params: optax.Params) -> optax.OptState:
        views = resolve_layouts(layout, params)
        note_views(views)
        specs = resolve_specs(param_specs, params)

        parameters = unbox(params)

        def leaf_state(path: KeyPath, leaf, index: int):
            if path not in views:
                return None if leaf is None else optax.MaskedNode()
            view = views[path]
            blocks = [states[index] for states in block_states(view, leaf.dtype)]

            def zeros(stack_shape: tuple[int, int, int], dtype: DTypeLike) -> jax.Array:
                shape = statistic_leaf_shape(stack_shape, view)
                axes = None if specs is None else state_axes(shape, leaf_on_mesh(view, path, specs))
                return zeros_beside(leaf, shape, dtype, axes, specs)

            joined = view.joined_statistic([block.shape for block in blocks])
            if joined is not None:
                return zeros(joined, blocks[0].dtype)
            return tuple(zeros(block.shape, block.dtype) for block in blocks)

        return template.unflatten(
            parameters.tree.unflatten(
                leaf_state(path, leaf, index)
                for path, leaf in zip(parameters.paths, parameters.leaves, strict=True)
            )
            for index in range(template.num_leaves)
        )

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        found, specs = resolve_layouts(layout, like), resolve_specs(param_specs, like)
        unboxed = unbox(updates)
        leaves, tree = list(unboxed.leaves), unboxed.tree
        given = {
            i: path
            for i, (path, leaf) in enumerate(zip(unboxed.paths, leaves, strict=True))
            if path in found and leaf is not None
        }
        on_mesh = {i: leaf_on_mesh(found[path], path, specs) for i, path in given.items()}
        state_leaves = [tree.flatten_up_to(each) for each in template.flatten_up_to(state)]
        states = [{i: each[i] for i in on_mesh} for each in state_leaves]
        dtypes = {i: leaves[i].dtype for i in on_mesh}
        stacks = plan(on_mesh, dtypes, StagesOnXla(inner), specs, ceiling=ceiling)

        def step(values, states):
            return step_stacks(inner, stacks, on_mesh, values, states, specs)

        arguments = ({i: leaves[i] for i in on_mesh}, states)
        if specs is None:
            values, states = step(*arguments)
        else:
            axes = (
                {i: leaf.axes for i, leaf in on_mesh.items()},
                [
                    {
                        i: jax.tree.map(lambda x, leaf=on_mesh[i]: state_axes(x.shape, leaf), kept)
                        for i, kept in each.items()
                    }
                    for each in states
                ],
            )
            values, states = run_on_mesh(step, specs, arguments, axes, axes)
            values = {
                i: reshard_as(values[i], specs.leaves[path], specs) for i, path in given.items()
            }
        for i in on_mesh:
            leaves[i] = values[i]
            for each, new in zip(state_leaves, states, strict=True):
                each[i] = new[i]
        return unboxed.boxed(leaves), template.unflatten(map(tree.unflatten, state_leaves))

    return optax.GradientTransformation(init, update)
