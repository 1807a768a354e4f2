"""Public entry of the expert feed-forward network: checks, choice of implementation, derivatives.

Dims: R rows, D model, F expert hidden, E experts of the weights, L experts in the sizes (L = E without an offset).
"""

import difflib
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _choose, _varying
from pallas_kernels.expert_ffn import reference, xla, xla_tiles
from pallas_kernels.expert_ffn.activations import ACTIVATIONS

_OP = "expert_ffn"
_FORWARD = {"xla": xla.forward, "xla_tiles": xla_tiles.forward}
_BACKWARD = {"xla": xla.backward, "xla_tiles": xla_tiles.backward}


def expert_ffn(
    x_RD: Float[Array, "R D"],
    w_gate_EDF: Float[Array, "E D F"] | None,
    w_up_EDF: Float[Array, "E D F"],
    w_down_EFD: Float[Array, "E F D"],
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
      w_gate_EDF, w_up_EDF, w_down_EFD: weights, of x's dtype.
      group_sizes_L: integers, non-negative, with a sum of at most R; one per expert.
      activation: "silu", "gelu" (exact), "gelu_tanh", "quick_gelu", "relu" or "relu2" (squared ReLU).
      group_offset: int scalar, may be traced. The weights then hold only experts [group_offset, group_offset + E) of
        the L experts in group_sizes; rows of other experts give 0. Must lie in [0, L - E].
      implementation: "reference", "xla" (`jax.lax.ragged_dot`), "xla_tiles" (one fused loop over row tiles, for CPUs),
        or None to choose by platform: "xla_tiles" on CPU, "xla" elsewhere.

    Raises:
      ValueError, TypeError: shapes or dtypes that don't fit, an unknown activation or implementation.
      NotImplementedError: a kernel that doesn't exist yet.

    Differentiable in x and the weights, in reverse mode only; x and the pre-activations are all that is saved.
    Sources: SwiGLU, https://arxiv.org/abs/2002.05202; what to save, SonicMoE, https://arxiv.org/abs/2512.14080.
    """
    arrays = (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, group_offset)
    x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset = jax.tree.map(jnp.asarray, arrays)
    shapes = _checks.describe(
        x=x_RD, w_gate=w_gate_EDF, w_up=w_up_EDF, w_down=w_down_EFD, group_sizes=group_sizes_L, group_offset=offset
    )
    _check(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset, shapes)
    _check_activation(activation)
    implementation = _choose.check_implementation(_OP, implementation, shapes)
    offset = None if offset is None else offset.astype(jnp.int32)
    operands = _varying.same_varying(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset)
    if implementation == "reference":
        return reference.forward(*operands, activation=activation)
    return _expert_ffn(activation, implementation, *operands)


def _check(x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, shapes: str) -> None:
    _checks.check_rank(_OP, "x", x_RD, "R D")
    _checks.check_rank(_OP, "w_up", w_up_EDF, "E D F")
    E, D, F = w_up_EDF.shape
    _checks.check_equal(_OP, "dim 1 of w_up (D of x)", D, x_RD.shape[1], shapes)
    _checks.check_shape(_OP, "w_down", w_down_EFD, (E, F, D), shapes)
    if w_gate_EDF is not None:
        _checks.check_shape(_OP, "w_gate", w_gate_EDF, (E, D, F), shapes)
    _checks.check_same_float_dtype(_OP, shapes, x=x_RD, w_gate=w_gate_EDF, w_up=w_up_EDF, w_down=w_down_EFD)
    _checks.check_groups(_OP, sizes_L, E, offset, shapes)


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        near = difflib.get_close_matches(str(activation), list(ACTIVATIONS), n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{_OP}: unknown activation {activation!r}: did you mean {near!r}? known: {', '.join(ACTIVATIONS)}."
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _expert_ffn(activation, implementation, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset):
    table = {k: functools.partial(f, activation=activation, save=False) for k, f in _FORWARD.items()}
    return _choose.run(implementation, table, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset)[0]


def _forward(activation, implementation, x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset):
    table = {k: functools.partial(f, activation=activation, save=True) for k, f in _FORWARD.items()}
    operands = (x_RD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset)
    y_RD, gate_RF, up_RF = _choose.run(implementation, table, *operands)
    return y_RD, (operands, gate_RF, up_RF)


def _backward(activation, implementation, saved, dy_RD):
    operands, gate_RF, up_RF = saved
    table = {k: functools.partial(f, activation=activation) for k, f in _BACKWARD.items()}
    gradients = _choose.run(implementation, table, *operands, gate_RF, up_RF, dy_RD)
    return (*gradients, None, None)


_expert_ffn.defvjp(_forward, _backward)
