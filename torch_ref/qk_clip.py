"""QK-clip, the twin of `optax_normuon.qk_clip`: queries and keys scaled after the optimizer's step."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from normuon_core.attention_heads import HeadLayout, Heads, check_tau, module_of, parent_of
from torch_ref.leaves.dtensor import is_dtensor, local
from torch_ref.leaves.dtypes import Scalar, rounded, working_dtype
from torch_ref.stages.remainder import join_remainder, write_weight

NamedParameters = Iterable[tuple[str, torch.Tensor]]


@torch.no_grad()
def qk_clip(
    model: nn.Module | NamedParameters,
    largest_logits: Mapping[str, torch.Tensor] | torch.Tensor,
    *,
    tau: Scalar,
    weights: Mapping[str, HeadLayout],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Scales queries and keys of the heads whose largest logit was above tau, in place.

    To be called behind `optimizer.step()`, with the largest logits of that step's forward passes:

        optimizer.step()
        qk_clip(model, {"blocks.0.attention": s}, tau=100.0, weights={
            "*.query.weight": HeadLayout(heads=8, axis=0), "*.key.weight": HeadLayout(heads=2, axis=0)})

    With S the largest logit of a head and gamma = min(1, tau / S), w <- gamma^power w; which power and
    which gamma is told in `optax_normuon.qk_clip`. Weights whose gamma is 1 keep their bits. DTensors
    are scaled where they lie; every rank needs the same logits, the largest over all ranks.

    Args:
      model: a module, or (name, parameter) pairs.
      largest_logits: one number a query head, (query heads,), by the name of the attention module; of
        stacked layers (layers, query heads). A tensor alone is for a model with one attention module.
      tau: the largest logit that is allowed; Kimi K2 took 100.
      weights: from patterns of parameters' names (`fnmatch` style) to where their heads lie. The first
        pattern that fits counts.
      optimizer: the one that stepped, where it keeps `bf16_remainder`: the whole float32 weight is then
        scaled. Bfloat16 parameters without a remainder round a gamma near 1 away.

    Raises:
      ValueError: a tau that is not above 0, a pattern that meets no parameter, a layout or logits that
        do not fit, or missing logits; nothing is then changed.

    Source: Kimi K2, arXiv 2507.20534, section 2.1.
    """
    check_tau(tau)
    named = list(model.named_parameters() if isinstance(model, nn.Module) else model)
    for pattern in weights:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            names = ", ".join(name for name, _ in named)
            raise ValueError(
                f"qk_clip: the pattern {pattern!r} meets no parameter; they are {names}."
            )
    logits = {"": largest_logits} if isinstance(largest_logits, torch.Tensor) else largest_logits
    found = []
    for name, param in named:
        layout = next((w for pattern, w in weights.items() if fnmatchcase(name, pattern)), None)
        if layout is not None:
            heads = layout.on(param.shape, name)
            found.append((param, heads, _logits_of(heads, logits)))
    for param, heads, own in found:
        state = {} if optimizer is None else optimizer.state.get(param, {})
        factor = _factors(_gamma(own.to(param.device), tau, working_dtype(param.dtype)), heads)
        _scale(param, state.get("remainder"), factor)


def _logits_of(heads: Heads, logits: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The largest logits of the module that a weight lies in."""
    module = module_of(heads.name, logits, ".")
    if module is None:
        above = parent_of(heads.name, ".")
        given = f"those of {', '.join(logits)}" if logits else "none"
        raise ValueError(
            f"{heads.name}: qk_clip needs the largest logits of its heads, and got {given}; give"
            f" largest_logits={{{above!r}: a tensor of one number a query head}}, with an entry for"
            " every attention module."
        )
    own = logits[module]
    own = own.full_tensor() if is_dtensor(own) else own
    heads.check_logits(own.shape)
    return own


def _gamma(logits: torch.Tensor, tau: Scalar, dtype: torch.dtype) -> torch.Tensor:
    """min(1, tau / S); NaN where S is not finite and no factor would be right."""
    s, tau = logits.to(dtype), rounded(tau, dtype)
    above = (tau / s).masked_fill(s.isinf(), torch.nan)
    return torch.where(s <= tau, 1.0, above)


def _factors(gamma: torch.Tensor, heads: Heads) -> torch.Tensor:
    """gamma ([layers,] query heads) to what the weight is multiplied by, of its rank."""
    layers = gamma.shape[:-1]
    own = gamma.reshape(*layers, heads.count, -1)
    # A NaN is the smallest, as in NumPy and JAX.
    own = own.amin(dim=-1, keepdim=True)
    powers = torch.as_tensor(heads.powers, dtype=gamma.dtype, device=gamma.device)
    # Every section that is left alone is exactly 1, whatever gamma is.
    by_channel = torch.where(powers == 0, 1.0, own**powers)
    if heads.merged:
        by_channel = by_channel.reshape(*layers, -1)
    order, shape = heads.broadcast(stacked=bool(layers))
    return by_channel.permute(order).reshape(shape)


def _scale(param: torch.Tensor, remainder: torch.Tensor | None, factor: torch.Tensor) -> None:
    own = local(param)
    if is_dtensor(param):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = param.device_mesh
        whole = DTensor.from_local(
            factor.expand(param.shape), mesh, [Replicate()] * mesh.ndim, run_check=False
        )
        factor = whole.redistribute(mesh, param.placements).to_local()
    if remainder is None:
        own.copy_(torch.where(factor == 1, own, own.to(factor.dtype) * factor))
        return
    low = local(remainder)
    write_weight(own, low, join_remainder(own, low) * factor)
