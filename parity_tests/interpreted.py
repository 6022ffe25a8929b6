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
from normuon_core.fused_step import Device
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
    scalars = tuple(value if isinstance(value, int | float) else None for value in inputs)
    arrays = [value for value, scalar in zip(inputs, scalars, strict=True) if scalar is None]
    outputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in launch.outputs]
    return jax.pure_callback(_callback(launch, scalars), tuple(outputs), *arrays)


@functools.lru_cache
def _callback(launch, scalars):
    """The same one for the same launch: JAX compiles a callback anew for every other function."""

    def run(*arrays):
        rest = iter(arrays)
        given = [_as_tensor(next(rest)) if scalar is None else scalar for scalar in scalars]
        # The interpreter patches Triton's language while it runs: one launch at a time.
        with _ONE_AT_A_TIME:
            return tuple(map(_as_array, torch_ref.kernels.launcher.launch(launch, given)))

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
