"""A finished run as a model: to fine-tune, to compare with, to sample from."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from examples.checkpoints import Checkpoints
from examples.configuration import read_table
from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.ngpt import NGPTConfig
from examples.step import abstract_parameters
from examples.tokens import Tokens, load_tokens


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model and what it was trained on.

    Attributes:
      phase: pretrain, ngpt, sft or dpo.
      step: of the run, that the weights are from.
      tokenizer: its file.
    """

    phase: str
    step: int
    model: GPTConfig
    tokenizer: Path | None
    params: Any

    @property
    def tokens(self) -> Tokens:
        return load_tokens(self.tokenizer)


def load_trained(folder: Path, *, mesh: Mesh | None = None, step: int | None = None) -> Trained:
    """The weights of one of a run's checkpoints.

    Args:
      step: which. None is the last.

    Raises:
      BadInput: the folder is no run's, or has no complete checkpoint, or none of that step.
    """
    phase, model, tokenizer = load_description(folder)
    checkpoints = Checkpoints(folder / "checkpoints", keep=None)
    try:
        steps = checkpoints.steps()
        if not steps:
            raise BadInput(f"{folder} has no complete checkpoint yet.")
        if step is None:
            step = steps[-1]
        if step not in steps:
            raise BadInput(
                f"{folder} has no checkpoint of step {step} any more, only of"
                f" {', '.join(map(str, steps))}: it was trained on since. Start anew from it."
            )
        params = checkpoints.restore_params(abstract_parameters(model, mesh), step)
    finally:
        checkpoints.close()
    return Trained(phase, step, model, tokenizer, params)


def load_base(folder: Path, *, mesh: Mesh | None = None, step: int | None = None) -> Trained:
    """A model to go on training with.

    Raises:
      BadInput: as `load_trained`; or an nGPT, whose weights would leave their spheres.
    """
    trained = load_trained(folder, mesh=mesh, step=step)
    if isinstance(trained.model, NGPTConfig):
        raise BadInput(
            f"{folder} is an nGPT: sft and dpo would take its weights off their spheres."
        )
    return trained


def load_description(folder: Path) -> tuple[str, GPTConfig, Path | None]:
    """Phase, model and tokenizer of a run, without its weights.

    Raises:
      BadInput: the folder is no run's.
    """
    path = folder / "config.toml"
    if not path.is_file():
        raise BadInput(f"{folder} is no run's folder: it has no config.toml.")
    settings = tomllib.loads(path.read_text())
    tokenizer = settings.get("tokenizer")
    default = NGPTConfig() if settings["phase"] == "ngpt" else GPTConfig()
    model = read_table(default, settings["model"], f"{path}: model.")
    return settings["phase"], model, None if tokenizer is None else Path(tokenizer)
