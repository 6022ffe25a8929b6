"""Attention by cuDNN gives what the definition gives, wherever a model uses it."""

import asyncio
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples import attention
from examples.attention import causal_attention
from examples.errors import BadInput
from examples.gpt import GPTConfig, apply_model, first_parameters
from examples.launch import launch
from examples.losses import next_token
from examples.optimizers import OptimizerConfig
from examples.pretrain import Pretrain
from examples.settings import Training
from examples.step import Setup

BATCH, TIME = 4, 96
HEADS = {  # queries' heads, heads of keys and values, channels of a head
    "each its own": (4, 4, 64),
    "shared": (8, 2, 16),
    "one shared, wide": (2, 1, 128),
}
MEASURED = 1.75  # the largest difference from float64 below, in `spacings`
MEASURED_OF_A_MODEL = 0.024  # between two attentions in half precision, of a leaf's gradient
MODEL = GPTConfig(
    width=64, depth=2, heads=4, kv_heads=2, context=32, dtype="bfloat16", fused_attention=True
)


@pytest.fixture(autouse=True)
def _users_promotion():
    """Flax and jax.nn promote half precision to float32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def drawn(heads, key_heads, size, time=TIME):
    """Query, key, value, and a gradient of what they give, in bfloat16."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, time, n, size) for n in (heads, key_heads, key_heads, heads)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]


def packed(time=TIME):
    """(BATCH, time) int32: three texts in each window, of other lengths in each."""
    rng = np.random.default_rng(1)
    ends = np.stack([rng.choice(np.arange(1, time), 2, replace=False) for _ in range(BATCH)])
    segments = (np.arange(time)[None, :, None] >= ends[:, None, :]).sum(-1)
    return jnp.asarray(segments, jnp.int32)


def mask_of(segments):
    return segments[:, None, :, None] == segments[:, None, None, :]


def defined(query, key, value, mask):
    """softmax(q k / sqrt(size)) v over what is seen, in the inputs' dtype."""
    group = query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, group, 2), jnp.repeat(value, group, 2)
    logits = jnp.einsum("bthc,bshc->bhts", query, key) * query.shape[-1] ** -0.5
    seen = jnp.tril(jnp.ones(logits.shape[-2:], bool))[None, None]
    seen = seen if mask is None else seen & mask
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1)
    return jnp.einsum("bhts,bshc->bthc", weights, value)


def with_gradients(attend, query, key, value, mask, gradient):
    """Values, and the gradients of query, key and value."""
    values, back = jax.vjp(lambda *qkv: attend(*qkv, mask), query, key, value)
    return [values, *back(gradient)]


def spacings(found, expected):
    """The largest difference, in bfloat16's spacing at the largest value."""
    expected = np.asarray(expected, np.float64)
    difference = np.abs(np.asarray(found, np.float64) - expected).max()
    return difference / (np.abs(expected).max() * 2.0**-8)


def by_cudnn(compiled):
    return "__cudnn$fmha" in compiled.as_text()


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_cudnns_attention_and_its_gradients_are_those_of_float64(heads, masked, x64):
    *qkv, gradient = drawn(*heads)
    mask = mask_of(packed()) if masked else None
    fused = functools.partial(causal_attention, fused=True)
    run = jax.jit(lambda *args: with_gradients(fused, *args)).lower(*qkv, mask, gradient).compile()
    assert by_cudnn(run)
    found = run(*qkv, mask, gradient)
    exact = [x.astype(jnp.float64) for x in (*qkv, gradient)]
    expected = jax.jit(lambda *args: with_gradients(defined, *args))(*exact[:3], mask, exact[3])
    apart = [spacings(*pair) for pair in zip(found, expected, strict=True)]
    print("spacings", [round(float(each), 2) for each in apart])
    assert max(apart) < 2 * MEASURED


