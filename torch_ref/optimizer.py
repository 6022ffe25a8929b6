"""NorMuon and the Muon family as one PyTorch optimizer, assembled from a Recipe."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.optim.optimizer import ParamsT

from normuon_core import (
    Coefficients,
    Decay,
    MatrixLayout,
    MatrixView,
    Momentum,
    NeuronNorm,
    Polar,
    Recipe,
    ShapeRule,
)
from normuon_core.polar_iteration import Algorithm
from torch_ref.adamw import adamw
from torch_ref.checkpoint import picklable, restore_state, unpickled
from torch_ref.dtypes import rounded_product, working_dtype
from torch_ref.group_keys import (
    ADAMW,
    MATRIX,
    Group,
    adamw_keywords,
    read_group,
    settle_adamw,
)
from torch_ref.groups import (
    group_recipe,
    parameter_name,
    parameter_view,
    settle_group,
)
from torch_ref.launcher import Backend
from torch_ref.local import is_dtensor, local, local_state
from torch_ref.matrix_state import create_matrix_state, with_moments_joined
from torch_ref.matrix_weight import MatrixWeight, step_matrices
from torch_ref.part import Part, cut, whole_region
from torch_ref.remainder import add_to_weight, read_weight
from torch_ref.saved_groups import read_state_dict
from torch_ref.stack_stages import Orthogonalizer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from torch_ref.data_parallel import DataParallel
    from torch_ref.placement import Sharding

_Given = tuple[Group, list[tuple[torch.Tensor, torch.Tensor]]]
"""A group, and its parameters that have a gradient, with it."""

# A group's layout and recipe are part of a state dict: let torch.load read them with
# weights_only=True.
torch.serialization.add_safe_globals([MatrixLayout, Recipe, Momentum, Polar, NeuronNorm, Decay])


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
        in `optax.adamw`, see `torch_ref.adamw.adamw`.
      adam_moment_dtype: of AdamW's first moment, a floating dtype; None is float32, or the
        parameter's where that is wider.
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
      process_group: the ranks of plain data parallelism, each with the same parameters and its own
        gradients; their mean is what all of them step by. Not settable by group.

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
        coefficients: str | Coefficients | None = None,
        steps: int | None = None,
        eps: float | None = None,
        layout: MatrixLayout | None = None,
        lr_mul: Any = 1.0,
        wd_mul: Any = 1.0,
        optimizer: Literal["normuon", "adamw"] = MATRIX,
        orthogonalizer: Orthogonalizer | None = None,
        adam_b1: float = 0.9,
        adam_b2: float = 0.95,
        adam_eps: float = 1e-10,
        adam_weight_decay: float = 0.0,
        adam_nesterov: bool = False,
        adam_eps_root: float = 0.0,
        adam_moment_dtype: torch.dtype | None = None,
        momentum_dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype | None = None,
        algorithm: Algorithm = "auto",
        backend: Backend = "auto",
        bf16_remainder: bool = False,
        max_stack_bytes: int | None = None,
        process_group: "ProcessGroup | None" = None,
    ):
        self._parallel = None if process_group is None else _data_parallel(process_group)
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
            self._check_process_group(group, index)
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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient.

        Args:
          closure: evaluates the model again and returns the loss.

        Returns:
          The closure's result, or None.

        Raises:
          RuntimeError: a sparse gradient, or a DTensor without a gradient on its mesh; nothing is then
            changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        self._count_steps()
        adamw_groups, matrix_groups = [], []
        for group in self.param_groups:
            chosen = adamw_groups if group["optimizer"] == ADAMW else matrix_groups
            chosen.append((group, _with_gradient(group)))
        self._step_adamw_groups(adamw_groups)
        if self._parallel is None:
            self._step_matrix_groups(matrix_groups)
        else:
            self._step_replicated(matrix_groups, self._parallel)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As in every optimizer, without the orthogonalizers, which are code and not state: None."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            # Not left out: `torch.distributed.checkpoint` asks for every key of a group.
            group["orthogonalizer"] = None
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in every optimizer, but each state keeps the dtype in which it was saved.

        An older file's missing options are filled in, and its second moments of a split weight, one
        array a block, are joined. State dicts of `torch.optim.Muon`, of Keller Jordan's Muon (with or
        without its auxiliary Adam) and of AdamW go into groups of the same kind and recipe
        ("torch_muon", "muon_keller"), and the run goes on as it would have there.

        Raises:
          ValueError: groups, options or state that do not fit; nothing is then changed.
        """
        orthogonalizers = [group["orthogonalizer"] for group in self.param_groups]
        groups = {param: group for group in self.param_groups for param in group["params"]}
        loaded: dict[str, Any] = {}

        def shard(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
            sharding = self._placed(param, groups[param], tuple(whole.shape))
            return whole if sharding is None else sharding.shard_of(whole)

        def read(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            loaded.update(read_state_dict(optimizer.param_groups, saved, optimizer.defaults))
            return loaded

        def join(param: torch.Tensor, state: Mapping[str, Any]) -> Mapping[str, Any]:
            group = groups[param]
            rule = None if group["optimizer"] != MATRIX else group_recipe(group).neuron_norm
            if rule is None:
                return state
            return with_moments_joined(state, parameter_view(group, param), rule)

        def restore(optimizer: torch.optim.Optimizer) -> None:
            restore_state(optimizer, loaded, shard, join)
            for group, own in zip(optimizer.param_groups, orthogonalizers, strict=True):
                group["orthogonalizer"] = own

        # Last of the hooks before loading and first of those after: they see what ours saw.
        before = self.register_load_state_dict_pre_hook(read)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        if self._parallel is not None:
            raise TypeError(
                "a NorMuon with a process_group cannot be copied or pickled; make another one, and save"
                " its state with torch.distributed.checkpoint."
            )
        own = super().__getstate__()
        return {**own, "state": picklable(own["state"])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "state": unpickled(state["state"])})
        # Loading a state dict comes by here too.
        self.__dict__.setdefault("_parallel", None)

    def _check_process_group(self, group: Group, index: int) -> None:
        if self._parallel is None:
            return
        for position, param in enumerate(group["params"]):
            if is_dtensor(param):
                raise ValueError(
                    f"{parameter_name(group, index, position)}: a DTensor with placements"
                    f" {tuple(param.placements)} on {param.device_mesh} is divided already, and its"
                    " gradient is summed by whoever made it; leave process_group out."
                )

    def _check_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param.grad is not None and param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{parameter_name(group, index, position)}: NorMuon does not support a"
                        f" gradient of layout {param.grad.layout}; make it dense (sparse=False in"
                        " torch.nn.Embedding), or give the parameter to torch.optim.SparseAdam."
                    )
                if param.grad is not None and is_dtensor(param):
                    from torch_ref.placement import check_gradient

                    check_gradient(param, param.grad, parameter_name(group, index, position))

    def _count_steps(self) -> None:
        """One more for every parameter that has a gradient, on the parameter's own device."""
        counters: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
        for group in self.param_groups:
            for param, _ in _with_gradient(group):
                zero = torch.zeros((), dtype=torch.int64, device=param.device)
                step = self.state[param].setdefault("step", zero)
                counters[step.device].append(step)
        for steps in counters.values():
            torch._foreach_add_(steps, 1)  # pyright: ignore[reportPrivateImportUsage]

    def _sharding(self, param: torch.Tensor) -> "Sharding | None":
        """How a parameter's state lies over ranks; None where one process has all of it."""
        if self._parallel is not None and param in self._parallel.owned:
            return self._parallel.owned[param].sharding
        if not is_dtensor(param):
            return None
        from torch_ref.placement import sharding_of

        return sharding_of(param)

    def _step_matrix_groups(self, groups: list[_Given]) -> None:
        """Matrices that are whole on this process, or DTensors."""
        whole: list[MatrixWeight] = []
        sharded: list[tuple[MatrixWeight, Sharding]] = []
        for group, given in groups:
            recipe = group_recipe(group)
            for param, gradient in given:
                view, sharding = parameter_view(group, param), self._sharding(param)
                self._create_matrix_state(param, view, group, recipe)
                if sharding is None:
                    part = Part(view, whole_region(view.stored_shape))
                    whole.append(self._matrix_weight(param, gradient, part, group, recipe))
                    continue
                from torch_ref.placement import local_gradient

                shard, gradient = local(param), local_gradient(param, gradient)
                weight = self._matrix_weight(
                    param, gradient, sharding.part(view), group, recipe, shard=shard
                )
                sharded.append((weight, sharding))
        _step_whole(whole)
        if sharded:
            from torch_ref.sharded_step import step_sharded_matrices

            step_sharded_matrices(sharded)

    def _step_replicated(self, groups: list[_Given], parallel: "DataParallel") -> None:
        """Matrices of plain data parallelism: while one stack is stepped, the next one's gradients are
        on their way, and so are the parameters of the one before. No other stack has buffers then."""
        gradients: dict[torch.Tensor, torch.Tensor] = {}
        settings: dict[torch.Tensor, tuple[Group, Recipe]] = {}
        for group, given in groups:
            recipe = group_recipe(group)
            for param, gradient in given:
                gradients[param], settings[param] = gradient, (group, recipe)
                self._create_matrix_state(param, parameter_view(group, param), group, recipe)
        stacks = parallel.stacks(gradients, lambda param: settings[param][0]["max_stack_bytes"])
        neighbours = zip([None, *stacks[:-1]], stacks, [*stacks[1:], None], strict=True)
        for before, stack, following in neighbours:
            if before is None:
                stack.reduce()
            if following is not None:
                following.reduce()
            _step_whole(
                [
                    self._matrix_weight(
                        param, gradient, part, *settings[param], shard=cut(param, part.region)
                    )
                    for param, part, gradient in stack.own_gradients()
                ]
            )
            if before is not None:
                before.finish()
            stack.gather()
        if stacks:
            stacks[-1].finish()

    def _create_matrix_state(
        self, param: torch.Tensor, view: MatrixView, group: Group, recipe: Recipe
    ) -> None:
        state, zeros = self.state[param], partial(self._zeros, param, group)
        create_matrix_state(state, view, group, param.dtype, recipe.neuron_norm, zeros=zeros)
        if _has_remainder(param, group) and "remainder" not in state:
            state["remainder"] = zeros(view.stored_shape, torch.uint16)

    def _placed(
        self, param: torch.Tensor, group: Group, shape: tuple[int, ...]
    ) -> "Sharding | None":
        """How an array of a parameter's state lies; None where one process has all of it."""
        sharding = self._sharding(param)
        if sharding is None or shape == tuple(param.shape):
            return sharding
        return sharding.of_moment(parameter_view(group, param), shape)

    def _zeros(
        self, param: torch.Tensor, group: Group, shape: tuple[int, ...], dtype: torch.dtype
    ) -> torch.Tensor:
        placed = self._placed(param, group, shape)
        if placed is not None:
            return placed.zeros(shape, dtype, param.device)
        if shape == tuple(param.shape):
            return torch.zeros_like(param, dtype=dtype)
        return param.new_zeros(shape, dtype=dtype)

    def _matrix_weight(
        self,
        param: torch.Tensor,
        gradient: torch.Tensor,
        part: Part,
        group: Group,
        recipe: Recipe,
        *,
        shard: torch.Tensor | None = None,
    ) -> MatrixWeight:
        state = local_state(self.state[param])
        return MatrixWeight(
            param if shard is None else shard,
            gradient,
            state["remainder"] if _has_remainder(param, group) else None,
            state,
            part=part,
            group=group,
            recipe=recipe,
            step=state["step"],
        )

    def _step_adamw_groups(self, groups: list[_Given]) -> None:
        for group, _ in groups:
            settle_adamw(group)
        given = [(param, gradient, group) for group, pairs in groups for param, gradient in pairs]
        gradients = [gradient for _, gradient, _ in given]
        if self._parallel is not None:
            gradients = self._parallel.mean(gradients)
        for (param, _, group), gradient in zip(given, gradients, strict=True):
            self._step_adamw(param, gradient, group)

    def _step_adamw(self, param: torch.Tensor, gradient: torch.Tensor, group: Group) -> None:
        group = adamw_keywords(group)
        state, sharding = self.state[param], self._sharding(param)
        dtype = working_dtype(param.dtype)
        kept = {"exp_avg": group["adam_moment_dtype"] or dtype, "exp_avg_sq": dtype}
        if _has_remainder(param, group):
            kept["remainder"] = torch.uint16
        for key, own in kept.items():
            if key not in state:
                state[key] = self._zeros(param, group, tuple(param.shape), own)
        if sharding is not None:
            from torch_ref.placement import local_gradient

            param, gradient = local(param), local_gradient(param, gradient)
            state = local_state(state)
        remainder = state["remainder"] if "remainder" in kept else None
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
            nesterov=group["adam_nesterov"],
            eps_root=group["adam_eps_root"],
            step=state["step"],
        )
        state["exp_avg"].copy_(exp_avg)
        state["exp_avg_sq"].copy_(exp_avg_sq)
        add_to_weight(param, remainder, increment)


def _data_parallel(group: "ProcessGroup") -> "DataParallel":
    from torch_ref.data_parallel import DataParallel

    return DataParallel(group)


def _step_whole(weights: list[MatrixWeight]) -> None:
    """A step of matrices that this process has whole, by kernels or by PyTorch's own operations."""
    by_backend: dict[bool, list[MatrixWeight]] = defaultdict(list)
    for weight in weights:
        by_backend[weight.takes_kernels].append(weight)
    for by_kernels, members in by_backend.items():
        if by_kernels:
            from torch_ref.kernel_step import step_matrices_with_kernels

            step_matrices_with_kernels(members)
        else:
            step_matrices(members)


def _with_gradient(group: Group) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(p, p.grad) for p in group["params"] if p.grad is not None and p.numel() > 0]


def _has_remainder(param: torch.Tensor, group: Group) -> bool:
    return group["bf16_remainder"] and param.dtype == torch.bfloat16
