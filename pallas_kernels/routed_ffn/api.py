"""Public entry of the routed feed-forward network: checks, choice of implementation, derivatives.

Dims: T tokens, K experts per token, R rows, D model, F expert hidden, E experts of the weights, L experts in the sizes
(L = E without an offset).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _choose, _varying, quantized
from pallas_kernels.expert_ffn import api as rows
from pallas_kernels.expert_ffn import xla, xla_few, xla_tiles
from pallas_kernels.quantized import Quantized
from pallas_kernels.routed_ffn import composed, pallas_gpu, pallas_tpu, reference

_OP = "routed_ffn"
_GATE_ON = ("output", "input")
_FORWARD = {
    "xla": functools.partial(composed.forward, xla.forward),
    "xla_tiles": functools.partial(composed.forward, xla_tiles.forward),
    "pallas_tpu": pallas_tpu.forward,
    "pallas_gpu": pallas_gpu.forward,
}
_BACKWARD = {
    "xla": functools.partial(composed.backward, xla.backward),
    "xla_tiles": functools.partial(composed.backward, xla_tiles.backward),
    "pallas_tpu": pallas_tpu.backward,
    "pallas_gpu": pallas_gpu.backward,
}


class _Static(NamedTuple):
    activation: str
    gate_on: str
    implementation: str | None


def routed_ffn(
    x_TD: Float[Array, "T D"],
    w_gate_EDF: Float[Array, "E D F"] | Quantized | None,
    w_up_EDF: Float[Array, "E D F"] | Quantized,
    w_down_EFD: Float[Array, "E F D"] | Quantized,
    group_sizes_L: Int[Array, " L"],
    choice_R: Int[Array, " R"],
    slot_TK: Int[Array, "T K"],
    gates_TK: Float[Array, "T K"],
    *,
    gate_on: str = "output",
    activation: str = "silu",
    group_offset: Int[Array, ""] | int | None = None,
    implementation: str | None = None,
) -> Float[Array, "T D"]:
    """out[t] = sum over k of gates[t, k] * ffn(x[t]) by the expert of row slot[t, k]; the ffn is that of `expert_ffn`.

    With gate_on="input": the sum of ffn(gates[t, k] * x[t]). Sums run in float32 at least. The same as gather_rows,
    expert_ffn and combine_rows one after the other, without the rows ever lying in memory where a kernel can avoid it.

    Args:
      x_TD: tokens.
      w_gate_EDF, w_up_EDF, w_down_EFD: weights, of x's dtype or `Quantized`; w_gate may be None. As in `expert_ffn`.
      group_sizes_L: rows of each expert, in order of experts. Rows beyond the last, or of experts that are not held,
        count as dropped.
      choice_R: t * K + k of each row; T * K means none.
      slot_TK: the inverse: row of choice (t, k); R means dropped: contributes zero, and its gate gets no gradient.
      gates_TK: weights; may be wider than x.
      gate_on: "output" or "input" (Llama-4).
      activation, group_offset, implementation: as in `expert_ffn`.

    Raises:
      ValueError, TypeError: shapes or dtypes that don't fit, an unknown activation, gate_on or implementation.
      NotImplementedError: a kernel that doesn't exist, or doesn't take these operands.

    Differentiable in x, the weights and the gates, in reverse mode only; x, gates and the pre-activations are all that
    is saved. Source: SonicMoE, https://arxiv.org/abs/2512.14080.
    """
    arrays = (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, group_offset, choice_R, slot_TK, gates_TK)
    x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset, choice_R, slot_TK, gates_TK = jax.tree.map(
        jnp.asarray, arrays
    )
    shapes = _checks.describe(
        x=x_TD, w_gate=w_gate_EDF, w_up=w_up_EDF, w_down=w_down_EFD, group_sizes=group_sizes_L, group_offset=offset,
        choice=choice_R, slot=slot_TK, gates=gates_TK,
    )  # fmt: skip
    rows.check(_OP, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, offset, shapes)
    rows.check_activation(_OP, activation)
    _check_plan(x_TD, choice_R, slot_TK, gates_TK, gate_on, shapes)
    refused = _why_not(implementation, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, group_sizes_L, choice_R)
    implementation = _choose.check_implementation(_OP, implementation, shapes, refused)
    offset = None if offset is None else offset.astype(jnp.int32)
    weights = quantized.frozen(_OP, (w_gate_EDF, w_up_EDF, w_down_EFD))
    operands = _varying.same_varying(x_TD, *weights, group_sizes_L, offset, choice_R, slot_TK, gates_TK)
    if implementation == "reference":
        return reference.forward(*operands, activation=activation, gate_on=gate_on)
    return _routed_ffn(_Static(activation, gate_on, implementation), *operands)


def _check_plan(x_TD, choice_R, slot_TK, gates_TK, gate_on: str, shapes: str) -> None:
    _checks.check_rank(_OP, "choice", choice_R, "R")
    _checks.check_rank(_OP, "slot", slot_TK, "T K")
    _checks.check_equal(_OP, "dim 0 of slot (T of x)", slot_TK.shape[0], x_TD.shape[0], shapes)
    _checks.check_shape(_OP, "gates", gates_TK, slot_TK.shape, shapes)
    _checks.check_integer(_OP, "choice", choice_R, shapes)
    _checks.check_integer(_OP, "slot", slot_TK, shapes)
    if gate_on not in _GATE_ON:
        raise ValueError(f"{_OP}: unknown gate_on {gate_on!r}: known: {', '.join(_GATE_ON)}.")


def _why_not(asked: str | None, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, choice_R) -> dict[str, str | None]:
    rows_like = jax.ShapeDtypeStruct((choice_R.shape[0], x_TD.shape[1]), x_TD.dtype)
    refused = rows.why_not(rows_like, (w_gate_EDF, w_up_EDF, w_down_EFD), sizes_L, asked)
    refused.pop("mosaic_gpu")
    if not x_TD.shape[0]:
        refused["pallas_gpu"] = "there is nothing to compute"
    return refused


def _table(entries: Any, static: _Static, operands: tuple[Any, ...], **how: Any) -> dict[str, Any]:
    """The implementations that take these operands, with their keyword arguments."""
    x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, _, choice_R, *_ = operands
    refused = _why_not(static.implementation, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, choice_R)
    how |= dict(activation=static.activation, gate_on=static.gate_on)
    return {name: functools.partial(f, **how) for name, f in entries.items() if refused.get(name) is None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed_ffn(static, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, choice_R, slot_TK, gates_TK):
    operands = (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, choice_R, slot_TK, gates_TK)
    table = _table(_FORWARD, static, operands, save=False)
    if static.implementation is None and xla_few.suits(choice_R.shape[0], w_up_EDF.shape[0]):
        few = functools.partial(composed.forward, xla_few.forward)
        table["xla_tiles"] = functools.partial(few, activation=static.activation, gate_on=static.gate_on)
    return _choose.run(static.implementation, table, *operands)[0]


def _forward(static, x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, choice_R, slot_TK, gates_TK):
    operands = (x_TD, w_gate_EDF, w_up_EDF, w_down_EFD, sizes_L, offset, choice_R, slot_TK, gates_TK)
    table = _table(_FORWARD, static, operands, save=True)
    out_TD, gate_RF, up_RF = _choose.run(static.implementation, table, *operands)
    return out_TD, (operands, gate_RF, up_RF)


def _backward(static, saved, dout_TD):
    operands, gate_RF, up_RF = saved
    table = _table(_BACKWARD, static, operands)
    *gradients, dgates_TK = _choose.run(static.implementation, table, *operands, gate_RF, up_RF, dout_TD)
    return (*gradients, None, None, None, None, dgates_TK.astype(operands[-1].dtype))


_routed_ffn.defvjp(_forward, _backward)
