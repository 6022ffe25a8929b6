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


def independent_loops_may_meet() -> bool:
    """Whether a program must not have two loops that send messages: on CPUs, over many processes.

    XLA's CPU runtime starts what follows a loop while the loop still runs, unless it needs the loop's
    result. Two such loops, as of DPO's trained and frozen model, then send in an order that each process
    finds for itself; but Gloo knows messages by their order alone. A mere `optimization_barrier` does
    not part them: XLA drops it before it plans the run (JAX 0.10.2).
    """
    return jax.process_count() > 1 and jax.default_backend() == "cpu"
