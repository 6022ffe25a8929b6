"""The GPU's clocks and power, by nvidia-smi: at a power cap the clocks fall, and times grow."""

import contextlib
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping, Sequence

import torch

STATIC = {
    "driver": "driver_version",
    "power cap, W": "power.limit",
    "largest SM clock, MHz": "clocks.max.sm",
    "largest memory clock, MHz": "clocks.max.mem",
}
MOVING = {
    "SM clock, MHz": "clocks.sm",
    "memory clock, MHz": "clocks.mem",
    "power, W": "power.draw",
    "temperature, C": "temperature.gpu",
}
"""What is noted of a GPU, by nvidia-smi's names for it."""

INTERVAL = 200
"""Milliseconds between two samples."""


def state() -> dict[str, str]:
    """Driver, limits and the clocks of this moment; empty without nvidia-smi."""
    command = _command([*STATIC.values(), *MOVING.values()])
    if command is None:
        return {}
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = found.stdout.strip().split(", ")
    names = [*STATIC, *(f"{name}, before" for name in MOVING)]
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


@contextlib.contextmanager
def sampled() -> Iterator[list[str]]:
    """A list that has nvidia-smi's lines when the block is left, one for every `INTERVAL`."""
    lines: list[str] = []
    command = _command(MOVING.values())
    if command is None:
        yield lines
        return
    sampler = subprocess.Popen(
        [*command, f"--loop-ms={INTERVAL}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield lines
    finally:
        sampler.terminate()
        lines += sampler.communicate()[0].splitlines()


def summary(lines: Sequence[str]) -> Mapping[str, Sequence[float]]:
    """(least, median, largest) of every figure; what the GPU does not tell is left out.

    The last line may have been cut when the sampler was stopped, and is not counted.
    """
    samples = [line.split(", ") for line in lines[:-1]]
    result = {}
    for i, name in enumerate(MOVING):
        values = [float(each[i]) for each in samples if len(each) > i and _is_number(each[i])]
        if values:
            result[name] = [min(values), statistics.median(values), max(values)]
    return result


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def _command(queries) -> list[str] | None:
    if shutil.which("nvidia-smi") is None or not torch.cuda.is_available():
        return None
    identity = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    which = "0" if identity is None else f"GPU-{identity}"
    query = f"--query-gpu={','.join(queries)}"
    return ["nvidia-smi", f"--id={which}", query, "--format=csv,noheader,nounits"]
