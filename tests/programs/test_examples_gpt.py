"""The example's model: causal, rotary, and routed as intended."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_normuon
from examples.errors import BadInput
from examples.gpt import (
    GPT,
    GPTConfig,
    apply_model,
    apply_with_largest_logits,
    first_parameters,
    parameter_count,
    rotate,
)
from optax_normuon.leaves.paths import named_leaves
from tests.in_jax.tables import leaf_rows

TINY = GPTConfig(width=32, depth=2, heads=2, context=16)


@pytest.fixture(scope="module")
def model():
    return GPT(TINY, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 256, (2, 16), dtype=np.uint8)


def test_a_future_byte_changes_no_earlier_logits(model, tokens):
    changed = tokens.copy()
    changed[:, 9] ^= 1
    apply = nnx.jit(lambda model, windows: model(windows))
    before, after = (np.asarray(apply(model, jnp.asarray(x))) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[:, 9:].max(axis=(0, 2)) > 1e-4).all()


def test_logits_are_float32_also_with_half_precision_activations(tokens):
    config = GPTConfig(width=32, depth=1, heads=2, context=16, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's RMSNorm promotes its statistics
        logits = nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))(jnp.asarray(tokens)))
    assert logits.shape == (2, 16, 256)
    assert logits.dtype == jnp.float32


def test_rotary_products_depend_on_the_distance_alone():
    draws = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    everywhere = np.broadcast_to(draws[:, None, None, :], (2, 12, 1, 8))
    query, key = np.asarray(jax.jit(rotate)(everywhere))[:, :, 0]
    scores = query @ key.T
    for distance in range(-11, 12):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-5)
    assert abs(scores[1, 0] - scores[2, 0]) > 1e-2
    np.testing.assert_allclose(scores[0, 0], draws[0] @ draws[1], rtol=1e-5)


def test_a_width_that_the_heads_do_not_split_is_refused():
    with pytest.raises(BadInput, match="width=36"):
        GPTConfig(width=36, heads=4)
    with pytest.raises(BadInput, match="kv_heads=3"):
        GPTConfig(width=32, heads=4, kv_heads=3)


def test_only_the_matrices_of_the_blocks_go_to_normuon(model):
    table = leaf_rows(optax_normuon.describe(nnx.state(model, nnx.Param)))
    matrices = {path for path, row in table.items() if row["optimizer"] == "NorMuon"}
    layers = ("attention/query", "attention/key", "attention/value", "attention/out")
    layers = (*layers, "mlp/up", "mlp/down")
    assert matrices == {f"blocks/{i}/{layer}/kernel" for i in range(2) for layer in layers}
    others = {path for path, row in table.items() if row["optimizer"] == "AdamW"}
    assert {"embed/embedding", "lm_head/kernel"} < others


def test_parameter_count(model):
    width, depth, head_size = 32, 2, 16
    norms = width * (2 * depth + 2) + 2 * depth * head_size
    assert parameter_count(TINY) == 2 * 256 * width + depth * 12 * width**2 + norms


def test_texts_packed_into_a_window_do_not_see_each_other(model, tokens):
    segments = np.repeat([[1] * 6 + [2] * 10], 2, axis=0)
    changed = tokens.copy()
    changed[:, 3] ^= 1
    apply = nnx.jit(lambda model, x, segments: model(x, segments))
    before, after = (np.asarray(apply(model, x, segments)) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, 6:], after[:, 6:])
    assert np.abs(before - after)[:, 3:6].max() > 1e-4
    alone = np.asarray(apply(model, tokens[:, 6:], segments[:, 6:]))
    np.testing.assert_allclose(before[:, 6:], alone, atol=2e-5)  # rotary: the distance alone counts


def test_a_stack_of_blocks_is_the_same_model_as_a_list_of_them(tokens):
    listed = GPTConfig(width=32, depth=3, heads=4, kv_heads=2, context=16)
    stacked = dataclasses.replace(listed, scan=True)
    params = first_parameters(listed, 0)
    blocks = jax.tree.map(lambda *layers: jnp.stack(layers), *params["blocks"].values())
    apply = jax.jit(apply_model, static_argnums=0)
    one = apply(listed, params, tokens)
    other = apply(stacked, {**params, "blocks": blocks}, tokens)
    np.testing.assert_allclose(one, other, atol=1e-5)
    shapes = jax.tree.map(jnp.shape, first_parameters(stacked, 0)["blocks"])
    assert shapes == jax.tree.map(jnp.shape, blocks)
    assert shapes["attention"]["key"]["kernel"] == (3, 32, 16)
    table = leaf_rows(optax_normuon.describe({**params, "blocks": blocks}))
    assert table["blocks/mlp/up/kernel"]["matrices x (out, in)"] == "3 x (128, 32)"


def test_grouped_queries_are_a_full_model_whose_keys_are_repeated(tokens):
    grouped = GPTConfig(width=32, depth=1, heads=4, kv_heads=2, context=16)
    params = first_parameters(grouped, 0)
    attention = params["blocks"][0]["attention"]
    full = jax.tree.map(lambda x: x, params)
    for name in ("key", "value"):
        kernel = attention[name]["kernel"].reshape(32, 2, 1, 8)
        repeated = jnp.broadcast_to(kernel, (32, 2, 2, 8)).reshape(32, 32)
        full["blocks"][0]["attention"][name]["kernel"] = repeated
    apply = jax.jit(apply_model, static_argnums=0)
    one = apply(grouped, params, tokens)
    other = apply(dataclasses.replace(grouped, kv_heads=None), full, tokens)
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_largest_logits_are_those_of_the_definition_and_fit_qk_clip(tokens):
    config = dataclasses.replace(TINY, depth=1, heads=4, kv_heads=2)
    params = jax.jit(lambda: first_parameters(config, 0))()
    segments = np.repeat([[0, 1]], 8, axis=1).repeat(2, axis=0)

    @jax.jit
    def run(params, tokens):
        _, found = apply_with_largest_logits(config, params, tokens, segments)
        graph, _ = nnx.split(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), nnx.Param)
        model = nnx.merge(graph, params)
        block, x = model.blocks[0], model.embed_norm(model.embed(tokens.astype(jnp.int32)))
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = clip.update(zeros, clip.init(params), params, largest_logits=found)
        moved = jax.tree.map(lambda u: (u != 0).any(), updates)
        return found, block.attention.queries_and_keys(block.attention_norm(x)), moved

    heads = {"*/query/kernel": 4, "*/key/kernel": 2}
    layouts = {path: optax_normuon.HeadLayout(heads=count) for path, count in heads.items()}
    clip = optax_normuon.qk_clip(1e-3, layouts)
    found, (q, k), moved = run(params, tokens)
    assert list(found) == ["blocks/0/attention"]
    seen, unseen_is_larger = np.tril(segments[0][:, None] == segments[0]), False
    for head, largest in enumerate(np.asarray(found["blocks/0/attention"])):
        s = np.einsum("btc,bsc->bts", q[:, :, head], k[:, :, head // 2]) / 8**0.5
        assert largest == pytest.approx(s[:, seen].max(), rel=1e-5)
        unseen_is_larger |= bool(s.max() > 1.01 * largest)
    assert unseen_is_larger
    moved = {name for _, name, leaf in named_leaves(moved) if leaf}
    assert moved == {f"blocks/0/attention/{each}/kernel" for each in ("query", "key")}


def test_largest_logits_of_scanned_blocks_are_one_array():
    config = dataclasses.replace(TINY, scan=True)
    params = jax.eval_shape(lambda: first_parameters(config, 0))
    tokens = jax.ShapeDtypeStruct((2, 16), jnp.uint8)
    _, found = jax.eval_shape(
        lambda params, tokens: apply_with_largest_logits(config, params, tokens), params, tokens
    )
    assert {name: leaf.shape for name, leaf in found.items()} == {"blocks/attention": (2, 2)}
