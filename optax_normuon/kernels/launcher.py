"""Where `normuon_core`'s Triton kernels meet JAX arrays, and which backend runs a step."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_normuon.kernels.backend import load_jax_triton

if TYPE_CHECKING:
    from normuon_core.fused_step import Device
    from normuon_core.kernels.launches import Launch


_SCRATCH_BYTES = 256
"""What one program's two descriptors for the tensor memory accelerator take."""


def describe_device() -> "Device":
    """What launches need to know of the GPU."""
    from normuon_core.fused_step import Device

    device: Any = jax.local_devices()[0]
    return Device(f"sm{device.compute_capability.replace('.', '')}", device.core_count)


def launch(launch: "Launch", inputs: Sequence[Any]) -> tuple[jax.Array, ...]:
    """Calls a kernel. An aliased output overwrites its input, which XLA copies if it is still needed."""
    arrays = [index for index, value in enumerate(inputs) if not isinstance(value, int | float)]
    outputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in launch.outputs]
    if launch.uses_descriptors:
        # jaxlib passes a kernel its array arguments, then null for the scratch memory that Triton
        # kernels take behind their own arguments. One array more stands where that is expected.
        outputs.append(jax.ShapeDtypeStruct((launch.grid * _SCRATCH_BYTES,), jnp.uint8))
    jax_triton = load_jax_triton()
    assert jax_triton is not None
    results = jax_triton.triton_call(
        # As float32: jax-triton passes Python's floats in double precision.
        *(np.float32(value) if isinstance(value, float) else value for value in inputs),
        kernel=launch.kernel,
        out_shape=outputs,
        grid=launch.grid,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,
        input_output_aliases={
            arrays.index(source): output for output, source in launch.aliases.items()
        },
        **launch.constants,
    )
    return tuple(results[: len(launch.outputs)])
