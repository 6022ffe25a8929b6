"""What every test runs under: strict promotion, no silent rank broadcasting, GPU tests only on GPUs."""

import gc
import importlib.metadata
import importlib.util
import os
import threading
from pathlib import Path

# Tests compile small programs and run each a few times: most of their time is the compiler's.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
OLDER_JAX = int(importlib.metadata.version("jaxlib").split(".")[1]) < 11
if OLDER_JAX:
    # Later ones stop at a flag that they do not know.
    QUICK_COMPILATION += (
        " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    )
# `make test-ordinary` compiles as users do.
if "ORDINARY_XLA" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{QUICK_COMPILATION} {os.environ.get('XLA_FLAGS', '')}"

# JAX keeps many small objects alive, and collecting them again and again takes a seventh of the time.
gc.set_threshold(200_000, 20, 20)

# Many tests compile the same program, in this process and in others, and in processes that they start,
# which inherit the environment: each is compiled once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402 - JAX and XLA read the environment once, at import
import pytest  # noqa: E402

if OLDER_JAX:
    # They make a context for every program, 4 ms and a megabyte; later ones keep one for each thread.
    from jax._src.interpreters import mlir

    make_ir_context, of_thread = mlir.make_ir_context, threading.local()

    def ir_context_of_thread():
        if not hasattr(of_thread, "context"):
            of_thread.context = make_ir_context()
        return of_thread.context

    mlir.make_ir_context = ir_context_of_thread

# A callback may wait for arrays that the one thread which runs it has still to compute.
jax.config.update("jax_cpu_enable_async_dispatch", False)

# Before the backend is asked for: eight virtual devices, for the tests of meshes.
jax.config.update("jax_num_cpu_devices", 8)

if jax.default_backend() != "gpu":
    # Triton decides when it is imported: without a GPU the kernels run under its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from parity_tests.quick_interpreter import make_quick

        make_quick()

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        help="folder of golden traces for parity_tests/test_golden.py (default: the repository's)",
    )


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; JAX sees none"))


@pytest.fixture
def x64():
    """float64 in JAX, for tests that need it; users' default is off, and so is the tests'."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def interpreted():
    """The kernels under Triton's interpreter, in both frameworks."""
    if jax.default_backend() == "gpu":
        pytest.skip("the kernels are compiled here, and not interpreted")
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from parity_tests.interpreted import interpreted_kernels

    with interpreted_kernels():
        yield
