"""What a transformation may expect of the parameters that come with the gradients."""

import optax

from optax_normuon.paths import named_leaves


def require_params(params) -> None:
    """Raises what Optax raises where parameters are needed and missing."""
    if params is None:
        # The message itself is not public: let a public transformation raise it.
        optax.add_decayed_weights(1.0).update((), optax.EmptyState(), None)


def check_leaves(updates, params) -> None:
    """Every gradient belongs to a parameter of its shape; parameters without gradient are fine.

    Raises:
      ValueError: it names the leaf.
    """
    shapes = {path: leaf.shape for path, _, leaf in named_leaves(params)}
    for path, name, leaf in named_leaves(updates):
        if path not in shapes:
            raise ValueError(f"{name}: a gradient without a parameter. {_REMEDY}")
        if leaf.shape != shapes[path]:
            raise ValueError(
                f"{name}: a gradient of shape {leaf.shape} for a parameter of shape {shapes[path]}."
                f" {_REMEDY}"
            )


_REMEDY = "Pass the parameters that the gradients were taken of."
