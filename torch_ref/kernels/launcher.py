"""Where `normuon_core`'s kernels meet tensors, and which backend runs a step."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from normuon_core.kernels.launches import Launch, Output
from torch_ref.kernels.backend import is_interpreted

if TYPE_CHECKING:
    from normuon_core.fused_step import Device


@functools.cache
def describe_device(device: torch.device) -> "Device":
    """What launches need to know of a device."""
    from normuon_core.fused_step import Device

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
    device = next(_arrays(inputs)).device
    outputs = []
    for index, output in enumerate(launch.outputs):
        if index in launch.aliases:
            outputs.append(inputs[launch.aliases[index]])
        elif isinstance(output, Output):
            outputs.append(_empty(output, device))
        else:
            outputs.append(tuple(_empty(each, device) for each in output))
    arrays = list(_arrays((*inputs, *outputs)))
    dtypes = tuple(x.dtype for x in arrays)
    compiled = _COMPILED.setdefault(launch, {}) if device.type == "cuda" else {}
    aligned = all(x.data_ptr() % 16 == 0 for x in arrays)
    with _scratch_on(device) if launch.descriptors else contextlib.nullcontext():
        if aligned and (device, dtypes) in compiled:
            kernel = compiled[device, dtypes]
            arguments = (*inputs, *launch.sizes, *outputs, *launch.constants.values())
            kernel[launch.grid, 1, 1](*arguments)
            return tuple(outputs)
        kernel = launch.kernel[(launch.grid,)](
            *inputs,
            *launch.sizes,
            *outputs,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=False,
        )
    # The interpreter makes no kernel to keep.
    if aligned and kernel is not None:
        compiled[device, dtypes] = kernel
    return tuple(outputs)


_COMPILED: weakref.WeakKeyDictionary[Launch, dict[tuple, Any]] = weakref.WeakKeyDictionary()
"""Compiled kernels by launch, device and dtypes, for as long as the launch is remembered. Triton's own
look-up takes longer than a small kernel runs; the kernels' integers are not specialized, so that these
and the alignment suffice."""


def _arrays(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """The tensors among a kernel's arguments, those in tuples too."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from value


def _empty(output: Output, device: torch.device) -> torch.Tensor:
    return torch.empty(output.shape, dtype=getattr(torch, output.dtype), device=device)


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
