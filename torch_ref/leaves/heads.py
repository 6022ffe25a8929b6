"""Which linear layers make the output of a model: AdamW trains them."""

import re
from collections.abc import Iterator

from torch import nn

_HEAD = {"head", "heads", "lm_head", "classifier", "embed_out", "logits", "unembed", "readout"}
_HEAD_AT_THE_TOP = {"output", "out", "decoder", "score", "final", "fc_out", "output_projection"}


def output_heads(model: nn.Module) -> dict[nn.Linear, str]:
    """The layers that make the model's output: those called so, else the last linear layer.

    A last layer inside of one of a list's blocks is no head: it ends the last block of a model that has
    no head.
    """
    linear = list(_linear_layers(model))
    named = {module: path for path, module in linear if _is_called_head(path)}
    if named or not linear:
        return named
    path, module = linear[-1]
    if _is_in_block(model, path, linear):
        return {}
    return {module: f"the last linear layer, {path}" if path else "the last linear layer"}


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers in order, save those that belong to an attention of PyTorch's."""
    inner = {
        module.out_proj for module in model.modules() if isinstance(module, nn.MultiheadAttention)
    }
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module not in inner:
            yield path, module


def _is_called_head(path: str) -> bool:
    *outer, own = path.split(".")
    if own in _HEAD or own.endswith("_head"):
        return True
    if own in _HEAD_AT_THE_TOP:
        return not any(re.search(r"\d", part) for part in outer) and len(outer) < 2
    return own.isdigit() and bool(outer) and outer[-1] in ("heads", "lm_heads")


def _is_in_block(model: nn.Module, path: str, linear: list[tuple[str, nn.Linear]]) -> bool:
    parts = path.split(".")
    for depth in range(1, len(parts) - 1):
        container = model.get_submodule(".".join(parts[:depth]))
        if isinstance(container, nn.ModuleList):
            return True
    # One of the same shape under another number says the same: `layers.encoder_layer_3.fc`.
    *outer, own = parts
    shape = model.get_submodule(path).weight.shape
    pattern = re.compile(re.sub(r"\d+", r"\\d+", re.escape(".".join(outer))) + re.escape(f".{own}"))
    return bool(outer) and any(
        other != path and pattern.fullmatch(other) and module.weight.shape == shape
        for other, module in linear
    )
