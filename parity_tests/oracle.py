"""The executable specification: every recipe in NumPy, float64, one matrix at a time.

Nothing here is fast and nothing is shared with the implementations but the recipes themselves. A
matrix is (outputs, inputs) everywhere; `step` is one optimizer step of one matrix, `step_weight`
applies it to every matrix that a layout finds in a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from normuon_core import (
    HeadLayout,
    MatrixLayout,
    NeuronNorm,
    NormSetting,
    Polar,
    Recipe,
    RowEquilibration,
)


@dataclass
class State:
    """What one matrix carries from step to step; all of it starts at zero, but the radius, which is the
    norm that the matrix starts with, or the recipe's."""

    step: int = 0
    momentum: np.ndarray | float = 0.0
    second_moment: np.ndarray | float = 0.0
    radius: Any = None


def momentum(rule, m, g, mu, nesterov, step):
    """Stage 1: (the new momentum, the direction u). `step` counts from 1."""
    if rule == "heavy_ball":
        m = mu * m + g
        return m, g + mu * m if nesterov else m
    m = mu * m + (1 - mu) * g
    if rule == "lerp":
        return m, mu * m + (1 - mu) * g if nesterov else m
    if rule == "bias_corrected":
        if not nesterov:
            return m, m / (1 - mu**step)
        return m, mu * m / (1 - mu ** (step + 1)) + (1 - mu) * g / (1 - mu**step)
    raise ValueError(rule)


def through_int8(m: np.ndarray) -> np.ndarray:
    """A momentum (outputs, inputs) that was kept in int8: blocks of 32 inputs with a bfloat16 scale."""
    result = np.empty_like(m)
    for first in range(0, m.shape[1], 32):
        block = m[:, first : first + 32]
        largest = np.float32(np.abs(block).max(axis=1, keepdims=True) / 127)
        mantissa, exponent = np.frexp(np.float64(largest))
        scale = np.maximum(np.ldexp(np.round(mantissa * 256) / 256, exponent), 2.0**-126)
        result[:, first : first + 32] = np.round(block / scale) * scale
    return result


def equilibrate_rows(u: np.ndarray, rule: RowEquilibration) -> np.ndarray:
    """Before stage 2: every row gets the root mean square of the rows' norms."""
    norms = np.linalg.norm(u, axis=1, keepdims=True)
    return u * (np.linalg.norm(u) / len(u) ** 0.5) / np.maximum(norms, rule.eps)


def polar_factor(u: np.ndarray, polar: Polar) -> np.ndarray:
    """Stage 2, by its definition: the polynomial applied to the singular values of the scaled u."""
    norm = polar.norm_scale * np.linalg.norm(u)
    x = u / (max(norm, polar.eps) if polar.eps_rule == "max" else norm + polar.eps)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    if polar.preconditioning == "aol":
        sums = np.abs(wide @ wide.T).sum(axis=1, keepdims=True)
        wide = wide / np.sqrt(np.where(sums > 0, sums, 1))
    for a, b, c in polar.coefficients:
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


def set_norm(v: np.ndarray, rule: NormSetting) -> np.ndarray:
    """After stage 2: the norm of an exact polar factor."""
    return v * min(v.shape) ** 0.5 / max(np.linalg.norm(v), rule.eps)


def normalize_neurons(v: np.ndarray, second_moment, rule: NeuronNorm, longer_is_output: bool):
    """Stage 3: (the new second moment, the normalized v)."""
    output = rule.axis == "output" or (rule.axis == "longer" and longer_is_output)
    q = np.mean(v**2, axis=1 if output else 0, keepdims=True)
    e = rule.beta2 * second_moment + (1 - rule.beta2) * q
    if rule.eps_rule == "max":
        y = v / np.sqrt(np.maximum(e, rule.eps))
    else:
        y = v / (np.sqrt(e) + rule.eps)
    norm = np.linalg.norm(y)
    if rule.rescale == "max":
        y = y * np.linalg.norm(v) / max(norm, rule.eps)
    elif rule.rescale == "add":
        y = y * np.linalg.norm(v) / (norm + rule.eps)
    return e, y


def shape_scale(rule: str, v: np.ndarray) -> float:
    """Stage 5."""
    r, c = v.shape
    if rule == "rms":
        return 0.2 * (r * c) ** 0.5 / max(np.linalg.norm(v), 1e-10)
    return {
        "original": max(1, r / c) ** 0.5,
        "match_rms_adamw": 0.2 * max(r, c) ** 0.5,
        "spectral": (r / c) ** 0.5,
        "max_dim": max(r, c) ** 0.5,
        "none": 1.0,
    }[rule]


