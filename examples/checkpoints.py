"""Orbax checkpoints of a run, written while it goes on.

A checkpoint is written under another name and renamed when it is complete: whenever the process is
killed, the last complete one is whole, and it is the one that is read.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from examples.step import State


class Checkpoints:
    """The checkpoints of one run, by step.

    Args:
      keep: how many stay. None only reads: what the run itself is still writing is left alone.
    """

    def __init__(self, folder: Path, *, keep: int | None = 1):
        if keep is None:
            self._manager = _reader(folder.absolute())
            return
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the last complete one."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Those of all complete ones."""
        return sorted(self._manager.all_steps())

    def save(self, state: State, step: int) -> None:
        """Begins to write; waits for the one before, if that is still being written."""
        # A copy, because the next step takes the arrays' memory for its own result.
        state = jax.tree.map(lambda leaf: leaf.copy(), state)
        rest = {"step": state.step, "opt_state": state.opt_state}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params), rest=ocp.args.StandardSave(rest)
        )
        self._manager.save(step, args=items)

    def restore(self, abstract: State) -> State:
        """The last complete one, on the devices that `abstract` names."""
        rest = {"step": abstract.step, "opt_state": abstract.opt_state}
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params), rest=ocp.args.StandardRestore(rest)
        )
        found = self._manager.restore(self.latest(), args=items)
        rest = found["rest"]
        return State(rest["step"], found["params"], rest["opt_state"])

    def restore_params(self, abstract_params: Any, step: int) -> Any:
        """A step's parameters alone."""
        items = ocp.args.Composite(params=ocp.args.StandardRestore(abstract_params))
        return self._manager.restore(step, args=items)["params"]

    def close(self) -> None:
        """Waits until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()


def _reader(folder: Path) -> ocp.CheckpointManager:
    """One that only reads. Orbax warns three times of that, which is meant here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        return ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True))
    finally:
        logging.set_verbosity(verbosity)
