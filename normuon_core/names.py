"""What a parameter's path says of it: its kind, the layer that owns it, and the role these suggest.

Every library and author names parameters differently: `layers_0/attn/q_proj/kernel` (Flax),
`model.layers.0.mlp.up_proj.weight` (safetensors), `mlp/~/linear_0` with `w` (Haiku), `wq`, `b_up`,
`norm_weight` (arrays kept by hand). Only the leaf's own name and its layer's decide, since what stands
further out names a model and not a leaf.
"""

import re
from collections.abc import Iterable
from enum import Enum
from functools import cached_property


class Role(Enum):
    """What a name suggests."""

    EMBEDDING = "embedding"
    HEAD = "output head"
    NORM = "normalization"
    VECTOR = "a stack of vectors"
    STATE_SPACE = "a state-space parameter"
    ADAPTER = "low-rank adapter"
    CONVOLUTION = "convolution"
    TRANSPOSED_CONVOLUTION = "transposed convolution"
    ATTENTION_IN = "attention kernel"
    ATTENTION_OUT = "attention output kernel"
    GENERAL = "general linear layer"
    LINEAR = "linear layer"
    PLAIN = "plain layer"
    """A linear layer whose name does not tell whether it is the output head: `Dense_3`, `fc`,
    `layers/4`, `output`."""
    UNKNOWN = ""


KINDS = ("kernel", "weight", "weights", "w")
"""Names of matrices as layers call them; `weight` is stored (out, in), the others (in, out)."""

_EMBEDDING = {
    *("emb", "embed", "embedding", "embeddings", "embedder", "embedders", "wte", "wpe", "vocab"),
    *("unembed", "unembedding", "embeds", "tok", "shared", "vocabulary"),
}
_PROJECTION = {"proj", "project", "projection", "mapping", "linear", "dense", "fc", "mlp"}
_TABLE = {
    *("pos", "position", "positional", "positions", "posembed", "token", "tokens", "cls", "table"),
    *("latents", "registers", "codebook", "prompt", "prototypes", "centroids", "queries", "slots"),
}
_HEAD = {"head", "heads", "classifier", "readout", "logits", "unembed", "logit"}
_HEAD_LIKE = {"output", "outputs", "decoder", "score", "pred", "prediction", "predictions"}
_HEAD_AROUND = {*_HEAD, "cls", "predictions", "prediction", "final"}
_NORM = {"ln", "bn", "gn", "rms"}
_VECTOR = {
    "bias",
    "biases",
    "scale",
    "gamma",
    "beta",
    "offset",
    "gain",
    "ls",
    "layerscale",
    "lambda",
}
_CONV = {"conv", "convs", "convolution", "convolutions", "dwconv", "depthwise", "pwconv", "convnet"}
_TRANSPOSED = {"deconv", "deconvs", "upconv", "upconvs", "convtranspose", "transpose", "transposed"}
_QUERY = {"query", "q", "wq"}
_ATTENTION_IN = {*_QUERY, "key", "value", "k", "v", "wk", "wv", "qkv", "kv"}
_ATTENTION_OUT = {"out", "o", "vec"}
_ATTENTION = {"attn", "attention", "self", "cross", "multi", "multihead", "mha", "query", "key"}
_LINEAR = {
    *("dense", "linear", "mlp", "ffn", "fc", "up", "down", "gate", "expert", "experts", "moe"),
    *("wi", "wo", "intermediate", "router", "gating", "in", "feedforward", "ff", "hidden"),
}
_PLAIN = {
    *("dense", "linear", "fc", "output", "outputs", "out", "final", "last", "decoder", "layer"),
    *("layers", "proj", "score", "pred", "predictions", "projection", "lin", "net", "seq"),
}
_BESIDE = {"proj", "einsum", "attn", "w", "projection", "c", "self", "attention"}
_BOXES = ("value", "raw_value", "array")


def parts_of(keys: Iterable[str]) -> tuple[str, ...]:
    """The parts of a path, whichever of `/` and `.` the keys join them with; Haiku's `~` is none."""
    parts = (part for key in keys for part in re.split(r"[/.]", key))
    return tuple(part for part in parts if part not in ("", "~"))


