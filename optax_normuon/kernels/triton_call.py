"""A Triton kernel as an operation of JAX, through the foreign function that jaxlib has for it.

jax-triton is made for this and is not used, because no release of it does all that is needed. 0.3.1 is
made for Triton 3.6, and PyTorch 2.13 wants 3.7; it has no Gluon kernels. 0.4.0 needs Triton 3.7; it
launches a warp-specialised kernel with the warps that it was asked for and not with those that the
kernel adds. Neither compiles kernels side by side or keeps them on disk.
"""

import zlib
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
from jax.interpreters import mlir

from optax_normuon.kernels.compiler import Compiled, compile_ahead, type_of

if TYPE_CHECKING:
    from normuon_core.kernels.launches import Launch

_TARGET = "triton_kernel_call_ffi"
"""jaxlib's name of the function. A typed one, so that XLA may record its launches and repeat them as
one (a CUDA graph)."""

_call_p = jax.extend.core.Primitive("normuon_kernel")
_call_p.multiple_results = True


def triton_call(launch: "Launch", inputs: Sequence[Any], capability: int) -> tuple[Any, ...]:
    """Runs a kernel.

    Args:
      inputs: arrays, tuples of arrays, and numbers. An array that an output is to overwrite is copied by
        XLA if it is still needed.
      capability: the GPU's compute capability, 90 for 9.0.

    Returns:
      The launch's outputs, arrays and tuples of arrays.
    """
    inputs = list(inputs)
    for source in launch.aliases.values():
        inputs[source] = _apart(inputs[source])
    arguments, form = jax.tree.flatten(inputs)
    outputs, form_of_outputs = jax.tree.flatten(list(launch.outputs), is_leaf=_is_output)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    if launch.descriptors:
        # jaxlib passes a kernel its array arguments, then null for the scratch memory that Triton
        # kernels take behind their own arguments. One array more stands where that is expected.
        shapes.append(jax.ShapeDtypeStruct((launch.scratch_bytes,), jnp.dtype("uint8")))
    call = _Call(
        launch,
        capability,
        form,
        form_of_outputs,
        tuple(x if isinstance(x, int | float) else None for x in arguments),
        tuple(shapes),
    )
    arrays = [x for x in arguments if not isinstance(x, int | float)]
    # Tracing goes on meanwhile; lowering waits for it.
    call.compile_ahead(arrays)
    results = form_of_outputs.unflatten(_call_p.bind(*arrays, call=call)[: len(outputs)])
    for overwriting in launch.aliases:
        results[overwriting] = _apart(results[overwriting])
    return tuple(results)


def _apart(arrays: Any) -> Any:
    """Arrays that XLA does not take a slice's place, or place into a slice, at the call itself.

    Its fusion of a call with the slices around it (`dynamic_slice_fusion`, jaxlib 0.11.2) forgets that
    an output overwrites an input: what the kernel does not write would be left undefined.
    """
    return jax.lax.optimization_barrier(arrays)


def _is_output(value: Any) -> bool:
    # An `Output` is a tuple as well.
    return hasattr(value, "dtype")


@dataclass(frozen=True)
class _Call:
    """A call but for its arrays.

    Attributes:
      form, form_of_outputs: how arguments and outputs go into tuples.
      numbers: of all arguments one after the other; None for an array.
      shapes: of the outputs and of the scratch memory.
    """

    launch: "Launch"
    capability: int
    form: Any
    form_of_outputs: Any
    numbers: tuple[int | float | None, ...]
    shapes: tuple[jax.ShapeDtypeStruct, ...]

    def compile_ahead(self, arrays: Sequence[Any]) -> Future[Compiled]:
        given = iter(arrays)
        types = [type_of(next(given) if x is None else x) for x in self.numbers]
        own = [type_of(x) for x in self.shapes[: self.form_of_outputs.num_leaves]]
        return compile_ahead(
            self.launch,
            (
                *self.form.unflatten(types),
                *map(type_of, self.launch.sizes),
                *self.form_of_outputs.unflatten(own),
            ),
            self.capability,
        )

    @property
    def aliases(self) -> dict[int, int]:
        """The place of an operand by that of the output which overwrites it: for arrays alone."""
        operands = iter(range(len(self.numbers)))
        places = [next(operands) if x is None else None for x in self.numbers]
        inputs = self.form.unflatten(places)
        outputs = self.form_of_outputs.unflatten(range(self.form_of_outputs.num_leaves))
        return {
            operand: output
            for to, source in self.launch.aliases.items()
            for operand, output in zip(
                jax.tree.leaves(inputs[source]), jax.tree.leaves(outputs[to]), strict=True
            )
        }


@_call_p.def_abstract_eval
def _(*arrays, call):
    del arrays
    return [jax.core.ShapedArray(each.shape, each.dtype) for each in call.shapes]


@_call_p.def_impl
def _(*arrays, call):
    return jax.jit(lambda *given: _call_p.bind(*given, call=call))(*arrays)


def _lower(ctx, *arrays, call):
    from jax._src.lib import gpu_triton  # pyright: ignore[reportPrivateImportUsage]

    launch, code = call.launch, call.compile_ahead(ctx.avals_in).result()
    parameters = [_parameter(number) for number in (*call.numbers, *launch.sizes)]
    parameters += [_parameter(None) for _ in call.shapes]
    kernel = gpu_triton.TritonKernel(
        code.name, code.num_warps, 1, code.shared_bytes, code.ptx, "", call.capability
    )
    proto = gpu_triton.TritonKernelCall(kernel, launch.grid, 1, 1, parameters)
    rule = jax.ffi.ffi_lowering(_TARGET, operand_output_aliases=call.aliases)
    return rule(ctx, *arrays, opaque=zlib.compress(proto.to_proto(code.name, b"")))


def _parameter(number: float | None):
    """Of a number, or of an array for None."""
    from jax._src.lib import gpu_triton  # pyright: ignore[reportPrivateImportUsage]

    if number is None:
        return gpu_triton.create_array_parameter(0, 16)
    kind = "fp32" if isinstance(number, float) else "i32"
    return gpu_triton.create_scalar_parameter(number, kind)


mlir.register_lowering(_call_p, _lower, platform="cuda")
