"""Models in Flax Linen: nested dicts, kernels stored (in, out)."""

import jax

from .roles import (
    BIAS,
    EMBEDDING,
    FLAX_CONV_2D,
    FLAX_LINEAR,
    HEAD,
    NORM,
    TABLE,
    Model,
    matrices,
)

TRANSFORMERS = "https://github.com/huggingface/transformers/blob/v4.55.4/src/transformers/models"


def _transformers(cls: str, config: str, **changes):
    """The `params` of a Flax model of `transformers`, never allocated."""
    import transformers

    model = getattr(transformers, cls)(getattr(transformers, config)(**changes), _do_init=False)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), model.input_shape))
    return shapes.get("params", shapes)


def bert():
    return _transformers(
        "FlaxBertForSequenceClassification", "BertConfig", num_hidden_layers=2, num_labels=3
    )


def vit():
    return _transformers(
        "FlaxViTForImageClassification", "ViTConfig", num_hidden_layers=2, num_labels=1000
    )


def gpt2():
    return _transformers("FlaxGPT2LMHeadModel", "GPT2Config", n_layer=2)


def llama():
    return _transformers("FlaxLlamaForCausalLM", "LlamaConfig", num_hidden_layers=2)


def resnet():
    return _transformers(
        "FlaxResNetForImageClassification", "ResNetConfig", depths=[2, 1, 1, 2], num_labels=1000
    )


OUT_IN = "a square kernel stored (out, in), as FlaxConv1D's: only other layers' shapes tell"

MODELS = [
    Model(
        "linen_bert",
        "transformers",
        "FlaxBertForSequenceClassification",
        f"{TRANSFORMERS}/bert/modeling_flax_bert.py",
        "Linen, Hugging Face names, MNLI's three labels",
        bert,
        {
            "*_embeddings/embedding": EMBEDDING,
            "*/LayerNorm/*": NORM,
            "*/dense/kernel": FLAX_LINEAR,
            "*/self/*/kernel": FLAX_LINEAR,
            "*/dense/bias": BIAS,
            "*/self/*/bias": BIAS,
            "classifier/kernel": HEAD,
            "classifier/bias": BIAS,
        },
    ),
    Model(
        "linen_vit",
        "transformers",
        "FlaxViTForImageClassification",
        f"{TRANSFORMERS}/vit/modeling_flax_vit.py",
        "Linen, Hugging Face names, a convolution for patches",
        vit,
        {
            "vit/embeddings/cls_token": TABLE,
            "vit/embeddings/position_embeddings": TABLE,
            "vit/embeddings/patch_embeddings/projection/kernel": EMBEDDING,
            "vit/embeddings/patch_embeddings/projection/bias": BIAS,
            "*/attention/attention/*/kernel": FLAX_LINEAR,
            "*/attention/attention/*/bias": BIAS,
            "*/dense/kernel": FLAX_LINEAR,
            "*/dense/bias": BIAS,
            "*layernorm*/scale": NORM,
            "*layernorm*/bias": NORM,
            "classifier/kernel": HEAD,
            "classifier/bias": BIAS,
        },
    ),
    Model(
        "linen_gpt2",
        "transformers",
        "FlaxGPT2LMHeadModel",
        f"{TRANSFORMERS}/gpt2/modeling_flax_gpt2.py",
        "Linen, but FlaxConv1D stores its kernels (out, in); a tied head",
        gpt2,
        {
            "transformer/w?e/embedding": EMBEDDING,
            "*/ln_?/*": NORM,
            "*/c_attn/kernel": matrices(1, 0),
            "*/c_fc/kernel": matrices(1, 0),
            "*/mlp/c_proj/kernel": matrices(1, 0),
            "*/attn/c_proj/kernel": matrices(1, 0, doubt=OUT_IN),
            "*/c_*/bias": BIAS,
        },
    ),
    Model(
        "linen_llama",
        "transformers",
        "FlaxLlamaForCausalLM",
        f"{TRANSFORMERS}/llama/modeling_flax_llama.py",
        "Linen, Hugging Face names, norms called weight",
        llama,
        {
            "model/embed_tokens/embedding": EMBEDDING,
            "*norm/weight": NORM,
            "*_proj/kernel": FLAX_LINEAR,
            "lm_head/kernel": HEAD,
        },
    ),
    Model(
        "linen_resnet",
        "transformers",
        "FlaxResNetForImageClassification",
        f"{TRANSFORMERS}/resnet/modeling_flax_resnet.py",
        "Linen, 2-D convolutions with batch norms, a classifier inside a sequence",
        resnet,
        {
            "*/convolution/kernel": FLAX_CONV_2D,
            "*/normalization/*": NORM,
            "classifier/1/kernel": HEAD,
            "classifier/1/bias": BIAS,
        },
    ),
]
