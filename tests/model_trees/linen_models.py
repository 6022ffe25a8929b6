"""Models in Flax Linen: nested dicts, kernels stored (in, out)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

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

DIFFUSERS = "https://github.com/huggingface/diffusers/blob/v0.33.1/src/diffusers"
TRANSFORMERS = "https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models"


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


def diffusion_unet():
    """Two levels of Stable Diffusion's network, which resizes before it convolves."""
    from diffusers import FlaxUNet2DConditionModel

    model = FlaxUNet2DConditionModel(
        block_out_channels=(320, 640),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )
    return jax.eval_shape(model.init_weights, jax.random.key(0))


def mixture():
    import nano_moe

    model = nano_moe.NanoMoE(nano_moe.NanoMoEConfig(n_layers=2))
    return jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 16), jnp.int32))[
        "params"
    ]


class UNet(nn.Module):
    """The network of Ronneberger, Fischer and Brox (2015), two of its levels, unnamed layers."""

    widths: tuple[int, ...] = (64, 128, 256)
    classes: int = 21

    @nn.compact
    def __call__(self, x):
        def twice(x, width):
            for _ in range(2):
                x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(width, (3, 3))(x)))
            return x

        skipped = []
        for width in self.widths[:-1]:
            skipped.append(twice(x, width))
            x = nn.max_pool(skipped[-1], (2, 2), (2, 2))
        x = twice(x, self.widths[-1])
        for width, skip in zip(self.widths[-2::-1], skipped[::-1], strict=True):
            up = nn.ConvTranspose(width, (2, 2), (2, 2))(x)
            x = twice(jnp.concatenate([skip, up], axis=-1), width)
        return nn.Conv(self.classes, (1, 1))(x)


def unet():
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    return jax.eval_shape(UNet().init, jax.random.key(0), images)["params"]


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
    Model(
        "linen_diffusion_unet",
        "diffusers",
        "FlaxUNet2DConditionModel",
        f"{DIFFUSERS}/models/unets/unet_2d_condition_flax.py",
        "Linen, diffusers' names: to_q, to_out_0, net_0, 1 x 1 convolutions around attention",
        diffusion_unet,
        {
            "*conv*/kernel": FLAX_CONV_2D,
            "*/attentions_?/proj_*/kernel": FLAX_CONV_2D,
            "*/attn?/to_*/kernel": FLAX_LINEAR,
            "*/ff/net_*/kernel": FLAX_LINEAR,
            "*time_emb*/kernel": FLAX_LINEAR,
            "*norm*/scale": NORM,
            "*/bias": BIAS,
        },
    ),
    Model(
        "linen_moe",
        "nano-moe-jax",
        "nano_moe.NanoMoE",
        "https://pypi.org/project/nano-moe-jax/0.1.0/",
        "Linen, counted names for everything: Dense_0 is an expert's, a router, attention or the head",
        mixture,
        {
            "Embed_0/embedding": EMBEDDING,
            "pos_emb": TABLE,
            "*LayerNorm_?/*": NORM,
            "block_?/*/Dense_?/kernel": FLAX_LINEAR,
            "*Dense_?/bias": BIAS,
            "Dense_0/kernel": HEAD,
        },
    ),
    Model(
        "linen_unet",
        "flax",
        "nn.Conv, nn.ConvTranspose and nn.BatchNorm as arXiv:1505.04597 puts them together",
        "https://github.com/google/flax/blob/v0.12.12/flax/linen/linear.py",
        "Linen, transposed convolutions (height, width, in, out) beside others, 21 classes of pixels",
        unet,
        {
            "Conv_*/kernel": FLAX_CONV_2D,
            "ConvTranspose_?/kernel": matrices(
                (0, 1, 2), 3, "stored (in, out), or (out, in) under transpose_kernel"
            ),
            "Conv*/bias": BIAS,
            "BatchNorm_*/*": NORM,
        },
    ),
]
