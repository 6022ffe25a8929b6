"""Stage 3: NorMuon's second moment, one number a neuron."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from normuon_core.neurons import NeuronAxis, neurons_on_rows
from normuon_core.recipes import EpsRule, NeuronNorm
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, where_it_lies
from optax_normuon.mesh.specs import SpecTree


class NeuronNormState(NamedTuple):
    """The state of `normalize_neurons`.

    Attributes:
      second_moment: a tree like the parameters, or the array of a stack: float32 (float64 for float64),
        with size 1 on the reduced axes; see `on_matrices`.
    """

    second_moment: Any


@refuse_injection_of_static_arguments
def normalize_neurons(
    beta2: float | jax.Array = 0.95,
    *,
    axis: NeuronAxis = "output",
    eps: float = 1e-10,
    eps_rule: EpsRule = "max",
    rescale: EpsRule | None = "max",
    layout: LayoutTree = None,
    max_stack_bytes: int | None = None,
    param_specs: SpecTree = None,
) -> optax.GradientTransformation:
    """Divides every neuron's update by its root mean square over time; keeps each matrix's norm.

    To be used after `orthogonalize`. Source: NorMuon, arXiv 2510.05491, Algorithm 1.
    With q the mean of v^2 over a neuron's inputs: s <- s + (1 - beta2)(q - s) from s = 0 without bias
    correction, v <- v / sqrt(max(s, eps)), then |v|_F is brought back to what it was.

    Args:
      beta2: decay of the second moment, a number, an array without axes or a tracer.
      axis: whose neurons: "output" (the paper), "input", or "longer" (modded-nanogpt): the index of
        the matrix's longer side, output on a tie.
      eps: a floor of s (`eps_rule="max"`), or added to sqrt(s) (`"add"`).
      rescale: divides by max(norm, eps) ("max") or norm + eps ("add") in bringing the norm back; None
        leaves the norm.
      layout, max_stack_bytes, param_specs: see `normuon`.

    Raises:
      ValueError: an unknown `axis` or rule, a number out of its range, or see `normuon`.
      TypeError: `beta2` is a schedule.
    """
    stage = neuron_norm_stage(beta2, axis=axis, eps=eps, eps_rule=eps_rule, rescale=rescale)
    return on_matrices(
        stage, layout=layout, max_stack_bytes=max_stack_bytes, param_specs=param_specs
    )


def neuron_norm_stage(
    beta2: float | jax.Array,
    *,
    axis: NeuronAxis,
    eps: float,
    eps_rule: EpsRule,
    rescale: EpsRule | None,
) -> MatrixStage[NeuronNormState]:
    """Stage 3 on a `MatrixStack`; arithmetic in float32 (float64 for float64), rounded once to the
    dtype of the values."""
    if callable(beta2):
        raise TypeError(
            "beta2 is a function, and stage 3 counts no steps; for a schedule of beta2 write"
            " optax.inject_hyperparams(normuon, static_args=STATIC_ARGS)(..., beta2=schedule)."
        )
    NeuronNorm(beta2, axis, eps, eps_rule, rescale)  # pyright: ignore[reportArgumentType]

    def reduced_axis(stack: MatrixStack) -> int:
        rows, columns = stack.sides
        return -1 if neurons_on_rows(axis, rows, columns, stack.output_axis == -2) else -2

    def init(stack: MatrixStack) -> NeuronNormState:
        shape = list(stack.values.shape)
        shape[reduced_axis(stack)] = 1
        return NeuronNormState(jnp.zeros(shape, working_dtype(stack.values.dtype)))

    def update(stack: MatrixStack, state: NeuronNormState) -> tuple[MatrixStack, NeuronNormState]:
        reduced = reduced_axis(stack)
        neurons = -3 - reduced
        count = stack.sides[reduced]
        v = stack.values.astype(working_dtype(stack.values.dtype))
        s = state.second_moment
        q = (stack.sum_over(jnp.square(v), (reduced,)) / count).astype(s.dtype)
        s = s + (1 - jnp.asarray(beta2, s.dtype)) * (q - s)
        t = jax.lax.rsqrt(jnp.maximum(s, eps)) if eps_rule == "max" else 1 / (jnp.sqrt(s) + eps)
        if rescale is not None:
            # |v|^2 and |v t|^2 follow from the neurons' statistics: no further pass over the matrix.
            squares = count * stack.sum_over(jnp.stack([q, q * t * t]), (neurons,))
            norm, scaled = jnp.sqrt(squares)
            t = t * (norm / (jnp.maximum(scaled, eps) if rescale == "max" else scaled + eps))
        normalized = (v.astype(s.dtype) * t).astype(stack.values.dtype)
        return stack.with_values(normalized), NeuronNormState(s)

    return MatrixStage(init, update, place=where_it_lies, takes_shards=True)
