"""Pretraining of nGPT: the next token of text, weights on spheres."""

import dataclasses
from typing import ClassVar

from examples.ngpt import NGPTConfig
from examples.presets import NGPT, Presets
from examples.pretrain import Pretrain
from examples.spheres import SphereConfig


@dataclasses.dataclass(frozen=True)
class PretrainNGPT(Pretrain):
    """Train an nGPT on text."""

    phase: ClassVar[str] = "ngpt"
    presets: ClassVar[Presets] = NGPT

    model: NGPTConfig = dataclasses.field(default_factory=NGPTConfig)
    optimizer: SphereConfig = dataclasses.field(default_factory=SphereConfig)
