"""Where a trial ran, as its row says it."""

import functools
import importlib.metadata
import os
import platform

import jax


@functools.cache
def machine() -> str:
    """The accelerator's name, or the processor's kind and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


@functools.cache
def versions() -> str:
    """Of Python and the packages that decide the figures."""
    packages = ("jax", "flax", "optax")
    found = [f"{package} {importlib.metadata.version(package)}" for package in packages]
    return ", ".join([f"Python {platform.python_version()}", *found])
