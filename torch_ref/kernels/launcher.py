"""Where `normuon_core`'s kernels meet tensors, and which backend runs a step."""

import contextlib
import functools
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from normuon_core.kernels.launches import Launch, Output
from torch_ref.kernels.backend import is_interpreted

if TYPE_CHECKING:
    from normuon_core.kernels.products import Device


@functools.cache
def describe_device(device: torch.device) -> "Device":
    """What launches need to know of a device."""
    from normuon_core.kernels.products import Device

    if device.type != "cuda":
        return Device("sm90", 4, interpreted=True)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        f"sm{properties.major}{properties.minor}",
        properties.multi_processor_count,
        interpreted=is_interpreted(),
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, whichever its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def launch(launch: Launch, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Runs a kernel on the current device's stream. Aliased outputs are the inputs they overwrite."""
    device, signature, aligned = _signature(inputs)
    outputs = outputs_of(launch, inputs, device)
    compiled = _COMPILED.setdefault(launch, {})
    with _scratch_on(device) if launch.descriptors else contextlib.nullcontext():
        if aligned and (kernel := compiled.get(signature)) is not None:
            kernel[launch.grid, 1, 1](*inputs, *launch.sizes, *outputs, *launch.constants.values())
            return outputs
        kernel = launch.kernel[(launch.grid,)](
            *inputs,
            *launch.sizes,
            *outputs,
            **launch.compile_options,
        )
    # The interpreter makes no kernel to keep.
    if aligned and kernel is not None:
        compiled[signature] = kernel
    return outputs


def outputs_of(launch: Launch, inputs: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    """What a launch writes: the inputs that it overwrites, and new tensors on the device."""
    return tuple(
        inputs[launch.aliases[index]] if index in launch.aliases else _made(output, device)
        for index, output in enumerate(launch.outputs)
    )


_COMPILED: weakref.WeakKeyDictionary[Launch, dict[tuple, Any]] = weakref.WeakKeyDictionary()
"""Compiled kernels by launch and signature, for as long as the launch is remembered. Triton's own
look-up takes longer than a small kernel runs; the kernels' integers are not specialized, so that the
signature and the alignment suffice."""


def _signature(inputs: Sequence[Any]) -> tuple[torch.device, tuple, bool]:
    """What a kernel is compiled for, of its inputs: (their device, their signature, whether aligned).

    The signature has the device and the dtype of every tensor, those in tuples too. Aligned are inputs
    that all begin at whole 16 bytes; outputs that are made for the kernel always do, and the launch has
    their dtypes.
    """
    dtypes, addresses, device = [], 0, None
    for value in inputs:
        if isinstance(value, tuple):
            for x in value:
                dtypes.append(x.dtype)
                addresses |= x.data_ptr()
        elif isinstance(value, torch.Tensor):
            dtypes.append(value.dtype)
            addresses |= value.data_ptr()
            device = value.device
    assert device is not None
    return device, (device, *dtypes), addresses % 16 == 0


def _made(output: Output | tuple[Output, ...], device: torch.device) -> Any:
    if isinstance(output, Output):
        return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)
    return tuple(_made(each, device) for each in output)


@contextlib.contextmanager
def _scratch_on(device: torch.device) -> Iterator[None]:
    """Memory for the descriptors that a kernel sets up: from PyTorch, so that a graph keeps it.

    Afterwards Triton has the allocator that it had before, which may be the user's.
    """
    if device.type != "cuda":
        yield
        return
    import triton
    from triton.runtime import _allocation

    def allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        del alignment, stream
        return torch.empty(size, dtype=torch.int8, device=device)

    before = _allocation._allocator.get()
    triton.set_allocator(allocate)
    try:
        yield
    finally:
        triton.set_allocator(before)
