"""NorMuon and the Muon family as one PyTorch optimizer, assembled from a Recipe."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from normuon_core import Decay, MatrixLayout, Momentum, NeuronNorm, Polar, Recipe, ShapeRule
from normuon_core.polar_iteration import Algorithm
from torch_ref.adamw import adamw
from torch_ref.checkpoint import picklable, restore_state, unpickled
from torch_ref.dtypes import rounded_product, working_dtype
from torch_ref.groups import ADAMW, MATRIX, Group, group_recipe, parameter_name, settle_group
from torch_ref.launcher import Backend
from torch_ref.matrix_weight import MatrixWeight, step_matrices
from torch_ref.remainder import add_to_weight, read_weight
from torch_ref.stack_stages import Orthogonalizer

# A group's layout and recipe are part of a state dict: let torch.load read them with
# weights_only=True.
torch.serialization.add_safe_globals([MatrixLayout, Recipe, Momentum, Polar, NeuronNorm, Decay])


class NorMuon(torch.optim.Optimizer):
    """Muon with a second moment for each neuron, in every published dialect; AdamW for the rest.

    Give it the matrices of a model in one group, and embeddings, output heads, norms and biases in
    a group with `optimizer="adamw"`:

        NorMuon([{"params": matrices}, {"params": others, "optimizer": "adamw", "lr": 3e-4}],
        lr=0.02)

    Every keyword may be set by group. `lr`, `momentum` and `weight_decay` are read from the group
    at every step. Gradients are left as they are; parameters without one are skipped.

    A step never waits for a GPU, and can be captured in a CUDA graph once it has run; give `lr`,
    `momentum` and `weight_decay` as tensors on the GPU to change them between replays.

    The increment leaves the arithmetic in the parameter's dtype and is then added, as Optax does
    it; to train bfloat16 parameters without losing small increments, set `bf16_remainder`.

    Args:
      params: parameters or groups, as for every `torch.optim.Optimizer`.
      lr: learning rate, for either kind of group.
      recipe: a name from `normuon_core.RECIPES`, or a `Recipe`.
      weight_decay: of the matrices, as the recipe's decay says.
      momentum, nesterov, beta2, shape_scale: in place of the recipe's own.
      layout: which axes of the group's weights are the sides of their matrices. None is (out, in)
        with at most one leading batch axis; more axes may be a convolution's and need a layout.
      lr_mul, wd_mul: multiply rate and decay; a number, or an array over a weight's batch axes
        (numbers only in AdamW groups).
      optimizer: "normuon" or "adamw".
      orthogonalizer: takes the place of the polynomial iteration: a function of a stack
        (batch, rows, columns) in the working dtype to one of the same shape. Not saved in state
        dicts.
      adam_b1, adam_b2, adam_eps, adam_weight_decay: of AdamW groups.
      momentum_dtype: of the momentum buffer; None is float32, or the parameter's where that is
        wider.
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

    Raises:
      ValueError, TypeError: settings that do not fit, see `torch_ref.groups.settle_group`.

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
        layout: MatrixLayout | None = None,
        lr_mul: Any = 1.0,
        wd_mul: Any = 1.0,
        optimizer: Literal["normuon", "adamw"] = MATRIX,
        orthogonalizer: Orthogonalizer | None = None,
        adam_b1: float = 0.9,
        adam_b2: float = 0.95,
        adam_eps: float = 1e-10,
        adam_weight_decay: float = 0.0,
        momentum_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        bf16_remainder: bool = False,
        max_stack_bytes: int | None = None,
    ):
        defaults = {
            "lr": lr,
            "recipe": recipe,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "beta2": beta2,
            "shape_scale": shape_scale,
            "layout": layout,
            "lr_mul": lr_mul,
            "wd_mul": wd_mul,
            "optimizer": optimizer,
            "orthogonalizer": orthogonalizer,
            "adam_b1": adam_b1,
            "adam_b2": adam_b2,
            "adam_eps": adam_eps,
            "adam_weight_decay": adam_weight_decay,
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
        super().add_param_group(param_group)
        try:
            settle_group(self.param_groups[-1], len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
          closure: evaluates the model again and returns the loss.

        Returns:
          The closure's result, or None.

        Raises:
          RuntimeError: a sparse gradient; nothing is then changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        matrices: list[MatrixWeight] = []
        self._count_steps()
        for group in self.param_groups:
            given = _with_gradient(group)
            if group["optimizer"] == ADAMW:
                for param, gradient in given:
                    self._step_adamw(param, gradient, group)
            else:
                recipe = group_recipe(group)
                matrices += [self._matrix_weight(*pair, group, recipe) for pair in given]
        for by_kernels, weights in _by_backend(matrices).items():
            if by_kernels:
                from torch_ref.kernel_step import step_matrices_with_kernels

                step_matrices_with_kernels(weights)
            else:
                step_matrices(weights)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As in every optimizer, without the orthogonalizers, which are code and not state."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            group.pop("orthogonalizer", None)
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in every optimizer, but each state keeps the dtype in which it was saved."""
        orthogonalizers = [group["orthogonalizer"] for group in self.param_groups]
        loaded: dict[str, Any] = {}

        def restore(optimizer: torch.optim.Optimizer) -> None:
            restore_state(optimizer, loaded)
            for group, own in zip(optimizer.param_groups, orthogonalizers, strict=True):
                group["orthogonalizer"] = own

        # Last of the hooks before loading and first of those after: they see what ours saw.
        before = self.register_load_state_dict_pre_hook(lambda _, saved: loaded.update(saved))
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = super().__getstate__()
        return {**own, "state": picklable(own["state"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": unpickled(state["state"])})

    def _check_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{parameter_name(group, index, position)}: NorMuon does not support a"
                        f" gradient of layout {param.grad.layout}; make it dense (sparse=False in"
                        " torch.nn.Embedding), or give the parameter to torch.optim.SparseAdam."
                    )

    def _count_steps(self) -> None:
        """One more for every parameter that has a gradient, on the parameter's own device."""
        counters: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        for group in self.param_groups:
            for param, _ in _with_gradient(group):
                zero = torch.zeros((), dtype=torch.int64, device=param.device)
                step = self.state[param].setdefault("step", zero)
                counters[param.device].append(step)
        for steps in counters.values():
            torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]

    def _matrix_weight(
        self, param: torch.Tensor, gradient: torch.Tensor, group: Group, recipe: Recipe
    ) -> MatrixWeight:
        state = self.state[param]
        return MatrixWeight(
            param,
            gradient,
            _remainder(param, group, state),
            state,
            group=group,
            recipe=recipe,
            step=state["step"],
        )

    def _step_adamw(self, param: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        state = self.state[param]
        remainder = _remainder(param, group, state)
        dtype = working_dtype(param.dtype)
        for key in ("exp_avg", "exp_avg_sq"):
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=dtype)
        increment, exp_avg, exp_avg_sq = adamw(
            gradient.to(dtype),
            read_weight(param, remainder),
            state["exp_avg"],
            state["exp_avg_sq"],
            lr=rounded_product(group["lr"], group["lr_mul"], dtype),
            b1=group["adam_b1"],
            b2=group["adam_b2"],
            eps=group["adam_eps"],
            weight_decay=rounded_product(group["adam_weight_decay"], group["wd_mul"], dtype),
            step=state["step"],
        )
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)
        add_to_weight(param, remainder, increment)


def _with_gradient(group: Group) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p, p.grad) for p in group["params"] if p.grad is not None and p.numel() > 0]


def _by_backend(weights: list[MatrixWeight]) -> dict[bool, list[MatrixWeight]]:
    """The weights that the kernels step, and those that PyTorch's own operations do."""
    result: dict[bool, list[MatrixWeight]] = defaultdict(list)
    for weight in weights:
        result[weight.takes_kernels].append(weight)
    return result


def _remainder(param: torch.Tensor, group: Group, state: dict[str, Any]) -> torch.Tensor | None:
    if not group["bf16_remainder"] or param.dtype != torch.bfloat16:
        return None
    if "remainder" not in state:
        state["remainder"] = torch.zeros_like(param, dtype=torch.uint16)
    return state["remainder"]
