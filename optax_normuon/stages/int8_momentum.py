"""The momentum of matrices as int8, and that of other leaves in floats."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from normuon_core.quantization import scale_shape
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.quantization import dequantized, quantized
from optax_normuon.mesh.found_views import note_views
from optax_normuon.mesh.scales import blocks_on_mesh
from optax_normuon.mesh.specs import Specs, SpecTree, resolve_specs
from optax_normuon.mesh.statistics import zeros_beside


@dataclass(frozen=True)
class Int8Leaves:
    """The leaves of one tree whose momentum is kept in int8: its matrices.

    Attributes:
      views: of the matrices.
      specs: how the leaves lie on a mesh; None without one.
    """

    views: Views
    specs: Specs | None

    @classmethod
    def of(
        cls, layout: LayoutTree | Views, param_specs: SpecTree | Specs, tree: optax.Params
    ) -> "Int8Leaves":
        """Of parameters, or of gradients."""
        return cls(resolve_layouts(layout, tree), resolve_specs(param_specs, tree))

    def zeros(self, params: optax.Params) -> tuple[optax.Params, optax.Params]:
        """(momentum, scales) before the first step."""
        note_views(self.views)

        def momentum(path: KeyPath, leaf: jax.Array) -> jax.Array:
            dtype = jnp.int8 if path in self.views else working_dtype(leaf.dtype)
            return jnp.zeros_like(leaf, dtype=dtype)

        def scales(path: KeyPath, leaf: jax.Array | None):
            if leaf is None:
                return None
            if path not in self.views:
                return optax.MaskedNode()
            view = self.views[path]
            axes = blocks_on_mesh(view, path, self.specs).scale_axes
            return zeros_beside(leaf, scale_shape(view), jnp.bfloat16, axes, self.specs)

        parameters = unbox(params)
        named = zip(parameters.paths, parameters.leaves, strict=True)
        return (
            jax.tree_util.tree_map_with_path(momentum, params),
            parameters.tree.unflatten([scales(path, leaf) for path, leaf in named]),
        )

    def read(
        self, momentum: optax.Params, scales: optax.Params, like: optax.Params
    ) -> optax.Params:
        """The momentum of every leaf in floats.

        Args:
          like: a tree whose leaves have the dtypes; int8 stays where it has none.
        """
        dtypes = {p: leaf.dtype for p, _, leaf in named_leaves(like) if p in self.views}
        kept = {p: leaf for p, _, leaf in named_leaves(momentum) if p in dtypes}
        own = {p: scale for p, scale in self._by_path(momentum, scales).items() if p in dtypes}
        made = dequantized(kept, own, dtypes, self.views, self.specs)
        return jax.tree_util.tree_map_with_path(lambda path, old: made.get(path, old), momentum)

    def kept(
        self, new: optax.Params, momentum: optax.Params, scales: optax.Params
    ) -> tuple[optax.Params, optax.Params]:
        """(momentum, scales) after a step.

        Args:
          new: the momentum in floats, None for a leaf that stays as it is. momentum, scales: before.
        """
        floats = {path: leaf for path, _, leaf in named_leaves(new)}
        matrices = {path: leaf for path, leaf in floats.items() if path in self.views}
        q, made = quantized(matrices, self.views, self.specs)
        own = self._by_path(momentum, scales) | made

        def after(path: KeyPath, old: jax.Array) -> jax.Array:
            if path in q:
                return q[path]
            return floats[path].astype(old.dtype) if path in floats else old

        places = unbox(momentum)
        return (
            jax.tree_util.tree_map_with_path(after, momentum),
            places.tree.unflatten([own[path] for path in places.paths]),
        )

    def _by_path(self, momentum: optax.Params, scales: optax.Params) -> dict[KeyPath, jax.Array]:
        """The scales, or what stands in their place, by the paths of what they belong to."""
        places = unbox(momentum)
        return dict(zip(places.paths, places.tree.flatten_up_to(scales), strict=True))
