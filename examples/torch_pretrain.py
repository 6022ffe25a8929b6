"""`python -m examples pretrain` in PyTorch, from the same first weights on the same batches.

It takes the same options, and writes a folder that `python -m examples plot` draws beside the other's:

    python -m examples.torch_pretrain --steps 50 --output examples/out/torch
    torchrun --nproc-per-node 2 -m examples.torch_pretrain --steps 50 --output examples/out/two

Under `torchrun` each process takes its rows of every batch, and one of them orthogonalizes each matrix.
"""

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional

import torch_ref
from examples.configuration import read_arguments, write_config
from examples.errors import BadInput, one_line
from examples.gpt import first_parameters
from examples.metrics import Metrics
from examples.optimizers import OptimizerConfig, make_optimizer
from examples.pretrain import Pretrain
from examples.runs import new_folder
from examples.settings import Devices
from examples.torch_gpt import GPT, load_weights
from normuon_core import RECIPES


def pretrain(told: Pretrain) -> Path:
    """Trains; returns the run's folder.

    Raises:
      BadInput: as `examples.launch.launch`, or a setting that PyTorch's half does not have.
    """
    prepared = told.prepare(None)
    config, task, training = prepared.config, prepared.task, prepared.config.training
    _check(config)
    rank, ranks = 0, int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and not distributed.is_initialized():
        distributed.init_process_group()
    if ranks > 1:
        rank = distributed.get_rank()
    if training.batch % ranks:
        raise BadInput(
            f"--batch: {training.batch} windows cannot be divided over {ranks} processes."
        )
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    model = GPT(task.model).to(device)
    load_weights(model, task.model, first_parameters(task.model, training.seed))
    optimizer = make_torch_optimizer(model, config.optimizer, ranks=ranks)
    followed = make_optimizer(config.optimizer, training.steps).followed
    folder = told.output or Path()
    if rank == 0:
        folder = new_folder(told.output, "torch")
        write_config(config, folder / "config.toml")
    metrics = Metrics(folder, tensorboard=False, written=rank == 0)
    seconds = 0.0

    def evaluate(step: int) -> None:
        with torch.no_grad():
            losses = [float(_loss(model, batch["tokens"])) for batch in task.validation]
        loss = float(np.mean(losses))
        metrics.write({"step": step, "validation_loss": loss, "seconds": seconds})
        if rank == 0:
            print(f"step {step}: validation loss {loss:.4f}", flush=True)

    evaluate(0)
    for step in range(training.steps):
        begun = time.perf_counter()
        rates = {name: np.asarray(rate(step)).item() for name, rate in followed.items()}
        for group in optimizer.param_groups:
            matrices = group["optimizer"] != "adamw"
            group["lr"] = rates["lr_muon" if matrices else "lr_adamw"]
            if matrices:
                group["momentum"] = rates["momentum"]
        windows = task.batch(step)["tokens"]
        loss = _loss(model, np.split(windows, ranks)[rank])
        loss.backward()
        loss = _average(loss.detach(), model, ranks)
        norm = clip(model, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        logged = {"loss": float(loss), "gradient_norm": float(norm), **rates}
        seconds += time.perf_counter() - begun
        metrics.write({"step": step + 1, **logged})
        if (step + 1) % training.evaluate_every == 0 or step + 1 == training.steps:
            evaluate(step + 1)
    metrics.close()
    if rank == 0:
        torch.save(model.state_dict(), folder / "model.pt")
        print(f"Written: {folder}")
    return folder


def make_torch_optimizer(
    model: nn.Module, config: OptimizerConfig, *, ranks: int = 1
) -> torch_ref.NorMuon:
    """`examples.optimizers.make_optimizer` for PyTorch, without clipping and schedules."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    groups = torch_ref.param_groups(
        model,
        lr=config.learning_rate or 0.0,
        adam_lr=config.adam_learning_rate or 0.0,
        recipe=config.optimizer,
        weight_decay=config.weight_decay,
        momentum_dtype=getattr(torch, config.momentum_dtype),
        compute_dtype=torch.float32 if on_cpu else None,
    )
    world = distributed.group.WORLD if ranks > 1 else None
    return torch_ref.NorMuon(groups, lr=config.learning_rate or 0.0, process_group=world)


def clip(model: nn.Module, largest: float) -> torch.Tensor:
    """Scales the gradients down to a global norm, exactly as Optax does; returns the norm before."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    if norm >= largest:
        for gradient in gradients:
            gradient.div_(norm).mul_(largest)
    return norm


def _loss(model: nn.Module, windows: np.ndarray) -> torch.Tensor:
    """Mean cross-entropy of the next tokens of (batch, context + 1)."""
    device = next(model.parameters()).device
    tokens = torch.from_numpy(windows.astype(np.int64)).to(device)
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _average(loss: torch.Tensor, model: nn.Module, ranks: int) -> torch.Tensor:
    """The loss of all processes; their gradients are averaged too, since clipping needs the norm."""
    if ranks > 1:
        for tensor in (loss, *(param.grad for param in model.parameters())):
            assert tensor is not None
            distributed.all_reduce(tensor)
            tensor.div_(ranks)
    return loss


def _check(config: Pretrain) -> None:
    model, optimizer = config.model, config.optimizer
    refused = {
        f"--optimizer {optimizer.optimizer}": optimizer.optimizer not in RECIPES,
        "--accumulation": optimizer.accumulation != 1,
        f"--dtype {model.dtype}": model.dtype != "float32",
        f"--param-dtype {model.param_dtype}": model.param_dtype != "float32",
        "--scan": model.scan,
        "--mesh": config.devices != Devices(None, None, None, None),
    }
    if found := [name for name, there in refused.items() if there]:
        raise BadInput(f"{', '.join(found)}: PyTorch's half of the example has no such setting.")


if __name__ == "__main__":
    with one_line():
        pretrain(read_arguments(Pretrain()))
    if distributed.is_initialized():
        distributed.destroy_process_group()
