"""Which backend "auto" takes, as far as a machine without a GPU can tell."""

import os
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from optax_normuon.kernels import backend


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


@pytest.mark.parametrize("before", [None, "somewhere"])
def test_importing_jax_triton_leaves_tritons_cache_as_it_was(monkeypatch, before):
    """jax-triton empties the variable, and PyTorch's own Triton cannot start with it empty."""

    def empty_the_variable(name):
        os.environ["TRITON_CACHE_DIR"] = ""
        return types.ModuleType(name)

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name != "jax_triton":
                return None
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, self)

        def create_module(self, spec):
            return empty_the_variable(spec.name)

        def exec_module(self, module):
            pass

    if before is None:
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TRITON_CACHE_DIR", before)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    backend.load_jax_triton.cache_clear()
    assert backend.load_jax_triton() is sys.modules["jax_triton"]
    backend.load_jax_triton.cache_clear()
    monkeypatch.delitem(sys.modules, "jax_triton")
    assert os.environ.get("TRITON_CACHE_DIR") == before
