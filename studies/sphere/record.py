"""The published 11 x 768 preset, trained once as it was: what its losses are, and on what."""

import dataclasses
import tempfile
from pathlib import Path

from examples.configuration import read_config
from examples.gpt import parameter_count
from examples.launch import PHASES, launch
from examples.runs import read_run
from studies.machine import machine, versions
from studies.options import Options
from studies.tables import markdown

PRESET = Path(__file__).parents[2] / "examples" / "configs" / "ngpt_record.toml"


def run_record(options: Options, data: Path | None) -> None:
    """Trains it, and writes `sphere_record.md`; the small form has a small model and few steps.

    Args:
      data: FineWeb's shards; None is the source of Python's own standard library.
    """
    config = read_config(PRESET, PHASES["ngpt"])
    if options.small:
        small = dict(width=24, depth=2, heads=2, context=16, vocabulary=256)
        training = dict(steps=20, batch=4, evaluate_every=10, evaluation_batches=2)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **small),
            training=dataclasses.replace(config.training, **training),
        )
    with tempfile.TemporaryDirectory() as folder:
        told = dataclasses.replace(config, data=data, output=Path(folder) / "run")
        run = read_run(launch(told))
    losses = [[str(each.step), f"{each.validation_loss:.4f}"] for each in run.evaluations]
    source = "the source of Python's standard library, in bytes"
    parts = [
        "# The published preset\n",
        f"Written by `python -m studies sphere --record`. Machine: {machine()}; {versions()}.\n",
        f"{parameter_count(config.model):,} parameters, on {data or source};"
        f" {run.evaluations[-1].seconds:.0f} s of training.\n",
        markdown(["step", "held-out loss"], losses),
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    options.file("sphere_record", "md").write_text("\n".join(parts))