def logits_and_gradients(config, params, tokens, segments):
    def loss(params):
        logits = apply_model(config, params, tokens, segments)
        return jnp.square(logits).mean(), logits

    (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits, gradients


def differences(found, expected):
    """The largest of a tree's leaves, each relative to its own norm."""

    def relative(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.linalg.norm(x - y) / np.linalg.norm(y)

    return max(jax.tree.leaves(jax.tree.map(relative, found, expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["as it is", "scanned", "in lanes", "on a mesh"])
def test_a_model_with_cudnns_attention_is_the_model_without(way):
    fused = dataclasses.replace(MODEL, scan=way == "scanned")
    plain = dataclasses.replace(fused, fused_attention=False)
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 256, (BATCH, 32)), jnp.int32)
    # JAX's own rule for lanes of it takes no mask (0.11.2), and says so.
    segments = None if way == "in lanes" else packed(32)
    if way == "in lanes":
        keys = jax.random.split(jax.random.key(0), 3)
        params = jax.vmap(lambda key: first_parameters(plain, key))(keys)
    else:
        params = first_parameters(plain, 0)
    if way == "on a mesh":
        if jax.device_count() < 2:
            pytest.skip("one device is no mesh")
        mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
        by_rows = NamedSharding(mesh, PartitionSpec("data"))
        tokens, segments = jax.device_put((tokens, segments), by_rows)
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    found = []
    for config in (fused, plain):

        def run(params, config=config):
            return logits_and_gradients(config, params, tokens, segments)

        compiled = jax.jit(jax.vmap(run) if way == "in lanes" else run).lower(params).compile()
        assert by_cudnn(compiled) == config.fused_attention
        found.append(compiled(params))
    apart = differences(*found)
    print("relative", apart)
    assert apart < 2 * MEASURED_OF_A_MODEL


def test_without_cudnn_the_same_attention_is_xlas(monkeypatch):
    monkeypatch.setattr(attention, "_has_cudnn", lambda: False)
    query, key, value, _ = drawn(4, 2, 16, time=8)
    mask = mask_of(packed(8))
    fused, plain = (causal_attention(query, key, value, mask, fused=on) for on in (True, False))
    np.testing.assert_array_equal(np.asarray(fused), np.asarray(plain))


@pytest.mark.parametrize(
    ("time", "masked", "taken"),
    [(32, False, True), (31, False, True), (32, True, True), (31, True, False)],
)
def test_a_mask_that_cudnn_does_not_take_is_left_to_xla(time, masked, taken, monkeypatch):
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    asked = []

    def attend(query, *_, implementation, **__):
        asked.append(implementation)
        return query

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    query = jnp.zeros((2, time, 2, 64), jnp.bfloat16)
    mask = jnp.ones((2, 1, time, time), bool) if masked else None
    causal_attention(query, query, query, mask, fused=True)
    causal_attention(query, query, query, mask)
    assert asked == ["cudnn" if taken else "xla", "xla"]


@pytest.mark.parametrize(
    "changed", [dict(dtype="float32"), dict(width=48), dict(width=1088)], ids=str
)
def test_a_model_that_cudnn_does_not_take_is_refused(changed):
    with pytest.raises(BadInput, match=r"bfloat16 and heads of 8, 16, \.\.\. 128 channels"):
        dataclasses.replace(MODEL, **changed)
    dataclasses.replace(MODEL, fused_attention=False, **changed)


def test_what_xla_cannot_compile_to_the_same_bits_is_said_and_nothing_is_written(tmp_path):
    output = tmp_path / "run"
    told = Pretrain(data=Path(asyncio.__file__).parent, output=output, model=MODEL)
    with pytest.raises(BadInput, match=r"--deterministic False, or pretrain with --scan True"):
        launch(told)
    assert not output.exists()


def test_a_gpus_programs_are_deterministic_unless_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    setup = Setup(MODEL, OptimizerConfig(), 10, next_token)
    assert setup.compiler_options == {"xla_gpu_deterministic_ops": True}
    assert Training().deterministic
    assert dataclasses.replace(setup, deterministic=False).compiler_options is None
