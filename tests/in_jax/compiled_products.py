"""Compiles the products of an iteration for Hopper, which takes no GPU; prints what came of them.

`python -m tests.in_jax.compiled_products`: a process of its own, because Triton decides when it is
imported whether kernels are compiled or interpreted.
"""

import json

import numpy as np

from normuon_core.kernels.geometry import block_geometries
from normuon_core.kernels.products import Device, iterate_stack
from normuon_core.layout import MatrixLayout
from normuon_core.polynomials import POLYNOMIALS
from optax_normuon.kernels.compiler import compile_ahead, type_of

HOPPER = 90


def products(short: int, long: int, form, dtype: str):
    """What is compiled for the iteration on two matrices of this size."""
    found = []
    array = np.zeros(1, "float32").astype(dtype) if dtype == "float16" else _BFloat16()

    def launch(own, inputs):
        numbers_or_arrays = [x if isinstance(x, int | float) else array for x in inputs]
        arguments = [*numbers_or_arrays, *own.sizes, *(array for _ in own.outputs)]
        types = [type_of(each) for each in arguments]
        found.append((own, compile_ahead(own, types, HOPPER)))
        return (array,) * len(own.outputs)

    view = MatrixLayout(reduction_axis=-1, output_axis=-2).on((2, short, long))
    (geometry,) = block_geometries(view)
    iterate_stack(
        launch,
        Device(f"sm{HOPPER}", 132),
        array,
        POLYNOMIALS["polar_express"],
        geometry=geometry,
        count=2,
        form=form,
        dtype=dtype,
    )
    return found


class _BFloat16:
    """An array, as far as its type goes."""

    dtype = type("dtype", (), {"name": "bfloat16"})


def main() -> None:
    wide = products(2048, 2048, "standard", "bfloat16")
    narrow = products(768, 3072, "gram", "float16")
    rows = {}
    for own, future in [*wide, *narrow]:
        code = future.result()
        rows[id(code)] = {
            "kernel": own.kernel.__name__,
            "module": own.kernel.__module__,
            "warps": code.num_warps,
            "shared": code.shared_bytes,
            "products": code.ptx.count("wgmma.mma_async"),
            "loads": code.ptx.count("cp.async.bulk.tensor"),
            "dtypes": [name for name in ("bf16", "f16") if f".f32.{name}.{name}" in code.ptx],
        }
    print(json.dumps([*rows.values()]))


if __name__ == "__main__":
    main()
