"""NorMuon and the Muon family as one PyTorch optimizer, assembled from a Recipe."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch.optim.optimizer import ParamsT, StateDict

from normuon_core import (
    Coefficients,
    Decay,
    Hyperball,
    MatrixLayout,
    Momentum,
    NeuronNorm,
    Polar,
    Recipe,
    ShapeRule,
)
from normuon_core.cost import Algorithm
from torch_ref.checkpoint import picklable, unpickled
from torch_ref.group_checks import check_gradients, check_process_group, settle_group
from torch_ref.kernels.backend import Backend
from torch_ref.leaves.group_keys import (
    MATRIX,
    Group,
    read_group,
)
from torch_ref.leaves.groups import parameter_view
from torch_ref.saved_groups import loading_hooks
from torch_ref.stages.stack import Orthogonalizer
from torch_ref.steps.groups import step_groups
from torch_ref.steps.plan import Planner, plan_step
from torch_ref.steps.state import KeptState

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch.distributed import ProcessGroup

    from torch_ref.steps.data_parallel import DataParallel

Loss = TypeVar("Loss")

# A group's layout and recipe are part of a state dict: let torch.load read them with
# weights_only=True.
torch.serialization.add_safe_globals(
    [MatrixLayout, Recipe, Momentum, Polar, NeuronNorm, Decay, Hyperball]
)


class NorMuon(torch.optim.Optimizer):
    """Muon with a second moment for each neuron, in every published dialect; AdamW for the rest.

    Give it the matrices of a model in one group, and embeddings, output heads, norms and biases in
    a group with `optimizer="adamw"`:

        NorMuon([{"params": matrices}, {"params": others, "optimizer": "adamw", "lr": 3e-4}],
        lr=0.02)

    `param_groups(model, lr=0.02, adam_lr=3e-4)` makes such groups from the modules' types. Every keyword
    may be set by group; a key that nothing reads is refused. A group of AdamW has `betas`, `eps` and
    `weight_decay` as in `torch.optim.AdamW`, read at every step; `use_muon` is read as
    `optimizer`. `lr`, `momentum` and `weight_decay` of matrices are read from the group at every step.
    Gradients are left as they are; parameters without one are skipped.

    A step never waits for a GPU, and can be captured in a CUDA graph once its kernels have run; give
    `lr`, `momentum` and `weight_decay` as tensors on the GPU to change them between replays. Under
    `torch.compile` it stays outside of the graph: nothing of it is compiled, nothing differs, and
    `fullgraph=True` is refused with the reason.

    The increment leaves the arithmetic in the parameter's dtype and is then added, as Optax does
    it; to train bfloat16 parameters without losing small increments, set `bf16_remainder`.

    DTensor parameters, of `fully_shard` or of any mesh, are stepped as the whole ones would be, and
    their state lies as they do; every rank must call `step` with gradients for the same parameters. For
    plain data parallelism pass `process_group` and leave the gradients unsynchronised: each rank then
    keeps the momentum and second moment of its own matrices alone.

    In both cases the state is made of DTensors in the shape that it has on one process, and is saved by
    `torch.distributed.checkpoint` from `get_optimizer_state_dict(model, optimizer)`: any number of
    ranks, in either way of working, restores it with `set_optimizer_state_dict`. The ordinary
    `state_dict()` has only what this rank keeps; one that was made on a single process can be loaded
    on many.

    Args:
      params: parameters or groups, as for every `torch.optim.Optimizer`.
      lr: learning rate, for either kind of group.
      recipe: a name from `normuon_core.RECIPES`, or a `Recipe`.
      weight_decay: of the matrices, as the recipe's decay says.
      momentum, nesterov, beta2, shape_scale: in place of the recipe's own.
      coefficients, steps, eps: the same for the polar factor. `coefficients` is a name of
        `normuon_core.POLYNOMIALS` or one (a, b, c) a step; `steps` makes the set longer or shorter
        (`normuon_core.polynomials.with_steps`); `eps` follows the recipe's rule. (In a group of AdamW
        `eps` is AdamW's.)
      layout: which axes of the group's weights are the sides of their matrices. None is (out, in);
        weights of more axes may be a stack or a convolution, and need a layout.
      lr_mul, wd_mul: multiply rate and decay; a number, or an array over a weight's batch axes
        (numbers only in AdamW groups).
      optimizer: "normuon" or "adamw".
      orthogonalizer: takes the place of the polynomial iteration: a function of a stack
        (batch, rows, columns) in the working dtype to one of the same shape. Not saved in state
        dicts.
      adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW groups. adam_nesterov, adam_eps_root: as
        in `optax.adamw`, see `torch_ref.stages.adamw.adamw`.
      adam_moment_dtype: of AdamW's first moment, a floating dtype; None is float32, or the
        parameter's where that is wider.
      adam_cautious: AdamW's decay reaches only the entries that its update pulls towards zero as well,
        or does not move.
      adam_every: k: AdamW updates at the k-th, 2k-th, ... step, by the mean of the gradients since the
        last update; matrices are stepped at every one. None is 1.
      momentum_dtype: of the momentum buffer: a floating dtype, or torch.int8, in blocks of 32 along a
        matrix's inputs with a scale each (PyTorch's own operations step it, and a DTensor must not
        divide a block); None is float32, or the parameter's where that is wider.
      compute_dtype: of the orthogonalization; None is bfloat16, and float16 where the Gram form
        runs.
      algorithm: "standard", "gram", or "auto", see `polar_factor`.
      backend: "triton" for steps of the matrices by the kernels that JAX runs too, "eager" for
        PyTorch's own operations, or "auto": "triton" on CUDA devices that have it, for the dtypes it
        takes, unless there is an `orthogonalizer`.
      bf16_remainder: keeps the lower 16 bits of a float32 weight beside each bfloat16 parameter,
        which then is the weight's truncated upper half. Parameters of 32 or 64 bits have no
        remainder.
      max_stack_bytes: about how much temporary memory one stack may take; None is 1 GiB.
      process_group: the ranks of plain data parallelism, each with the same parameters and its own
        gradients; their mean is what all of them step by. Not settable by group.

    Raises:
      ValueError, TypeError: settings that do not fit, see `torch_ref.group_checks.settle_group`.

    Source: NorMuon, arXiv 2510.05491; each recipe names its own.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor,
        *,
        recipe: str | Recipe = "normuon",
        weight_decay: float = 0.0,
        momentum: float | None = None,
        nesterov: bool | None = None,
        beta2: float | None = None,
        shape_scale: ShapeRule | None = None,
        coefficients: str | Coefficients | None = None,
        steps: int | None = None,
        eps: float | None = None,
        layout: MatrixLayout | None = None,
        lr_mul: "npt.ArrayLike | torch.Tensor" = 1.0,
        wd_mul: "npt.ArrayLike | torch.Tensor" = 1.0,
        optimizer: Literal["normuon", "adamw"] = MATRIX,
        orthogonalizer: Orthogonalizer | None = None,
        adam_b1: float = 0.9,
        adam_b2: float = 0.95,
        adam_eps: float = 1e-10,
        adam_weight_decay: float = 0.0,
        adam_nesterov: bool = False,
        adam_eps_root: float = 0.0,
        adam_moment_dtype: torch.dtype | None = None,
        adam_cautious: bool = False,
        adam_every: int | None = None,
        momentum_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        bf16_remainder: bool = False,
        max_stack_bytes: int | None = None,
        process_group: "ProcessGroup | None" = None,
    ):
        self._parallel = None if process_group is None else _data_parallel(process_group)
        self._plans = _remembered_plans()
        defaults = {
            "lr": lr,
            "recipe": recipe,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "beta2": beta2,
            "shape_scale": shape_scale,
            "coefficients": coefficients,
            "steps": steps,
            "eps": eps,
            "layout": layout,
            "lr_mul": lr_mul,
            "wd_mul": wd_mul,
            "optimizer": optimizer,
            "orthogonalizer": orthogonalizer,
            "adam_b1": adam_b1,
            "adam_b2": adam_b2,
            "adam_eps": adam_eps,
            "adam_weight_decay": adam_weight_decay,
            "adam_nesterov": adam_nesterov,
            "adam_eps_root": adam_eps_root,
            "adam_moment_dtype": adam_moment_dtype,
            "adam_cautious": adam_cautious,
            "adam_every": adam_every,
            "momentum_dtype": momentum_dtype,
            "compute_dtype": compute_dtype,
            "algorithm": algorithm,
            "backend": backend,
            "bf16_remainder": bf16_remainder,
            "max_stack_bytes": max_stack_bytes,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group.

        Raises:
          ValueError, TypeError: as the constructor; the group is then not added.
        """
        index = len(self.param_groups)
        if isinstance(param_group, dict):
            param_group = read_group(param_group, self.defaults, index)
        given = frozenset(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            settle_group(group, index, given)
            if self._parallel is not None:
                check_process_group(group, index)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        if self._parallel is not None and group["optimizer"] == MATRIX:
            for param in group["params"]:
                self._parallel.assign(param, parameter_view(group, param))

    @torch.compiler.disable(
        reason="torch_ref.NorMuon steps outside compiled graphs: its products are library calls or"
        " kernels already"
    )
    @torch.no_grad()
    def step(self, closure: Callable[[], Loss] | None = None) -> Loss | None:
        """One step of every parameter that has a gradient.

        Args:
          closure: evaluates the model again and returns the loss.

        Returns:
          The closure's result, or None.

        Raises:
          RuntimeError: a sparse gradient, a DTensor without a gradient on its mesh, or a CUDA graph that
            is captured on another device; nothing is then changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        step_groups(self.param_groups, KeptState(self.state, self._parallel), self._plans)
        return loss

    def state_dict(self) -> StateDict:
        """As in every optimizer, without the orthogonalizers, which are code and not state: None."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            # Not left out: `torch.distributed.checkpoint` asks for every key of a group.
            group["orthogonalizer"] = None
        return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in every optimizer, but each state keeps the dtype in which it was saved.

        An older file's missing options are filled in, and its second moments of a split weight, one
        array a block, are joined. State dicts of `torch.optim.Muon`, of Keller Jordan's Muon (with or
        without its auxiliary Adam), of microsoft/dion's Muon and NorMuon, and of AdamW go into groups of
        the same kind and recipe ("torch_muon", "muon_keller", "dion_muon", "dion_normuon"), and the run
        goes on as it would have there. dion's files do not say which polynomial made them.

        Raises:
          ValueError: groups, options or state that do not fit; nothing is then changed.
        """
        read, restore = loading_hooks(self, partial(KeptState, parallel=self._parallel))
        # Last of the hooks before loading and first of those after: they see what ours saw.
        before = self.register_load_state_dict_pre_hook(read)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> StateDict:
        if self._parallel is not None:
            raise TypeError(
                "a NorMuon with a process_group cannot be copied or pickled; make another one, and save"
                " its state with torch.distributed.checkpoint."
            )
        own = super().__getstate__()
        return {**own, "state": picklable(own["state"])}

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__({**state, "state": unpickled(state["state"])})
        # Loading a state dict comes by here too.
        self.__dict__.setdefault("_parallel", None)
        self.__dict__.setdefault("_plans", _remembered_plans())


def _remembered_plans() -> Planner:
    """Makes a plan on the first step of a set of specs, and finds it again on every later one."""
    return lru_cache(maxsize=64)(plan_step)


def _data_parallel(group: "ProcessGroup") -> "DataParallel":
    from torch_ref.steps.data_parallel import DataParallel

    return DataParallel(group)
