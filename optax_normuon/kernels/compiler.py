"""Launches as machine code: each kernel is compiled once for a signature, several at one time.

Triton keeps what it has compiled on disk, so that the next process finds it there.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from normuon_core.kernels.compile_threads import compile_threads

if TYPE_CHECKING:
    from normuon_core.kernels.launches import Launch

_POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "uint8": "*u8",
}
"""Triton's name for an array of each dtype that a kernel takes."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one signature.

    Attributes:
      name: in the code. ptx: the code. shared_bytes: of shared memory that a program takes.
      num_warps: of a program, those included that a specialised kernel adds to the ones it is given.
    """

    name: str
    ptx: str
    shared_bytes: int
    num_warps: int


Type: TypeAlias = "str | tuple[str, ...]"
"""Triton's name for a number or an array, or one for each of a tuple of arrays."""


def compile_ahead(launch: "Launch", arguments: Sequence[Type], capability: int) -> Future[Compiled]:
    """Starts to compile a launch's kernel, unless that has been done.

    Args:
      arguments: of all that is no constant, in order.
      capability: the GPU's compute capability, 90 for 9.0.
    """
    constants = tuple(launch.constants.items())
    return _compile_ahead(
        launch.kernel, tuple(arguments), constants, launch.num_warps, launch.num_stages, capability
    )


def type_of(value: Any) -> str:
    """Triton's type of a number or of an array."""
    if isinstance(value, float):
        return "fp32"
    return "i32" if isinstance(value, int) else _POINTERS[value.dtype.name]


@functools.cache
def _compile_ahead(
    kernel: Any,
    arguments: tuple[Type, ...],
    constants: tuple[tuple[str, Any], ...],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> Future[Compiled]:
    return compile_threads().submit(
        _compile, kernel, arguments, dict(constants), num_warps, num_stages, capability
    )


def _pointers(types: Iterable[Type]) -> Iterator[tuple[int, ...]]:
    """Where the arrays are among a kernel's arguments, and in their tuples."""
    for place, each in enumerate(types):
        if isinstance(each, tuple):
            yield from ((place, inner) for inner in range(len(each)))
        elif each.startswith("*"):
            yield (place,)


def _compile(
    kernel: Any,
    arguments: tuple[Type, ...],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    capability: int,
) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source_class = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_class = GluonASTSource
    names = [name for name in kernel.arg_names if name not in constants]
    types = dict(zip(names, arguments, strict=True))
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    # XLA's buffers lie at multiples of 128 bytes, and the accelerator needs multiples of 16.
    aligned = {path: [["tt.divisibility", 16]] for path in _pointers(signature.values())}
    compiled: Any = triton.compile(
        source_class(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        # No contraction of a * b + c into one rounding: two compilers need not agree on where.
        options={"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False},
    )
    made = compiled.metadata
    return Compiled(made.name, compiled.asm["ptx"], made.shared, made.num_warps)
