"""Where `normuon_core`'s kernels meet JAX arrays."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from optax_normuon.kernels.triton_call import triton_call

if TYPE_CHECKING:
    from normuon_core.kernels.launches import Launch
    from normuon_core.kernels.products import Device


def describe_device() -> "Device":
    """What launches need to know of the GPU."""
    from normuon_core.kernels.products import Device

    device: Any = jax.local_devices()[0]
    return Device(f"sm{device.compute_capability.replace('.', '')}", device.core_count)


def launch(launch: "Launch", inputs: Sequence[Any]) -> tuple[jax.Array, ...]:
    """Calls a kernel. An aliased output overwrites its input, which XLA copies if it is still needed."""
    capability = int(describe_device().architecture.removeprefix("sm"))
    return triton_call(launch, inputs, capability)