def words(part: str) -> list[str]:
    """`MultiHeadAttention_0` -> multi, head, attention; `ln1` -> ln; `lm_head` -> lm, head."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]


def without_box(parts: tuple[str, ...], siblings: int) -> tuple[str, ...]:
    """The path without the last part where that names a box around one array, as `kernel/value`.

    Args:
      parts: the leaf's.
      siblings: how many leaves share the leaf's parent, itself included.
    """
    if len(parts) > 1 and parts[-1] in _BOXES and siblings == 1:
        return parts[:-1]
    return parts


class Name:
    """One parameter's name, read.

    Attributes:
      parts: of the whole path.
      kind: one of `KINDS`, or the last part's own name where it is none of them.
      owner: the words of the layer that owns the leaf; for the layers of a list those of the list.
      around: the words of the parts outside of the owner, the nearest first.
      is_listed: whether the layer is known by its place in a list alone.
    """

    def __init__(self, parts: tuple[str, ...]):
        # A tree may be a single array, whose path is empty.
        self.parts = parts = parts or ("",)
        last = words(parts[-1])
        kinds = [word for word in last if word in KINDS and word != "w"]
        self.is_raw = False
        if last and len(last) == 1 and last[0] in KINDS and not re.search(r"\d", parts[-1]):
            self.kind, place = last[0], len(parts) - 2
        elif kinds:
            self.kind, place = kinds[0], len(parts) - 1
        else:
            self.kind, place, self.is_raw = parts[-1], len(parts) - 1, True
        self.is_listed = False
        while place >= 0 and re.fullmatch(r"\d+", parts[place]):
            self.is_listed, place = True, place - 1
        self.owner_place = place
        owner = words(parts[place]) if place >= 0 else []
        self.owner = [word for word in owner if word not in KINDS or len(owner) == 1]
        self.around = [words(part) for part in reversed(parts[: max(place, 0)])]

    @cached_property
    def stored_out_in(self) -> bool:
        return self.kind in ("weight", "weights")

    @cached_property
    def role(self) -> Role:
        """The role that the name suggests, the surest first."""
        last, owner = words(self.parts[-1]), set(self.owner)
        around = self.around[0] if self.around else []
        if "lora" in last or any("lora" in part for part in [self.owner, *self.around]):
            return Role.ADAPTER
        if self._is_norm(last):
            return Role.NORM
        if (self.is_raw and self._is_vector(last)) or "bias" in last:
            return Role.VECTOR
        if "log" in last or (self.is_raw and self.parts[-1] in ("A", "D")):
            return Role.STATE_SPACE
        if self._is_embedding(last, owner):
            return Role.EMBEDDING
        if (
            owner & _HEAD
            and not owner & _ATTENTION
            and not (self.is_listed and _ATTENTION & {*around})
        ):
            return Role.HEAD
        if owner & _TRANSPOSED:
            return Role.TRANSPOSED_CONVOLUTION
        if owner & _CONV:
            return Role.CONVOLUTION
        if "general" in owner:
            return Role.GENERAL
        named = owner - _BESIDE
        if named and named <= _ATTENTION_IN:
            return Role.ATTENTION_IN
        if named and named <= _ATTENTION_OUT:
            return Role.ATTENTION_OUT
        if owner & (_LINEAR - _PLAIN) or (self.is_raw and re.fullmatch(r"w\d+", self.kind)):
            return Role.LINEAR
        if any({"experts", "expert", "moe"} & set(part) for part in self.around[:1]):
            return Role.LINEAR
        if (owner & _PLAIN and named <= _PLAIN) or (self.is_listed and not owner):
            return Role.PLAIN
        return Role.UNKNOWN

    @property
    def is_query(self) -> bool:
        named = set(self.owner) - _BESIDE
        return bool(named) and named <= _QUERY

    @property
    def is_part_of_complex(self) -> bool:
        """Whether the leaf is an array kept by hand, the real or imaginary part of a complex one."""
        return self.is_raw and words(self.parts[-1])[-1:] in (["re"], ["im"], ["real"], ["imag"])

    @property
    def is_einsum(self) -> bool:
        return "einsum" in self.owner

    @property
    def is_linear(self) -> bool:
        """Whether the owner's name is one of a linear layer, even if a head may have it too."""
        return self.role is Role.LINEAR or bool(set(self.owner) & _LINEAR)

    @property
    def is_head_like(self) -> bool:
        """Whether the owner's name is one that heads have, and inner layers too."""
        return bool(set(self.owner) & _HEAD_LIKE)

    @property
    def is_in_head(self) -> bool:
        """Whether something around the layer is called a head."""
        return any(set(part) & _HEAD_AROUND and not set(part) & _ATTENTION for part in self.around)

    @property
    def is_scanned(self) -> bool:
        return any(re.search(r"scan|stack|vmap", part, re.IGNORECASE) for part in self.parts)

    def _is_vector(self, last: list[str]) -> bool:
        whole = self.parts[-1].lower()
        return (
            bool(set(last[-1:]) & _VECTOR)
            or bool({"bias", "biases"} & set(last))
            or re.match(r"b_|.*_b$", self.parts[-1]) is not None
            or re.fullmatch(r"b([qkvoig]|qkv)?_?\d*|g", whole) is not None
        )

    def _is_norm(self, last: list[str]) -> bool:
        if not self.is_raw:
            return self.kind != "kernel" and not self.is_listed and is_norm(self.owner)
        if is_norm(last):
            return True
        module = words(self.parts[-2]) if len(self.parts) > 1 else []
        return self._is_vector(last) and is_norm(module)

    def _is_embedding(self, last: list[str], owner: set[str]) -> bool:
        if self.kind in ("embedding", "embeddings"):
            return True
        if self.is_raw and set(last) & (_EMBEDDING | _TABLE):
            return True
        patches = [part for part in [self.owner, *self.around[:2]] if "patch" in part]
        if any(set(part) & _EMBEDDING for part in patches):
            return True
        return bool(owner & _EMBEDDING) and not self.is_listed and not owner & _PROJECTION


def is_norm(named: list[str]) -> bool:
    """Whether the words of a layer's name end with a normalization's: `ln_f`, `q_norm`, `BatchNorm`."""
    named = [word for word in named if len(word) > 1]
    return bool(named) and (
        named[-1] in _NORM or re.search(r"norms?$|normalization$", named[-1]) is not None
    )


QUERIES = ("query", "q", "q_proj", "wq", "q_einsum")
OUTPUTS = ("out", "o", "o_proj", "out_proj", "wo", "attn_vec_einsum", "output")
