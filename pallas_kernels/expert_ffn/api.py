"""Public entry of the expert feed-forward network: checks, choice of implementation, derivatives.

Dims: R rows, D model, F expert hidden, E experts of the weights, L experts in the sizes (L = E without an offset).
"""

import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _choose, _varying, quantized
from pallas_kernels.expert_ffn import in_kernels, mosaic_gpu, pallas_gpu, pallas_tpu, reference, xla, xla_tiles
from pallas_kernels.expert_ffn.activations import ACTIVATIONS
from pallas_kernels.expert_ffn.operands import Operands
from pallas_kernels.quantized import Quantized

_OP = "expert_ffn"
_KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu, "mosaic_gpu": mosaic_gpu}
_FORWARD = {"xla": xla.forward, "xla_tiles": xla_tiles.forward}
_FORWARD |= {name: functools.partial(in_kernels.forward, calls) for name, calls in _KERNELS.items()}
_BACKWARD = {"xla": xla.backward, "xla_tiles": xla_tiles.backward}
_BACKWARD |= {name: functools.partial(in_kernels.backward, calls) for name, calls in _KERNELS.items()}


def expert_ffn(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "E D F"] | Quantized | None,
    w_up_EDF: Float[Array, "E D F"] | Quantized,
    w_down_EFD: Float[Array, "E F D"] | Quantized,
    group_sizes_L: Int[Array, " L"],
    *,
    activation: str = "silu",
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "R D"]:
    """Each expert's feed-forward network on its own rows, for rows sorted by expert.

    With w_gate: (act(x @ w_gate) * (x @ w_up)) @ w_down (SwiGLU with "silu"). Without: act(x @ w_up) @ w_down.
    Expert e owns the group_sizes[e] rows after those of the experts before it. Rows beyond sum(group_sizes) give
    exactly 0, in value and in gradient, whatever they hold. Sums and activations run in float32 at least.

    Args:
      x_RD: rows.
      w_gate_EDF, w_up_EDF, w_down_EFD: weights, of x's dtype, or `Quantized` (gate and up alike): frozen then.
      group_sizes_L: integers, non-negative, with a sum of at most R; one per expert.
      activation: "silu", "gelu" (exact), "gelu_tanh", "quick_gelu", "relu" or "relu2" (squared ReLU).
      group_offset: int scalar, may be traced. The weights then hold only experts [group_offset, group_offset + E) of
        the L experts in group_sizes; rows of other experts give 0. Must lie in [0, L - E].
      implementation: "reference", "xla" (`jax.lax.ragged_dot`), "xla_tiles" (one fused loop over row tiles, for CPUs),
        "pallas_tpu" and "pallas_gpu" (float32 and bfloat16; on CPU interpreted, for tests), or None to choose by
        platform: "xla_tiles" on CPU, "pallas_tpu" on TPU if it takes the dtype, "pallas_gpu" where this is traced for
        an NVIDIA GPU, "xla" elsewhere. "mosaic_gpu", by name only: bfloat16 on GPUs of compute capability 9.0.

    Raises:
      ValueError, TypeError: shapes or dtypes that don't fit, an unknown activation or implementation, or the
        gradient of quantized weights.
      NotImplementedError: a kernel that doesn't exist yet.

    Differentiable in x and the weights, in reverse mode only; x and the pre-activations are all that is saved.
    Sources: SwiGLU, https://arxiv.org/abs/2002.05202; what to save, SonicMoE, https://arxiv.org/abs/2512.14080.
    """
    arrays = (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, group_offset)
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset = jax.tree.map(jnp.asarray, arrays)
    shapes = _checks.describe(
        x=x_RD, w_gate=w_gate_EDF, w_up=w_up_EDF, w_down=w_down_EFD, group_sizes=group_sizes_L, group_offset=offset
    )
    check(_OP, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset, shapes)
    check_activation(_OP, activation)
    refused = why_not(x_RD, (w_gate_EDF, w_up_EDF, w_down_EFD), group_sizes_L, implementation)
    implementation = _choose.check_implementation(_OP, implementation, shapes, refused)
    offset = None if offset is None else offset.astype(jnp.int32)
    weights = quantized.frozen(_OP, (w_gate_EDF, w_up_EDF, w_down_EFD))
    operands = Operands(*_varying.same_varying(x_RD, *weights, group_sizes_L, offset))
    if implementation == "reference":
        return reference.forward(operands, activation=activation)
    return _expert_ffn(activation, implementation, operands)


def check(op: str, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, shapes: str) -> None:
    """Raises if x (of rows or tokens), weights and groups don't fit."""
    _checks.check_rank(op, "x", x_RD, "R D" if op == _OP else "T D")
    _checks.check_rank(op, "w_up", w_up_EDF, "E D F")
    E, D, F = w_up_EDF.shape
    _checks.check_equal(op, "dim 1 of w_up (D of x)", D, x_RD.shape[1], shapes)
    _checks.check_shape(op, "w_down", w_down_EFD, (E, F, D), shapes)
    if w_gate_EDF is not None:
        _checks.check_shape(op, "w_gate", w_gate_EDF, (E, D, F), shapes)
    _checks.check_same_float_dtype(op, shapes, x=x_RD, w_gate=w_gate_EDF, w_up=w_up_EDF, w_down=w_down_EFD)
    if w_gate_EDF is not None and w_gate_EDF.dtype != w_up_EDF.dtype:
        raise TypeError(f"{op}: w_gate and w_up must have one dtype. Given: {shapes}")
    _checks.check_groups(op, sizes_L, E, offset, shapes)


def check_activation(op: str, activation: str) -> None:
    """Raises for an unknown activation."""
    if activation not in ACTIVATIONS:
        near = difflib.get_close_matches(str(activation), list(ACTIVATIONS), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{op}: unknown activation {activation!r}: did you mean {near!r}? known: {', '.join(ACTIVATIONS)}."
        )


def why_not(x: Any, weights: tuple[Any, ...], sizes_L: Array, asked: str | None) -> dict[str, str | None]:
    """Why each kernel can't take these rows or tokens and weights (gate or None, up, down); None if it can."""
    given = [w for w in weights if w is not None]
    return {
        "pallas_tpu": pallas_tpu.why_not(x, weights[1], asked),
        "pallas_gpu": pallas_gpu.why_not(x, *given, num_groups=sizes_L.shape[0], asked=asked),
        "mosaic_gpu": mosaic_gpu.why_not(x, *weights),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_ffn(activation: str, implementation: str | None, o: Operands) -> Array:
    table = _table(_FORWARD, implementation, o, activation=activation, save=False)
    return _choose.run(implementation, table, o)[0]


def _table(
    entries: Mapping[str, Callable[..., Any]], implementation: str | None, o: Operands, **how: Any
) -> dict[str, Callable[..., Any]]:
    """The implementations that take these operands, with their keyword arguments."""
    refused = why_not(o.x_RD, (o.w_gate_EDF, o.w_up_EDF, o.w_down_EFD), o.sizes_L, implementation)
    return {name: functools.partial(f, **how) for name, f in entries.items() if refused.get(name) is None}


def _forward(activation, implementation, o):
    table = _table(_FORWARD, implementation, o, activation=activation, save=True)
    y_RD, gate_RF, up_RF = _choose.run(implementation, table, o)
    return y_RD, (o, gate_RF, up_RF)


def _backward(activation, implementation, saved, dy_RD):
    table = _table(_BACKWARD, implementation, saved[0], activation=activation)
    gradients = _choose.run(implementation, table, *saved, dy_RD)
    return (Operands(*gradients[:4], None, None),)


_expert_ffn.defvjp(_forward, _backward)
