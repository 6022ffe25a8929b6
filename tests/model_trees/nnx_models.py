"""Models in Flax NNX: states whose leaves are variables."""

import dataclasses
import importlib.util
import sys
import types

from flax import nnx

from .roles import (
    BIAS,
    DEPTHWISE,
    EMBEDDING,
    FLAX_LINEAR,
    HEAD,
    NORM,
    VECTOR,
    Model,
    matrices,
)

TUNIX = "https://github.com/google/tunix/blob/v0.1.7/tunix/models"


def _parameters(make):
    return nnx.state(nnx.eval_shape(make), nnx.Param)


def _tunix(name: str):
    """`tunix.models.NAME.model` without the root of tunix, which imports its trainers."""
    if "tunix" not in sys.modules:
        spec = importlib.util.find_spec("tunix")
        root = types.ModuleType("tunix")
        root.__path__ = list(spec.submodule_search_locations)
        sys.modules["tunix"] = root
    return importlib.import_module(f"tunix.models.{name}.model")


def _tunix_model(package: str, cls: str, config: str):
    module = _tunix(package)
    config = dataclasses.replace(getattr(module.ModelConfig, config)(), num_layers=2)
    return _parameters(lambda: getattr(module, cls)(config, rngs=nnx.Rngs(0)))


def llama3():
    return _tunix_model("llama3", "Llama3", "llama3p1_8b")


def qwen2():
    return _tunix_model("qwen2", "Qwen2", "qwen2p5_0p5b")


def qwen3_moe():
    return _tunix_model("qwen3", "Qwen3", "qwen3_30b_a3b")


def gemma2():
    return _tunix_model("gemma", "Gemma", "gemma2_2b")


def gemma3():
    return _tunix_model("gemma3", "Gemma3", "gemma3_4b_pt")


def mamba2():
    import mamba2_jax

    config = mamba2_jax.Mamba2Config(num_hidden_layers=2)
    return _parameters(lambda: mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)))


def lora():
    """Adapters on every projection, as tunix's examples put them; the base model is frozen."""
    import qwix

    module = _tunix("llama3")
    config = dataclasses.replace(module.ModelConfig.llama3p2_1b(), num_layers=2)
    projections = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*down_proj|.*up_proj"

    def adapted():
        base = module.Llama3(config, rngs=nnx.Rngs(0))
        provider = qwix.LoraProvider(module_path=projections, rank=16, alpha=32.0)
        return qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(1))

    return nnx.state(nnx.eval_shape(adapted), nnx.LoRAParam)


TO_HEADS, FROM_HEADS = matrices(0, (1, 2)), matrices((0, 1), 2)
"""(d, heads, size) of queries, keys, values; (heads, size, d) of the output."""

DENSE_TUNIX = {
    "embedder/input_embedding/value": EMBEDDING,
    "*norm/w/value": NORM,
    "layers/*/attn/[qkv]_proj/w/value": TO_HEADS,
    "layers/*/attn/o_proj/w/value": FROM_HEADS,
}
MLP_KERNELS = {"layers/*/mlp/*_proj/kernel/value": FLAX_LINEAR}
GEMMA = {
    "embedder/input_embedding/value": EMBEDDING,
    "*norm/scale/value": NORM,
    "layers/*/attn/q_einsum/w/value": matrices(1, (0, 2)),
    "layers/*/attn/kv_einsum/w/value": matrices(2, (1, 3)),
    "layers/*/attn/attn_vec_einsum/w/value": FROM_HEADS,
    **MLP_KERNELS,
}

MODELS = [
    Model(
        "nnx_llama3",
        "google-tunix",
        "tunix.models.llama3.model.Llama3, llama3p1_8b",
        f"{TUNIX}/llama3/model.py",
        "NNX, attention kernels named w with axes of heads, MLP kernels named kernel",
        llama3,
        {**DENSE_TUNIX, **MLP_KERNELS, "lm_head/w/value": HEAD},
    ),
    Model(
        "nnx_qwen2",
        "google-tunix",
        "tunix.models.qwen2.model.Qwen2, qwen2p5_0p5b",
        f"{TUNIX}/qwen2/model.py",
        "NNX, biases beside the projections (q_bias), a tied head",
        qwen2,
        {**DENSE_TUNIX, **MLP_KERNELS, "layers/*/attn/[qkv]_bias/value": BIAS},
    ),
    Model(
        "nnx_qwen3_moe",
        "google-tunix",
        "tunix.models.qwen3.model.Qwen3, qwen3_30b_a3b",
        f"{TUNIX}/qwen3/model.py",
        "NNX, a mixture of experts with bare arrays of stacked experts",
        qwen3_moe,
        {
            **DENSE_TUNIX,
            "layers/*/mlp/router/kernel/value": FLAX_LINEAR,
            "layers/*/mlp/*_proj/value": matrices(1, 2),
            "lm_head/w/value": HEAD,
        },
    ),
    Model(
        "nnx_gemma2",
        "google-tunix",
        "tunix.models.gemma.model.Gemma, gemma2_2b",
        f"{TUNIX}/gemma/model.py",
        "NNX, Gemma's einsums: heads before the model's width, keys and values in one array",
        gemma2,
        GEMMA,
    ),
    Model(
        "nnx_gemma3",
        "google-tunix",
        "tunix.models.gemma3.model.Gemma3, gemma3_4b_pt",
        f"{TUNIX}/gemma3/model.py",
        "NNX in bfloat16, Gemma's einsums, norms of queries and keys",
        gemma3,
        GEMMA,
    ),
    Model(
        "nnx_lora",
        "qwix",
        "qwix.apply_lora_to_model on tunix's Llama3, llama3p2_1b",
        "https://github.com/google/qwix/blob/v0.1.8/qwix/_src/providers/lora.py",
        "NNX, LoRA alone: w_lora_a and w_lora_b beside axes of heads, kernel_lora_a and kernel_lora_b",
        lora,
        {
            "*/attn/[qkv]_proj/w_lora_a/value": FLAX_LINEAR,
            "*/attn/[qkv]_proj/w_lora_b/value": TO_HEADS,
            "*/attn/o_proj/w_lora_a/value": FROM_HEADS,
            "*/attn/o_proj/w_lora_b/value": FLAX_LINEAR,
            "*/mlp/*_proj/kernel_lora_[ab]/value": FLAX_LINEAR,
        },
    ),
    Model(
        "nnx_mamba2",
        "mamba2-jax",
        "mamba2_jax.Mamba2ForCausalLM, Mamba2Config",
        "https://github.com/CosmoNaught/mamba2-jax",
        "NNX, a state-space model: A_log, D, dt_bias, a depthwise conv1d, a tied head",
        mamba2,
        {
            "backbone/embedder/embedding/value": EMBEDDING,
            "*norm/weight/value": NORM,
            "*/A_log/value": VECTOR,
            "*/D/value": VECTOR,
            "*/dt_bias/value": BIAS,
            "*/conv1d/conv/kernel/value": DEPTHWISE,
            "*/conv1d/conv/bias/value": BIAS,
            "*_proj/kernel/value": FLAX_LINEAR,
        },
    ),
]