def hyperball(p: np.ndarray, u: np.ndarray, rate, radius) -> np.ndarray:
    """In place of the step: R N(p - rate R N(u)); without an update, or at zero, p stays."""
    if not u.any() or not p.any():
        return p
    target = p - rate * radius * u / np.linalg.norm(u)
    return radius * target / np.linalg.norm(target)


def sphere(p, u, theta, radius, axis, *, path="geodesic", by_tangent=False):
    """A step of every slice along `axis`: `theta` is the angle, or with `by_tangent` its factor."""
    slices = np.moveaxis(p, axis, -1)
    result = slices.copy()
    for index in np.ndindex(slices.shape[:-1]):
        w, g = slices[index], np.moveaxis(u, axis, -1)[index]
        norm = np.linalg.norm(w)
        if norm == 0:
            continue
        w = w / norm
        t = g - w * (w @ g)
        length = np.linalg.norm(t)
        if length <= 1e-15 * np.linalg.norm(g):
            continue
        angle = theta * length if by_tangent else theta
        if path == "geodesic":
            new = w * np.cos(angle) - t / length * np.sin(angle)
        else:
            new = w - angle * t / length
            new = new / np.linalg.norm(new)
        result[index] = radius * new
    return np.moveaxis(result, -1, axis)


def step(
    recipe: Recipe,
    p,
    g,
    state: State,
    *,
    lr,
    weight_decay=0.0,
    mu=None,
    lr_mul: Any = 1.0,
    wd_mul: Any = 1.0,
    keep: Callable = lambda momentum: momentum,
):
    """One step of one (outputs, inputs) matrix: the new parameter; `state` changes in place.

    A tie of the two sides counts as output in the `longer` rule.

    Args:
      keep: what of the momentum is read back in the next step.
    """
    v = normalized(recipe, orthogonalized(recipe, g, state, mu=mu, keep=keep), state)
    return applied(
        recipe, p, v, state, lr=lr, weight_decay=weight_decay, lr_mul=lr_mul, wd_mul=wd_mul
    )


def orthogonalized(
    recipe: Recipe, g, state: State, *, mu=None, keep: Callable = lambda momentum: momentum
) -> np.ndarray:
    """Momentum and stage 2, with what stands before it; `state` changes in place."""
    mu = recipe.momentum.momentum if mu is None else mu
    state.step += 1
    state.momentum, u = momentum(
        recipe.momentum.rule, state.momentum, g, mu, recipe.momentum.nesterov, state.step
    )
    state.momentum = keep(state.momentum)
    if recipe.row_equilibration is not None:
        u = equilibrate_rows(u, recipe.row_equilibration)
    return polar_factor(u, recipe.polar)


def normalized(recipe: Recipe, v: np.ndarray, state: State) -> np.ndarray:
    """Stage 3, with what stands before it; `state` changes in place."""
    if recipe.norm_setting is not None:
        v = set_norm(v, recipe.norm_setting)
    if recipe.neuron_norm is not None:
        state.second_moment, v = normalize_neurons(
            v, state.second_moment, recipe.neuron_norm, v.shape[0] >= v.shape[1]
        )
    return v


def applied(
    recipe: Recipe,
    p,
    v: np.ndarray,
    state: State,
    *,
    lr,
    weight_decay=0.0,
    lr_mul: Any = 1.0,
    wd_mul: Any = 1.0,
):
    """Decay, shape scale and learning rate: the new parameter; `state` gets its radius."""
    mask = (v * p >= 0) if recipe.decay.cautious else np.ones(p.shape)
    decay = weight_decay * wd_mul * mask * p
    if recipe.decay.rate_power == 2:
        decay = lr * decay
    k = shape_scale(recipe.shape_scale, v)
    if recipe.hyperball is not None:
        if state.radius is None:
            state.radius = recipe.hyperball.radius or np.linalg.norm(p)
        u = k * (v + decay) if recipe.decay.inside_scale else k * v + decay
        return hyperball(p, u, lr * lr_mul, state.radius)
    scale = lr_mul * k
    if recipe.decay.inside_scale:
        return p - lr * scale * (v + decay)
    return p - lr * (scale * v + decay)


@dataclass
class AdamState:
    """What a weight that is no matrix carries from step to step; all of it starts at zero.

    `step` counts updates; `waiting` has the gradients since the last one."""

    step: int = 0
    first: np.ndarray | float = 0.0
    second: np.ndarray | float = 0.0
    waiting: list[np.ndarray] = field(default_factory=list)


