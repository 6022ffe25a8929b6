"""Which backend runs a step, and what the kernels lack where they cannot."""

import importlib.util
from collections.abc import Iterable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

Backend = Literal["xla", "triton", "auto"]

_DTYPES = ("float16", "bfloat16", "float32")


def check_backend(backend: str) -> None:
    """Raises a ValueError unless `backend` is known and can run here."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown; use one of {get_args(Backend)}.")
    if backend == "triton" and (missing := _missing()) is not None:
        raise ValueError(f"backend='triton' {missing}; or use backend='auto'.")


def takes_kernels(
    backend: Backend, dtypes: Iterable[DTypeLike], *, specs_known: bool = False
) -> bool:
    """Whether the kernels run on arrays of these dtypes.

    They do with "triton", and with "auto" on a CUDA device with Triton, unless the compiler may
    divide arrays over several devices without our knowledge.

    Args:
      specs_known: whether it is known how arrays are divided over devices.

    Raises:
      ValueError: "triton" on another device, or for a dtype that the kernels do not take.
    """
    other = {name for dtype in dtypes if (name := jnp.dtype(dtype).name) not in _DTYPES}
    if backend == "triton":
        check_backend(backend)
        if other:
            raise ValueError(
                f"backend='triton' takes {', '.join(_DTYPES)}, not {', '.join(sorted(other))}; use"
                " backend='auto'."
            )
        return True
    if backend != "auto" or other or _missing() is not None:
        return False
    return specs_known or not _is_partitioned()


def has_kernels() -> bool:
    """Whether kernels could run here, if an optimizer takes them."""
    return _missing() is None


def _is_partitioned() -> bool:
    """Whether arrays may be divided over devices: the compiler cannot divide a kernel's call with them.

    Within `jax.shard_map` an array is one device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    in_shard_map = not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() > 1 and not in_shard_map


def _missing() -> str | None:
    """What the kernels lack here, and the remedy; None if nothing."""
    device = jax.local_devices()[0]
    if device.platform != "gpu" or not hasattr(device, "compute_capability"):
        return f"needs a CUDA device, and JAX sees {device.device_kind}; install JAX for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install 'optax-normuon[triton]'"
    return None
