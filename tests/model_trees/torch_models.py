"""Models of PyTorch as a safetensors file names their weights: one dict, keys with dots, (out, in)."""

import jax
import jax.numpy as jnp

from .roles import EMBEDDING, HEAD, NORM, TORCH_LINEAR, Model

TRANSFORMERS = "https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models"


def llama():
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return {
        name: jax.ShapeDtypeStruct(tuple(parameter.shape), jnp.float32)
        for name, parameter in model.named_parameters()
    }


MODELS = [
    Model(
        "torch_llama",
        "transformers",
        "LlamaForCausalLM, widths of Llama 3.2 1B, untied",
        f"{TRANSFORMERS}/llama/modeling_llama.py",
        "safetensors, a flat dict whose keys have dots",
        llama,
        {
            "model.embed_tokens.weight": EMBEDDING,
            "model.layers.*_proj.weight": TORCH_LINEAR,
            "model.*norm.weight": NORM,
            "lm_head.weight": HEAD,
        },
    ),
]
