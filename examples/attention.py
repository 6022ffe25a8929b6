"""Causal attention, by cuDNN's fused kernels where they can be had."""

import jax


def causal_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    fused: bool = False,
) -> jax.Array:
    """Every token's mean of the values up to its own, weighted by softmax(query key scale).

    Args:
      query: (batch, time, heads, size). key, value: the same, or with fewer heads, each of which a group
        of queries shares.
      mask: (batch, 1, time, time) or None: whether a token may attend to another.
      scale: None is size^-0.5.
      fused: by cuDNN on an NVIDIA GPU, which keeps the square of logits on the chip: XLA writes it and
        reads it again. Takes half precision, and heads of 8, 16, ... 128 channels.

    Returns:
      (batch, time, heads, size), of the query's dtype.
    """
    # Of a mask cuDNN takes even sides alone.
    by_cudnn = fused and _has_cudnn() and (mask is None or query.shape[1] % 2 == 0)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        scale=scale,
        is_causal=True,
        implementation="cudnn" if by_cudnn else "xla",
    )


def _has_cudnn() -> bool:
    """cuDNN's attention needs an Ampere or newer."""
    device = jax.devices()[0]
    return "NVIDIA" in device.device_kind and float(device.compute_capability) >= 8.0
