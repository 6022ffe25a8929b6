"""Which backend "auto" takes and how a kernel is called, as far as a machine without a GPU can tell."""

import re
from concurrent.futures import Future

import jax
import jax._src.lib
import jax.numpy as jnp
import pytest

from normuon_core.kernels.launches import Launch, Output
from optax_normuon.kernels import backend, compiler, triton_call


@pytest.fixture
def with_gpu(monkeypatch):
    """As on a machine whose kernels could run."""
    monkeypatch.setattr(backend, "_missing", lambda: None)


def test_auto_takes_the_kernels_where_they_run(with_gpu, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert backend.takes_kernels("auto", [jnp.float32, jnp.bfloat16])
    assert not backend.takes_kernels("auto", [jnp.float32, jnp.float64])
    assert not backend.takes_kernels("xla", [jnp.float32])


def test_auto_leaves_arrays_that_may_be_sharded_to_xla(with_gpu, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not backend.takes_kernels("auto", [jnp.float32])
    assert backend.takes_kernels("triton", [jnp.float32])
    taken = []

    def local(x):
        taken.append(backend.takes_kernels("auto", [x.dtype]))
        return x

    mesh = jax.make_mesh((1,), ("one",))
    jax.shard_map(local, mesh=mesh, in_specs=jax.P(), out_specs=jax.P())(jnp.ones(2))
    assert taken == [True]


class FakeTriton:
    """In jaxlib's place: it notes what it is given, and serialises it as text."""

    def __init__(self):
        self.kernels = []
        self.calls = []

    def create_array_parameter(self, zeroed, alignment):
        return "array", zeroed, alignment

    def create_scalar_parameter(self, value, kind):
        return kind, value

    def TritonKernel(self, *arguments):
        self.kernels.append(arguments)
        return arguments

    def TritonKernelCall(self, kernel, *arguments):
        self.calls.append(arguments)
        return self

    def to_proto(self, name, metadata):
        return name.encode()


@pytest.fixture
def fake_triton(monkeypatch):
    fake = FakeTriton()
    monkeypatch.setattr(jax._src.lib, "gpu_triton", fake)
    return fake


LAUNCH = Launch(
    "a kernel (x, scale, y, count, size, y_out, z)",
    grid=5,
    constants={},
    outputs=(Output((2, 3), "float32"), Output((4,), "bfloat16")),
    sizes=(7,),
    aliases={0: 2},
    descriptors=1,
)


@pytest.fixture
def compiled(monkeypatch):
    """The signatures that were compiled."""
    found = []

    def compile_ahead(launch, arguments, capability):
        found.append((launch.kernel, tuple(arguments), capability))
        done = Future()
        done.set_result(compiler.Compiled("name", "code", 1024, 12))
        return done

    monkeypatch.setattr(triton_call, "compile_ahead", compile_ahead)
    return found


def lowered():
    x, y = jnp.ones(6, jnp.float16), jnp.ones((2, 3))

    def call(x, y):
        return triton_call.triton_call(LAUNCH, [x, 0.5, y, 4], capability=90)

    return jax.jit(call).trace(x, y).lower(lowering_platforms=("cuda",)).as_text()


def test_a_kernel_takes_inputs_then_sizes_then_outputs_then_scratch_memory(fake_triton, compiled):
    text = lowered()
    array, at_16 = "array", 16
    assert fake_triton.calls == [
        (
            5,
            1,
            1,
            [
                (array, 0, at_16),
                ("fp32", 0.5),
                (array, 0, at_16),
                ("i32", 4),
                ("i32", 7),
                (array, 0, at_16),
                (array, 0, at_16),
                (array, 0, at_16),
            ],
        )
    ]
    assert "tensor<640xui8>" in text
    signature = ("*fp16", "fp32", "*fp32", "i32", "i32", "*fp32", "*bf16")
    assert {*compiled} == {(LAUNCH.kernel, signature, 90)}


def test_a_specialised_kernel_gets_the_warps_that_it_was_compiled_for(fake_triton, compiled):
    lowered()
    assert fake_triton.kernels == [("name", 12, 1, 1024, "code", "", 90)]


def test_an_output_overwrites_the_input_that_the_launch_names(fake_triton, compiled):
    text = lowered()
    # The second array among the operands, though the third input.
    assert re.search(r"output_tuple_indices = \[0\],\s*operand_index = 1", text), text


def test_a_launch_is_a_typed_foreign_call_so_that_xla_may_record_it(fake_triton, compiled):
    text = lowered()
    assert "@triton_kernel_call_ffi" in text
    # An old, untyped one has its options as a string.
    assert 'backend_config = {opaque = "' in text, text


def test_xla_cannot_fuse_a_slice_with_an_array_that_is_overwritten(fake_triton, compiled):
    """Its fusion would forget that the array is overwritten, and leave the rest of it undefined."""
    text = lowered()
    call = text.index("@triton_kernel_call_ffi")
    assert "optimization_barrier" in text[:call], text
    assert "optimization_barrier" in text[call:], text
