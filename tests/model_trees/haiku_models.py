"""Models in Haiku: two levels of dicts, module paths as keys, arrays named w and b."""

import importlib.util
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp

from .roles import (
    BIAS,
    DEPTHWISE,
    EMBEDDING,
    FLAX_CONV_2D,
    FLAX_LINEAR,
    HEAD,
    NORM,
    TABLE,
    Model,
    adamw,
)

HAIKU = "https://github.com/google-deepmind/dm-haiku/blob/v0.0.17"
IMAGES = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def _parameters(forward, inputs):
    return jax.eval_shape(hk.transform_with_state(forward).init, jax.random.key(0), inputs)[0]


def resnet50():
    return _parameters(lambda images: hk.nets.ResNet50(1000)(images, is_training=True), IMAGES)


def mobilenet():
    return _parameters(lambda images: hk.nets.MobileNetV1(num_classes=1000)(images, True), IMAGES)


def transformer():
    """The example that Haiku installs beside itself, under a name that this repository has too."""
    path = Path(hk.__file__).parents[1] / "examples" / "transformer" / "model.py"
    spec = importlib.util.spec_from_file_location("haiku_transformer", path)
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)

    def forward(tokens):
        stack = model.Transformer(num_heads=4, num_layers=2, attn_size=32, dropout_rate=0.1)
        return model.LanguageModel(stack, model_size=128, vocab_size=50257, pad_token=0)(tokens)

    return _parameters(forward, TOKENS)


def lstm():
    """Two LSTMs and a multilayer perceptron over characters, as `examples/rnn/train.py` puts them."""

    def forward(tokens):
        core = hk.DeepRNN(
            [
                lambda step: jax.nn.one_hot(step, 128),
                hk.LSTM(256),
                jax.nn.relu,
                hk.LSTM(256),
                hk.nets.MLP([256, 128]),
            ]
        )
        return hk.dynamic_unroll(core, tokens, core.initial_state(tokens.shape[1]))[0]

    return _parameters(forward, TOKENS)


MODELS = [
    Model(
        "haiku_resnet50",
        "dm-haiku",
        "hk.nets.ResNet50",
        f"{HAIKU}/haiku/_src/nets/resnet.py",
        "Haiku, convolutions named w, batch norms with leading axes of 1, a head called logits",
        resnet50,
        {
            "*batchnorm*/*": NORM,
            "*conv*/w": FLAX_CONV_2D,
            "*/logits/w": HEAD,
            "*/logits/b": BIAS,
        },
    ),
    Model(
        "haiku_mobilenet",
        "dm-haiku",
        "hk.nets.MobileNetV1",
        f"{HAIKU}/haiku/_src/nets/mobilenetv1.py",
        "Haiku, depthwise and pointwise convolutions in turn",
        mobilenet,
        {
            "*batch_norm*/*": NORM,
            "*/conv2_d/w": FLAX_CONV_2D,
            "*/pointwise_conv/w": FLAX_CONV_2D,
            "*/depthwise_conv/w": DEPTHWISE,
            "*/logits/w": HEAD,
            "*/logits/b": BIAS,
        },
    ),
    Model(
        "haiku_transformer",
        "dm-haiku",
        "examples.transformer.model.LanguageModel",
        f"{HAIKU}/examples/transformer/model.py",
        "Haiku, counted names (linear_3), a head that shows by the vocabulary alone",
        transformer,
        {
            "language_model/positional_embeddings": TABLE,
            "language_model/embed/embeddings": EMBEDDING,
            "language_model/linear/w": HEAD,
            "language_model/linear/b": BIAS,
            "transformer/layer_norm*": NORM,
            "transformer/[lm]*/w": FLAX_LINEAR,
            "transformer/linear*/b": BIAS,
            "transformer/multi*/b": BIAS,
        },
    ),
    Model(
        "haiku_lstm",
        "dm-haiku",
        "hk.DeepRNN([hk.LSTM(256), hk.LSTM(256), hk.nets.MLP([256, 128])])",
        f"{HAIKU}/examples/rnn/train.py",
        "Haiku, recurrent: inputs and state in one w, gates in its outputs, characters given one-hot",
        lstm,
        {
            "lstm*/linear/w": FLAX_LINEAR,
            "*/b": BIAS,
            "mlp/~/linear_0/w": FLAX_LINEAR,
            "mlp/~/linear_1/w": adamw("head", "a last layer whose characters show nowhere else"),
        },
    ),
]