def adamw(
    p,
    g,
    state: AdamState,
    *,
    lr,
    b1,
    b2,
    eps,
    weight_decay=0.0,
    nesterov=False,
    eps_root=0.0,
    cautious=False,
    every=1,
):
    """One step of AdamW, or of NAdam with plain decay: the new parameter; `state` changes in place."""
    state.waiting.append(g)
    if len(state.waiting) < every:
        return p
    g = sum(state.waiting) / every
    state.waiting.clear()
    state.step += 1
    t = state.step
    state.first = b1 * state.first + (1 - b1) * g
    state.second = b2 * state.second + (1 - b2) * g**2
    mean = state.first / (1 - b1**t)
    if nesterov:
        mean = b1 * state.first / (1 - b1 ** (t + 1)) + (1 - b1) * g / (1 - b1**t)
    direction = mean / (np.sqrt(state.second / (1 - b2**t) + eps_root) + eps)
    mask = (direction * p >= 0) if cautious else np.ones(p.shape)
    return p - lr * (direction + weight_decay * mask * p)


def qk_clip(p, largest_logits, tau, heads: HeadLayout):
    """After a step: one layer's weight of queries or keys, with `largest_logits` of its query heads."""
    axis = heads.axis % p.ndim
    merged = heads.heads is not None
    # Heads first, and their channels second.
    if merged:
        first = np.moveaxis(p, axis, 0)
        by_head = first.reshape(heads.heads, -1, *first.shape[1:]).copy()
    else:
        by_head = np.moveaxis(p, (axis, axis + 1), (0, 1)).copy()
    share = len(largest_logits) // len(by_head)
    for head in range(len(by_head)):
        shared_by = largest_logits[head * share : (head + 1) * share]
        gamma = min(min(1, tau / s) if s > 0 else 1 for s in shared_by)
        channel = 0
        for size, power in heads.channels or ((by_head.shape[1], 0.5),):
            by_head[head, channel : channel + size] *= gamma**power
            channel += size
    if merged:
        return np.moveaxis(by_head.reshape(first.shape), 0, axis)
    return np.moveaxis(by_head, (0, 1), (axis, axis + 1))


@dataclass
class WeightState:
    """The states of all matrices of one weight, by (batch index, first output neuron)."""

    matrices: dict = field(default_factory=dict)


def step_weight(
    recipe: Recipe,
    layout: MatrixLayout,
    p,
    g,
    state: WeightState,
    *,
    lr_mul: Any = 1.0,
    wd_mul: Any = 1.0,
    **rates,
):
    """`step` on every matrix of a weight; `lr_mul` and `wd_mul` are numbers or arrays over its batch."""
    as_matrices, as_weight = as_matrices_and_back(p.shape, layout)
    weights, gradients = as_matrices(p), as_matrices(g)
    batch_shape = weights.shape[:-2]
    lr_mul, wd_mul = np.broadcast_to(lr_mul, batch_shape), np.broadcast_to(wd_mul, batch_shape)
    result = np.empty_like(weights)
    for index in np.ndindex(batch_shape):
        first = 0
        splits = layout.output_splits or 1
        if isinstance(splits, int):
            splits = (weights.shape[-2] // splits,) * splits
        for size in splits:
            block = (*index, slice(first, first + size))
            matrix = state.matrices.setdefault((index, first), State())
            result[block] = step(
                recipe,
                weights[block],
                gradients[block],
                matrix,
                lr_mul=lr_mul[index],
                wd_mul=wd_mul[index],
                **rates,
            )
            first += size
    return as_weight(result)


def as_matrices_and_back(shape, layout: MatrixLayout):
    """Functions that bring a weight to (batch..., outputs, inputs) and back."""
    rank = len(shape)
    output, reduction = (
        [axis % rank for axis in np.atleast_1d(axes)]
        for axes in (layout.output_axis, layout.reduction_axis)
    )
    batch = [axis for axis in range(rank) if axis not in output + reduction]
    order = batch + output + reduction
    sizes = [[shape[axis] for axis in axes] for axes in (batch, output, reduction)]

    def as_matrices(x):
        return x.transpose(order).reshape(*sizes[0], np.prod(sizes[1]), np.prod(sizes[2]))

    def as_weight(x):
        return x.reshape(sizes[0] + sizes[1] + sizes[2]).transpose(np.argsort(order))

    return as_matrices, as_weight
