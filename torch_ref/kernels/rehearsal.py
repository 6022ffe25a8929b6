"""A step that launches nothing, before the first that does: its kernels compile side by side.

Otherwise each kernel would be compiled when it is first launched, one after the other.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from normuon_core.kernels.compile_threads import SIDE_BY_SIDE, compile_threads
from normuon_core.kernels.launches import Launch, Launcher
from torch_ref.kernels.launcher import outputs_of

_NOWHERE = torch.device("meta")


def is_worthwhile(device: torch.device) -> bool:
    """Whether kernels are compiled for a device at all, and several at one time may be.

    Not while a CUDA graph is captured: it records one thread's work alone.
    """
    return (
        SIDE_BY_SIDE
        and device.type == "cuda"
        and torch.version.hip is None
        and not torch.cuda.is_current_stream_capturing()
    )


@contextlib.contextmanager
def rehearsal() -> Iterator[Launcher]:
    """A launcher that starts to compile kernels; at the end all of them are there.

    Arrays that a launch would make have a shape and a dtype, and no memory.

    Raises:
      triton.CompilationError: a kernel does not compile, as its launch would raise.
    """
    import triton

    with triton.AsyncCompileMode(compile_threads()):
        yield _compile


def _compile(launch: Launch, inputs: Sequence[Any]) -> tuple[Any, ...]:
    outputs = outputs_of(launch, inputs, _NOWHERE)
    launch.kernel.warmup(
        *inputs, *launch.sizes, *outputs, grid=(launch.grid,), **launch.compile_options
    )
    return outputs
