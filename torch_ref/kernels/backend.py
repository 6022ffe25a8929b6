"""Which backend runs a step, and what the kernels lack where they cannot."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from normuon_core import Polar, Recipe
from normuon_core.kernels_support import kernels_support
from torch_ref.leaves.dtypes import dtype_name

Backend = Literal["eager", "triton", "auto"]


DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float32: "float32"}
"""What the kernels take, and its name there."""


def check_backend(
    backend: str, recipe: Recipe | Polar, momentum_dtype: torch.dtype | None = None
) -> None:
    """Raises a ValueError unless `backend` is one, is there, and can run the recipe or polar factor.

    "triton" needs Triton installed, and a recipe and a momentum that the kernels know.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; use one of {get_args(Backend)}.")
    if backend == "triton" and not _has_triton():
        raise ValueError(
            "backend='triton' needs Triton, which is not installed: pip install 'optax-normuon[triton]',"
            " or use backend='auto'."
        )
    support = kernels_support(recipe, momentum_dtype=dtype_name(momentum_dtype))
    if backend == "triton" and not support:
        raise ValueError(f"backend='triton': {support}; use backend='auto'.")


def takes_kernels(
    backend: Backend,
    recipe: Recipe | Polar,
    device: torch.device,
    dtypes: Sequence[torch.dtype],
) -> bool:
    """Whether the kernels run a recipe, or the polar factor alone.

    They do where "triton" asks for them, and with "auto" on a CUDA device with Triton, unless the recipe
    has something that they do not know.

    Raises:
      ValueError: "triton" asks for them, and they cannot run: on another device, for a dtype that they
        do not take, or for such a recipe.
    """
    fits = all(dtype in DTYPES for dtype in dtypes)
    if backend == "triton":
        check_backend(backend, recipe)
        if not fits:
            raise ValueError(
                f"backend='triton' takes {', '.join(DTYPES.values())}, not"
                f" {', '.join(str(d) for d in dtypes if d not in DTYPES)}; use backend='auto'."
            )
        if device.type != "cuda" and not is_interpreted():
            raise ValueError(
                f"backend='triton' needs a CUDA device, not {device}; use backend='auto', or set"
                " TRITON_INTERPRET=1 before importing Triton to try the kernels on a CPU, with a"
                " compute_dtype of float32 or float16."
            )
        return True
    if backend != "auto" or device.type != "cuda" or not fits:
        return False
    return _has_triton() and bool(kernels_support(recipe))


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, as TRITON_INTERPRET=1 asks for."""
    from triton.runtime import JITFunction

    from normuon_core.kernels import source

    return not isinstance(source.product, JITFunction)
