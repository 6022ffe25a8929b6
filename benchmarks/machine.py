"""The machine and its rates, measured in the run that they are used in."""

import importlib.metadata
import platform

import torch

from benchmarks.arithmetic import Rates
from benchmarks.timing import median_milliseconds

PACKAGES = (
    *("jax", "jaxlib", "optax", "torch", "triton"),
    *("dion", "gram-newton-schulz", "quack-kernels", "nvidia-cutlass-dsl", "heavyball"),
)


def versions() -> dict[str, str]:
    """Of Python, the packages and the device."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return {**found, "device": device()}


def device() -> str:
    """The GPU's name, by which results are kept; the processor's where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def measure_rates(*, side: int = 8192, copied: int = 2**31) -> Rates | None:
    """By a bfloat16 product of random matrices and a copy within the GPU's memory; None without one."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(side, side, device="cuda").bfloat16() for _ in range(2))
    milliseconds = median_milliseconds(lambda: a @ b, repetitions=7)
    products = 2 * side**3 / milliseconds * 1e3
    source = torch.empty(copied, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = median_milliseconds(lambda: target.copy_(source), repetitions=7)
    return Rates(products=products, copies=2 * copied / milliseconds * 1e3)
