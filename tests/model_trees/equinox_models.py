"""Models in Equinox: attributes and lists, weights stored (out, in)."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp

from .roles import (
    BIAS,
    DEPTHWISE,
    EMBEDDING,
    HEAD,
    NORM,
    TABLE,
    TORCH_CONV_2D,
    TORCH_LINEAR,
    VECTOR,
    Model,
    adamw,
    matrices,
)

EQUINOX = "https://github.com/patrick-kidger/equinox/blob/v0.13.8"
EQUIMO = "https://github.com/clementpoiret/Equimo/tree/v2.7.0/src/equimo/vision/models"
KEY = jax.random.key(0)


def _parameters(make):
    """As `eqx.filter(model, eqx.is_inexact_array)` would give them, without their values."""

    def is_parameter(leaf):
        return isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jnp.inexact)

    return eqx.filter(eqx.filter_eval_shape(make), is_parameter)


def esm2():
    """Eight million parameters' widths; its layers are stacked."""
    import esm2quinox

    return _parameters(
        lambda: esm2quinox.ESM2(
            num_layers=3, embed_size=320, num_heads=20, token_dropout=True, key=KEY
        )
    )


def dinov2():
    """ViT-S/14 as DINOv2 configures it, with a classifier; two blocks."""
    import equimo.vision.models

    return _parameters(
        lambda: equimo.vision.models.VisionTransformer(
            img_size=518,
            in_channels=3,
            dim=384,
            patch_size=14,
            num_heads=6,
            depths=[2],
            reg_tokens=4,
            use_mask_token=True,
            init_values=1e-5,
            num_classes=1000,
            key=KEY,
        )
    )


def convnext():
    import equimo.vision.models

    return _parameters(
        lambda: equimo.vision.models.ConvNeXt(
            3, depths=[1, 1, 2, 1], dims=[96, 192, 384, 768], key=KEY
        )
    )


def lru():
    """Sequential MNIST by rows: encoder, two blocks of linear recurrent units, a classifier."""
    from discretax import encoder, heads, models

    return _parameters(
        lambda: eqx.nn.Sequential(
            [
                encoder.LinearEncoder(in_features=28, out_features=64, key=KEY),
                models.LRU(hidden_dim=64, state_dim=128, num_blocks=2, key=KEY),
                heads.ClassificationHead(in_features=64, out_features=10, key=KEY),
            ]
        )
    )


class Recurrent(eqx.Module):
    """A cell and a linear layer on its last state, as in Equinox's example of a recurrent network."""

    cell: eqx.Module
    linear: eqx.nn.Linear


def recurrent():
    """One model a cell; speech commands: 40 mel bands in, 35 words out."""

    def model(cell):
        return Recurrent(cell(40, 128, key=KEY), eqx.nn.Linear(128, 35, key=KEY))

    cells = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}
    return {name: _parameters(lambda cell=cell: model(cell)) for name, cell in cells.items()}


def dcgan():
    """The generator of Radford, Metz and Chintala (2015), for images of 64 x 64."""

    def make():
        widths = [100, 512, 256, 128, 64, 3]
        layers = []
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers.append(
                eqx.nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, use_bias=False, key=KEY)
            )
            if i < len(widths) - 2:
                layers.append(eqx.nn.LayerNorm((outputs, 1, 1)))
        return eqx.nn.Sequential(layers)

    return _parameters(make)


def layers():
    """One of each of Equinox's layers with weights, in a multimodal encoder's sizes."""

    def make():
        return {
            "audio": eqx.nn.Conv1d(80, 384, 3, key=KEY),
            "image": eqx.nn.Conv2d(3, 384, 16, 16, key=KEY),
            "video": eqx.nn.Conv3d(3, 384, (2, 16, 16), key=KEY),
            "depthwise": eqx.nn.Conv1d(384, 384, 31, groups=384, key=KEY),
            "embedding": eqx.nn.Embedding(49408, 384, key=KEY),
            "attention": eqx.nn.MultiheadAttention(6, 384, key=KEY),
            "mlp": eqx.nn.MLP(384, 384, 1536, 2, key=KEY),
            "norm": eqx.nn.LayerNorm(384),
            "rms": eqx.nn.RMSNorm(384),
        }

    return _parameters(make)


LAST = "a last linear layer whose labels show nowhere else"
TRANSPOSED = "Equinox stores transposed convolutions (out, in), PyTorch (in, out)"
BARE = "a bare array whose name says neither side"

