"""A bar that says how far a run is, how fast, and how long it will take."""

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from examples.gpt import GPTConfig, parameter_count

# Dense bfloat16 products, FLOP/s without sparsity, from NVIDIA's data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def training_flops(model: GPTConfig, *, frozen: bool = False) -> float:
    """FLOPs a token of the forward and the backward pass: 6 a parameter in products, and attention's
    12 depth width context (PaLM, arXiv 2204.02311, appendix B).

    Args:
      frozen: whether the batch goes forward through frozen parameters too, a third more.
    """
    products = parameter_count(model) - model.vocabulary * model.width  # the embedding is looked up
    passes = 4 / 3 if frozen else 1
    return passes * (6 * products + 12 * model.depth * model.width * model.context)


def peak_flops() -> float | None:
    """Of all devices of the run together, or None where it is not known."""
    kind = jax.devices()[0].device_kind
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in kind), None)
    return None if peak is None else peak * jax.device_count()


class Bar:
    """One run's progress; off a terminal only the lines of `say` are printed.

    Args:
      tokens: of a step. frozen: see `training_flops`.
    """

    def __init__(
        self,
        title: str,
        model: GPTConfig,
        *,
        steps: int,
        tokens: int,
        frozen: bool,
        console: Console,
    ):
        self._tokens, self._peak = tokens, peak_flops()
        self._flops = training_flops(model, frozen=frozen)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, total=steps, said="compiling")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *error) -> None:
        self._progress.stop()

    def show(self, step: int, loss: float, step_seconds: float) -> None:
        """How far it is, and how fast the last steps were."""
        speed = self._tokens / step_seconds
        said = f"loss {loss:.3f}  {speed:,.0f} tokens/s"
        if self._peak is not None:
            said += f"  MFU {100 * speed * self._flops / self._peak:.0f} %"
        self._progress.update(self._task, completed=step, said=said)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, highlight=False)
