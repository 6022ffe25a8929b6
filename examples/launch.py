"""A phase from its configuration to its last weights, or from its last checkpoint on."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from examples.configuration import read_config, write_config
from examples.dpo import Dpo
from examples.errors import BadInput
from examples.gpt import parameter_count
from examples.mesh import batch_parts, read_mesh
from examples.phase import Phase, Prepared
from examples.pretrain import Pretrain
from examples.pretrain_ngpt import PretrainNGPT
from examples.processes import is_first, join
from examples.runs import new_folder
from examples.sampling import generate
from examples.settings import Devices
from examples.sft import Sft
from examples.step import State, abstract_parameters
from examples.training import train

PHASES: dict[str, Any] = {
    "pretrain": Pretrain(),
    "ngpt": PretrainNGPT(),
    "sft": Sft(Path(), Path()),
    "dpo": Dpo(Path(), Path()),
}
"""Each phase with its defaults; a path that has none is empty."""


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run from its last complete checkpoint."""

    run: tyro.conf.Positional[Path]
    """Its folder."""
    devices: Devices = dataclasses.field(default_factory=Devices)


def launch(config: Phase, *, console: Console | None = None) -> Path:
    """Trains a phase in a folder of its own, which is made once its data are read and checked.

    Returns:
      The folder.

    Raises:
      BadInput: settings or data that cannot be trained with; nothing is then left behind.
    """
    mesh = open_mesh(config)
    console = console or Console(quiet=not is_first())
    prepared = config.prepare(mesh)
    _check_determinism(prepared)
    folder = _shared_folder(prepared.config)
    if is_first():
        write_config(_absolute(prepared.config), folder / "config.toml")
    _run(prepared, folder, mesh, console)
    return folder


def resume(config: Resume, *, console: Console | None = None) -> Path:
    """Goes on with a run, on these devices; one that was finished is left as it is.

    Raises:
      BadInput: the folder is no run's, or as `launch`.
    """
    path = config.run / "config.toml"
    if not path.is_file():
        raise BadInput(f"{config.run} is no run's folder: it has no config.toml.")
    phase = tomllib.loads(path.read_text())["phase"]
    told = dataclasses.replace(read_config(path, PHASES[phase]), devices=config.devices)
    mesh = open_mesh(told)
    console = console or Console(quiet=not is_first())
    _run(told.prepare(mesh), config.run, mesh, console)
    return config.run


def open_mesh(config: Phase) -> Mesh | None:
    """Joins the other processes, if there are any, and makes the mesh.

    Raises:
      BadInput: the devices do not fit the mesh, or the batch does not divide over it.
    """
    devices, batch, parts = config.devices, config.training.batch, config.optimizer.accumulation
    join(devices.coordinator, devices.processes, devices.process)
    if devices.mesh is None and jax.process_count() > 1:
        raise BadInput("--mesh is missing: many processes need one to share the work.")
    mesh = None if devices.mesh is None else read_mesh(devices.mesh)
    divisor = parts if mesh is None else parts * batch_parts(mesh)
    if batch % divisor:
        places = [f"{parts} parts"] * (parts > 1) + [devices.mesh or ""] * (mesh is not None)
        raise BadInput(
            f"--batch: {batch} rows cannot be divided over {' and '.join(places)}: give a multiple of"
            f" {divisor}."
        )
    return mesh


def description(prepared: Prepared, mesh: Mesh | None) -> str:
    """What is trained on what, and where."""
    model, training = prepared.task.model, prepared.config.training
    return (
        f"{prepared.description}\n"
        f"GPT with {parameter_count(model):,} parameters: width {model.width}, depth {model.depth},"
        f" {model.heads} heads, context {model.context}, {model.dtype};"
        f" {training.steps} steps of {training.batch} x {model.context} tokens"
        f" on {jax.devices()[0].device_kind}{'' if mesh is None else f', {_described(mesh)}'}"
    )


def _check_determinism(prepared: Prepared) -> None:
    """XLA loses a second deterministic gradient of cuDNN's attention (openxla/xla#46500)."""
    model, training = prepared.task.model, prepared.config.training
    if training.deterministic and model.fused_attention and model.depth > 1 and not model.scan:
        raise BadInput(
            f"--fused-attention in {model.depth} blocks beside each other cannot be compiled to the"
            " same bits each time: give --deterministic False, or pretrain with --scan True."
        )


def _run(prepared: Prepared, folder: Path, mesh: Mesh | None, console: Console) -> None:
    config, model = prepared.config, prepared.task.model
    console.print(description(prepared, mesh), highlight=False)
    console.print(config.optimizer.description(abstract_parameters(model)), soft_wrap=True)
    state = train(
        prepared.task, config.training, config.optimizer, folder, mesh=mesh, console=console
    )
    texts = _samples(prepared, state, mesh)
    if texts and is_first():
        (folder / "samples.txt").write_text("\n\n".join(texts) + "\n")
    for text in texts:
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {folder}", highlight=False, soft_wrap=True)


def _samples(prepared: Prepared, state: State, mesh: Mesh | None) -> list[str]:
    """What the model makes of the prompts that fit, likeliest token by likeliest token."""
    model, tokens = prepared.task.model, prepared.tokens
    wanted = prepared.prompts[: prepared.config.training.samples]
    prompts = [prompt for prompt in wanted if len(prompt) < model.context]
    if not prompts:
        return []
    texts = generate(
        model,
        state.params,
        prompts,
        count=model.context,
        end=tokens.end,
        temperature=0.0,
        seed=0,
        mesh=mesh,
    )
    pairs = zip(prompts, texts, strict=True)
    return [f"{tokens.decode(prompt)} → {tokens.decode(text)}" for prompt, text in pairs]


def _shared_folder(config: Any) -> Path:
    """The run's folder, made by the first process and told to the others."""
    if jax.process_count() == 1:
        return new_folder(config.output, config.phase)
    own = str(new_folder(config.output, config.phase).absolute()) if is_first() else ""
    text = np.zeros(4096, np.uint8)
    text[: len(own.encode())] = np.frombuffer(own.encode(), np.uint8)
    told = multihost_utils.broadcast_one_to_all(text)
    return Path(bytes(told[told > 0].astype(np.uint8)).decode())


def _absolute(config: Any) -> Any:
    """The configuration as it is read from any folder."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    paths = {name: value.absolute() for name, value in values.items() if isinstance(value, Path)}
    return dataclasses.replace(config, **paths)


def _described(mesh: Mesh) -> str:
    sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    count = jax.process_count()
    return f"{mesh.size} devices {sizes}" + (f" of {count} processes" if count > 1 else "")
