"""A recipe that no kernel can run: "auto" leaves it to XLA and says so, "triton" is an error."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from normuon_core import recipes
from optax_normuon import RECIPES, describe, normuon, polar_factor
from optax_normuon.kernels import backend
from optax_normuon.plans import Execution
from optax_normuon.stages import momentum
from optax_normuon.steps import fused
from tests.in_jax.meshes import mesh_of

PARAMS = {"up": jnp.ones((8, 16))}


@pytest.fixture
def new_momentum(monkeypatch):
    """A recipe whose momentum rule the core and JAX have learnt, and the kernels have not."""
    monkeypatch.setattr(recipes, "MomentumRule", Literal["lerp", "brand_new"])
    monkeypatch.setitem(momentum._RULES, "brand_new", momentum.lerp_momentum)
    record = recipes.Momentum("brand_new")  # pyright: ignore
    return dataclasses.replace(RECIPES["normuon"], momentum=record)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """As on one GPU: "auto" takes the kernels where they can run."""
    monkeypatch.setattr(backend, "_missing", lambda: None)
    monkeypatch.setattr(backend, "_is_partitioned", lambda: False)


def takes_kernels(recipe, **keywords) -> bool:
    return Execution(recipe, **keywords).takes_kernels([jnp.float32], specs_known=True)


def test_auto_leaves_the_recipe_to_xla(kernels_everywhere, new_momentum):
    assert takes_kernels(RECIPES["normuon"])
    assert not takes_kernels(new_momentum)


def test_auto_steps_the_recipe(interpreted, kernels_everywhere, new_momentum, monkeypatch):
    """The polar factor may be the kernels', which know it; the step is not."""
    stepped = []
    monkeypatch.setattr(fused, "with_kernels", lambda chain, *_, **__: stepped.append(1) or chain)

    def step(recipe):
        tx = normuon(0.1, recipe=recipe, compute_dtype=jnp.float32)
        return tx.update(PARAMS, tx.init(PARAMS), PARAMS)[0]["up"]

    assert jnp.any(step(new_momentum) != 0)
    assert not stepped
    step(RECIPES["normuon"])
    assert stepped


def test_triton_is_an_error_with_a_remedy(kernels_everywhere, new_momentum):
    with pytest.raises(ValueError, match=r"momentum\.rule='brand_new'; use backend='auto'"):
        normuon(0.1, recipe=new_momentum, backend="triton")


def test_describe_says_so(kernels_everywhere, new_momentum):
    mesh = mesh_of(AxisType.Auto, fsdp=8)
    keywords = dict(mesh=mesh, param_specs=P("fsdp"))
    params = {"up": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    text = describe(params, recipe=new_momentum, **keywords)
    assert (
        "Engine xla steps all matrices: the kernels cannot run momentum.rule='brand_new'." in text
    )
    assert "kernels" not in text.split("\n\n")[1]
    assert "cannot run" not in describe(params, recipe="normuon", **keywords)
    assert "kernels" in describe(params, recipe="normuon", **keywords).split("\n\n")[1]


def test_describe_need_not_say_so_where_xla_was_asked_for(new_momentum):
    assert "cannot run" not in describe(PARAMS, recipe=new_momentum, backend="xla")


def test_the_polar_factor_alone_asks_too(kernels_everywhere, monkeypatch):
    monkeypatch.setattr(recipes, "EpsRule", Literal["max", "add", "brand_new"])
    x, keywords = jnp.ones((4, 8)), dict(eps_rule="brand_new", compute_dtype=jnp.float32)
    assert polar_factor(x, **keywords).shape == x.shape
    with pytest.raises(ValueError, match=r"cannot run eps_rule='brand_new'; use backend='auto'"):
        polar_factor(x, backend="triton", **keywords)
