"""The kernels from JAX without a GPU: each launch calls back into Triton's interpreter."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

import torch_ref.kernels.launcher
from normuon_core.kernels.launches import Output
from normuon_core.kernels.products import Device
from optax_normuon.kernels import backend, launcher

_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Within it, backend "triton" of `optax_normuon` runs on the CPU, as TRITON_INTERPRET=1 lets it.

    Only the call of a kernel is another one than on a GPU; all that leads there is the library's own.
    """
    device = Device("sm90", 4, interpreted=True)
    with (
        mock.patch.multiple(launcher, launch=_launch, describe_device=lambda: device),
        mock.patch.object(backend, "_missing", return_value=None),
    ):
        yield


def _launch(launch, inputs):
    arguments, form = jax.tree.flatten(list(inputs))
    scalars = tuple(value if isinstance(value, int | float) else None for value in arguments)
    arrays = [value for value, scalar in zip(arguments, scalars, strict=True) if scalar is None]
    # An `Output` is a tuple as well.
    outputs = jax.tree.map(
        lambda each: jax.ShapeDtypeStruct(each.shape, jnp.dtype(each.dtype)),
        tuple(launch.outputs),
        is_leaf=lambda each: isinstance(each, Output),
    )
    return jax.pure_callback(_callback(launch, form, scalars), outputs, *arrays)


@functools.lru_cache
def _callback(launch, form, scalars):
    """The same one for the same launch: JAX compiles a callback anew for every other function."""

    def run(*arrays):
        rest = iter(arrays)
        given = [_as_tensor(next(rest)) if scalar is None else scalar for scalar in scalars]
        # The interpreter patches Triton's language while it runs: one launch at a time.
        with _ONE_AT_A_TIME:
            results = torch_ref.kernels.launcher.launch(launch, form.unflatten(given))
        return jax.tree.map(_as_array, results)

    return run


def _as_tensor(array) -> torch.Tensor:
    array = np.array(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _as_array(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    return tensor.numpy()