MODELS = [
    Model(
        "equinox_esm2",
        "esm2quinox",
        "esm2quinox.ESM2",
        "https://github.com/patrick-kidger/esm2quinox/tree/v0.2.0/esm2quinox",
        "Equinox, layers stacked by filter_vmap, a head of two linear layers on one-hot residues",
        esm2,
        {
            "layers/attn/*_proj/weight": matrices(2, 1),
            "layers/linear?/weight": matrices(2, 1),
            "layers/attn/*/bias": BIAS,
            "layers/linear?/bias": BIAS,
            "*layer_norm*/*": NORM,
            "logit_head/linear1/weight": TORCH_LINEAR,
            "logit_head/linear2/weight": HEAD,
            "logit_head/linear?/bias": BIAS,
        },
    ),
    Model(
        "equinox_vit",
        "equimo",
        "equimo.vision.models.VisionTransformer",
        f"{EQUIMO}/vit.py",
        "Equinox, fused qkv, layer scales ls1 and ls2, register and mask tokens",
        dinov2,
        {
            "patch_embed/proj/weight": EMBEDDING,
            "*_pos_embed/weight": TABLE,
            "*_token*": TABLE,
            "*/qkv/weight": TORCH_LINEAR,
            "*/attn/proj/weight": TORCH_LINEAR,
            "*/mlp/fc?/weight": TORCH_LINEAR,
            "*/ls?/gamma": VECTOR,
            "*norm/*": NORM,
            "*/qkv/bias": BIAS,
            "*/proj/bias": BIAS,
            "*/fc?/bias": BIAS,
            "head/weight": HEAD,
            "head/bias": BIAS,
        },
    ),
    Model(
        "equinox_convnext",
        "equimo",
        "equimo.vision.models.ConvNeXt, dims of convnext_tiny",
        f"{EQUIMO}/convnext.py",
        "Equinox, depthwise and 1 x 1 convolutions stored (out, in, 1, 1), biases (out, 1, 1)",
        convnext,
        {
            "*/dwconv/weight": DEPTHWISE,
            "*/pwconv?/weight": TORCH_CONV_2D,
            "*/downsample/conv/weight": TORCH_CONV_2D,
            "*conv*/bias": BIAS,
            "*/ls/gamma": VECTOR,
            "*norm/*": NORM,
            "head/weight": HEAD,
            "head/bias": BIAS,
        },
    ),
    Model(
        "equinox_lru",
        "discretax",
        "discretax.models.LRU between an encoder and a head",
        "https://github.com/camail-official/discretax/tree/v0.3.0/src/discretax",
        "Equinox, linear recurrent units: real and imaginary parts of (out, in) arrays B and C",
        lru,
        {
            "layers/0/linear/weight": TORCH_LINEAR,
            "*/norm/*": NORM,
            "*/*_log": VECTOR,
            "*/D": VECTOR,
            "*/[BC]_re": matrices(1, 0, BARE),
            "*/[BC]_im": matrices(1, 0, BARE),
            "*/channel_mixer/w?/weight": TORCH_LINEAR,
            "*/channel_mixer/w?/bias": BIAS,
            "layers/2/linear/weight": adamw("head", LAST),
            "layers/2/linear/bias": BIAS,
        },
    ),
    Model(
        "equinox_recurrent",
        "equinox",
        "eqx.nn.GRUCell, eqx.nn.LSTMCell",
        f"{EQUINOX}/docs/examples/train_rnn.ipynb",
        "Equinox, recurrent cells: weight_ih and weight_hh (gates times out, in), bias and bias_n",
        recurrent,
        {
            "*/cell/weight_?h": TORCH_LINEAR,
            "*/cell/bias*": BIAS,
            "*/linear/weight": adamw("head", LAST),
            "*/linear/bias": BIAS,
        },
    ),
    Model(
        "equinox_dcgan",
        "equinox",
        "eqx.nn.ConvTranspose2d in the generator of arXiv:1511.06434",
        f"{EQUINOX}/equinox/nn/_conv.py",
        "Equinox, transposed convolutions in an unnamed sequence",
        dcgan,
        {
            "layers/[02468]/weight": matrices((1, 2, 3), 0, TRANSPOSED),
            "layers/[1357]/weight": NORM,
            "layers/[1357]/bias": NORM,
        },
    ),
    Model(
        "equinox_layers",
        "equinox",
        "eqx.nn: Conv1d to Conv3d, Embedding, MultiheadAttention, MLP, LayerNorm, RMSNorm",
        f"{EQUINOX}/equinox/nn",
        "Equinox, its own layers under the names of a multimodal encoder's parts",
        layers,
        {
            "audio/weight": matrices((1, 2), 0),
            "image/weight": TORCH_CONV_2D,
            "video/weight": matrices((1, 2, 3, 4), 0),
            "depthwise/weight": DEPTHWISE,
            "audio/bias": BIAS,
            "image/bias": BIAS,
            "video/bias": BIAS,
            "depthwise/bias": BIAS,
            "embedding/weight": EMBEDDING,
            "attention/*_proj/weight": TORCH_LINEAR,
            "mlp/layers/?/weight": TORCH_LINEAR,
            "mlp/layers/?/bias": BIAS,
            "norm/*": NORM,
            "rms/*": NORM,
        },
    ),
]
