"""A Triton kernel as an operation of JAX, through the foreign function that jaxlib has for it.

jax-triton is made for this and is not used, because no release of it does all that is needed: 0.3 wants
a Triton that PyTorch 2.13 does not take, 0.4 gives a warp-specialised kernel too few warps, and neither
compiles kernels side by side, keeps them on disk, or lets XLA record their launches.
"""

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
from jax.interpreters import mlir

from optax_normuon.kernels.compiler import compile_ahead, types_of

if TYPE_CHECKING:
    from normuon_core.kernels.launches import Launch

_TARGET = "triton_kernel_call_ffi"
"""jaxlib's name of the function. A typed one, so that XLA may record its launches and repeat them as
one (a CUDA graph)."""

_call_p = jax.extend.core.Primitive("normuon_kernel")
_call_p.multiple_results = True


def triton_call(launch: "Launch", inputs: Sequence[Any], capability: int) -> tuple[jax.Array, ...]:
    """Runs a kernel.

    Args:
      inputs: arrays and numbers. An array that an output is to overwrite is copied by XLA if it is still
        needed.
      capability: the GPU's compute capability, 90 for 9.0.

    Returns:
      The launch's outputs.
    """
    arrays = [value for value in inputs if not isinstance(value, int | float)]
    numbers = tuple(value if isinstance(value, int | float) else None for value in inputs)
    outputs = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in launch.outputs]
    if launch.descriptors:
        # jaxlib passes a kernel its array arguments, then null for the scratch memory that Triton
        # kernels take behind their own arguments. One array more stands where that is expected.
        outputs.append(jax.ShapeDtypeStruct((launch.scratch_bytes,), jnp.dtype("uint8")))
    settings = dict(launch=launch, numbers=numbers, outputs=tuple(outputs), capability=capability)
    # Tracing goes on meanwhile; lowering waits for it.
    _compilation(arrays, **settings)
    results = _call_p.bind(*arrays, **settings)
    return tuple(results[: len(launch.outputs)])


def _compilation(arrays, *, launch, numbers, outputs, capability):
    given = iter(arrays)
    inputs = [next(given) if number is None else number for number in numbers]
    own = outputs[: len(launch.outputs)]
    return compile_ahead(launch, types_of([*inputs, *launch.sizes, *own]), capability)


@_call_p.def_abstract_eval
def _(*arrays, outputs, **_):
    del arrays
    return [jax.core.ShapedArray(each.shape, each.dtype) for each in outputs]


@_call_p.def_impl
def _(*arrays, **settings):
    return jax.jit(lambda *given: _call_p.bind(*given, **settings))(*arrays)


def _lower(ctx, *arrays, launch, numbers, outputs, capability):
    from jax._src.lib import gpu_triton  # pyright: ignore[reportPrivateImportUsage]

    code = _compilation(
        ctx.avals_in, launch=launch, numbers=numbers, outputs=outputs, capability=capability
    ).result()
    parameters = [_parameter(number) for number in (*numbers, *launch.sizes)]
    parameters += [_parameter(None) for _ in outputs]
    kernel = gpu_triton.TritonKernel(
        code.name, code.num_warps, 1, code.shared_bytes, code.ptx, "", capability
    )
    call = gpu_triton.TritonKernelCall(kernel, launch.grid, 1, 1, parameters)
    # Of the inputs the arrays alone are operands.
    operands = [place for place, number in enumerate(numbers) if number is None]
    aliases = {operands.index(source): output for output, source in launch.aliases.items()}
    rule = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=aliases)
    return rule(ctx, *arrays, opaque=zlib.compress(call.to_proto(code.name, b"")))


def _parameter(number):
    """Of a number, or of an array for None."""
    from jax._src.lib import gpu_triton  # pyright: ignore[reportPrivateImportUsage]

    if number is None:
        return gpu_triton.create_array_parameter(0, 16)
    kind = "fp32" if isinstance(number, float) else "i32"
    return gpu_triton.create_scalar_parameter(number, kind)


mlir.register_lowering(_call_p, _lower, platform="cuda")
