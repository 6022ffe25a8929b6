"""Models of MaxText: Linen with boxed parameters, layers scanned over axis 1."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .roles import BIAS, DEPTHWISE, EMBEDDING, HEAD, NORM, VECTOR, Model, matrices

MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/tree/v0.2.5/src/maxtext"
TOKENS = jax.ShapeDtypeStruct((1, 16), jnp.int32)


def _parameters(name: str, **changes):
    """The parameters of a published configuration, `param_scan_axis` as it is by default: 1."""
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.models import models

    config = pyconfig.initialize(
        ["", str(Path(maxtext.__file__).parent / "configs" / "base.yml")],
        run_name="shapes",
        model_name=name,
        override_model_config=True,
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
        hardware="cpu",
        attention="dot_product",
        per_device_batch_size=1,
        max_target_length=16,
        **changes,
    )
    devices = np.array(jax.devices()[:1]).reshape((1,) * len(config.mesh_axes))
    mesh = jax.sharding.Mesh(devices, config.mesh_axes)
    model = models.transformer_as_linen(config=config, mesh=mesh, quant=None)
    keys = dict.fromkeys(("params", "dropout", "aqt"), jax.random.key(0))
    return jax.eval_shape(
        lambda tokens: model.init(keys, tokens, tokens, enable_dropout=False), TOKENS
    )["params"]


def llama3():
    return _parameters("llama3.1-8b", base_num_decoder_layers=3)


def mixtral():
    return _parameters("mixtral-8x7b", base_num_decoder_layers=3)


def gpt3():
    return _parameters("gpt3-6b", base_num_decoder_layers=4)


def deepseek2():
    return _parameters("deepseek2-16b", base_num_decoder_layers=5, first_num_dense_layers=2)


def qwen3_next():
    """Four cycles of three layers with a gated delta rule and one with attention."""
    return _parameters("qwen3-next-80b-a3b", base_num_decoder_layers=16)


TO_HEADS, FROM_HEADS = matrices(0, (2, 3)), matrices((0, 2), 3)
"""(d, layers, heads, size) of queries, keys, values; (heads, layers, size, d) of the output."""
LINEAR, EXPERTS = matrices(0, 2), matrices(2, 3)
"""(in, layers, out); (experts, layers, in, out)."""

ENDS = {
    "token_embedder/embedding/value": EMBEDDING,
    "decoder/decoder_norm/scale/value": NORM,
    "decoder/logits_dense/kernel/value": HEAD,
}
ATTENTION = {
    "*/self_attention/query/kernel/value": TO_HEADS,
    "*/self_attention/key/kernel/value": TO_HEADS,
    "*/self_attention/value/kernel/value": TO_HEADS,
    "*/self_attention/out/kernel/value": FROM_HEADS,
}

MODELS = [
    Model(
        "maxtext_llama3",
        "maxtext",
        "models.transformer_as_linen, llama3.1-8b",
        f"{MAXTEXT}/models/llama2.py",
        "MaxText, layers on axis 1 of every leaf, norms (width, layers)",
        llama3,
        {
            **ENDS,
            **ATTENTION,
            "decoder/layers/*norm/scale/value": NORM,
            "decoder/layers/mlp/w*/kernel/value": LINEAR,
        },
    ),
    Model(
        "maxtext_mixtral",
        "maxtext",
        "models.transformer_as_linen, mixtral-8x7b",
        f"{MAXTEXT}/models/mixtral.py",
        "MaxText, experts on axis 0 and layers on axis 1 of bare arrays, a router called gate",
        mixtral,
        {
            **ENDS,
            **ATTENTION,
            "decoder/layers/*norm/scale/value": NORM,
            "decoder/layers/MoeBlock_0/gate/kernel/value": LINEAR,
            "decoder/layers/MoeBlock_0/w*/value": EXPERTS,
        },
    ),
    Model(
        "maxtext_gpt3",
        "maxtext",
        "models.transformer_as_linen, gpt3-6b",
        f"{MAXTEXT}/models/gpt3.py",
        "MaxText, biases (out, layers), queries, keys and values in one kernel of five axes",
        gpt3,
        {
            "*_embedder/embedding/value": EMBEDDING,
            "*norm/scale/value": NORM,
            "*norm/bias/value": NORM,
            "*/wi/bias/value": BIAS,
            "*/wo/bias/value": BIAS,
            "*/self_attention/*/bias/value": BIAS,
            "decoder/layers/mlp/w?/kernel/value": LINEAR,
            "*/self_attention/qkv_proj/kernel/value": matrices(
                0, (3, 4), "queries, keys and values apart, or one projection of them all"
            ),
            "*/self_attention/out/kernel/value": FROM_HEADS,
        },
    ),
    Model(
        "maxtext_deepseek2",
        "maxtext",
        "models.transformer_as_linen, deepseek2-16b",
        f"{MAXTEXT}/models/deepseek.py",
        "MaxText, latent attention (wkv_a, wkv_b), two scanned stacks, shared and routed experts",
        deepseek2,
        {
            **ENDS,
            "decoder/*_layers/*norm/scale/value": NORM,
            "*/self_attention/query/kernel/value": TO_HEADS,
            "*/self_attention/wkv_a/kernel/value": LINEAR,
            "*/self_attention/wkv_b/kernel/value": TO_HEADS,
            "*/self_attention/out/kernel/value": FROM_HEADS,
            "decoder/dense_layers/mlp/w*/kernel/value": LINEAR,
            "*/shared_experts/w*/kernel/value": LINEAR,
            "*/MoeBlock_0/gate/kernel/value": LINEAR,
            "*/MoeBlock_0/w*/value": EXPERTS,
        },
    ),
    Model(
        "maxtext_qwen3_next",
        "maxtext",
        "models.transformer_as_linen, qwen3-next-80b-a3b",
        f"{MAXTEXT}/models/qwen3.py",
        "MaxText, a recurrent model: cycles on axis 1, layers of a cycle on axis 2, a stacked conv1d",
        qwen3_next,
        {
            **ENDS,
            "decoder/layers/*norm/scale/value": NORM,
            "*/attention/attention/query/kernel/value": TO_HEADS,
            "*/attention/attention/key/kernel/value": TO_HEADS,
            "*/attention/attention/value/kernel/value": TO_HEADS,
            "*/attention/attention/out/kernel/value": LINEAR,
            "*/A_log": VECTOR,
            "*/dt_bias": BIAS,
            "*/conv1d/kernel": DEPTHWISE,
            "*/local_layers/attention/*_proj*/kernel/value": matrices(0, 3),
            "*/global_layer/mlp/routed_experts/gate/kernel/value": LINEAR,
            "*/global_layer/mlp/routed_experts/w*/value": EXPERTS,
            "*/global_layer/mlp/shared_expert/w*/kernel/value": LINEAR,
            "*/local_layers/mlp/routed_experts/gate/kernel/value": matrices(0, 3),
            "*/local_layers/mlp/routed_experts/w*/value": matrices(3, 4),
            "*/local_layers/mlp/shared_expert/w*/kernel/value": matrices(0, 3),
            "*/shared_expert_gate/kernel/value": VECTOR,
        },
    ),
]
