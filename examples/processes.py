"""One run by many processes: on a CPU they talk over Gloo, on GPUs over NCCL."""

import jax

from examples.errors import BadInput


def join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Makes this process one of several, before JAX is asked for a device; else it stays alone.

    On GPUs a process takes every GPU that it sees, or those of JAX_LOCAL_DEVICE_IDS.

    Args:
      coordinator: host:port, at which process 0 listens.
      processes: how many there are.
      process: which of them this one is, from 0.

    Raises:
      BadInput: some of the three are missing, or there is no such process.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        return
    if coordinator is None or processes is None or process is None:
        raise BadInput(
            f"{' and '.join(missing)} missing: a run of many processes takes all of {', '.join(given)}."
        )
    if not 0 <= process < processes:
        raise BadInput(f"--process {process} is none of 0 to {processes - 1}.")
    if jax.distributed.is_initialized():  # One phase after another in one process.
        return
    jax.distributed.initialize(coordinator, processes, process)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0
