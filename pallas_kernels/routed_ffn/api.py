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
from pallas_kernels.routed_ffn import composed, in_kernels, pallas_gpu, pallas_tpu, reference
from pallas_kernels.routed_ffn.operands import Operands

_OP = "routed_ffn"
_GATE_ON = ("output", "input")
_ROWS = {"xla": xla, "xla_tiles": xla_tiles}
_KERNELS = {"pallas_tpu": pallas_tpu, "pallas_gpu": pallas_gpu}
_FORWARD = {name: functools.partial(composed.forward, ffn.forward) for name, ffn in _ROWS.items()}
_FORWARD |= {name: functools.partial(in_kernels.forward, calls) for name, calls in _KERNELS.items()}
_BACKWARD = {name: functools.partial(composed.backward, ffn.backward) for name, ffn in _ROWS.items()}
_BACKWARD |= {name: functools.partial(in_kernels.backward, calls) for name, calls in _KERNELS.items()}


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
    offset = None if offset is None else offset.astype(jnp.int32)
    weights = (w_gate_EDF, w_up_EDF, w_down_EFD)
    operands = Operands(x_TD, *weights, group_sizes_L, offset, choice_R, slot_TK, gates_TK)
    implementation = _choose.check_implementation(_OP, implementation, shapes, _why_not(implementation, operands))
    weights = quantized.frozen(_OP, weights)
    operands = Operands(*_varying.same_varying(x_TD, *weights, *operands[4:]))
    if implementation == "reference":
        return reference.forward(operands, activation=activation, gate_on=gate_on)
    return _routed_ffn(_Static(activation, gate_on, implementation), operands)


def _check_plan(x_TD, choice_R, slot_TK, gates_TK, gate_on: str, shapes: str) -> None:
    _checks.check_rank(_OP, "choice", choice_R, "R")
    _checks.check_rank(_OP, "slot", slot_TK, "T K")
    _checks.check_equal(_OP, "dim 0 of slot (T of x)", slot_TK.shape[0], x_TD.shape[0], shapes)
    _checks.check_shape(_OP, "gates", gates_TK, slot_TK.shape, shapes)
    _checks.check_integer(_OP, "choice", choice_R, shapes)
    _checks.check_integer(_OP, "slot", slot_TK, shapes)
    if gate_on not in _GATE_ON:
        raise ValueError(f"{_OP}: unknown gate_on {gate_on!r}: known: {', '.join(_GATE_ON)}.")


def _why_not(asked: str | None, o: Operands) -> dict[str, str | None]:
    """Why each kernel can't take these operands; None if it can."""
    rows_like = jax.ShapeDtypeStruct((o.choice_R.shape[0], o.x_TD.shape[1]), o.x_TD.dtype)
    refused = rows.why_not(rows_like, (o.w_gate_EDF, o.w_up_EDF, o.w_down_EFD), o.sizes_L, asked)
    if not o.x_TD.shape[0]:
        refused["pallas_gpu"] = "there is nothing to compute"
    return {name: refused[name] for name in _KERNELS}


def _table(entries: Any, static: _Static, o: Operands, **how: Any) -> dict[str, Any]:
    """The implementations that take these operands, with their keyword arguments."""
    refused = _why_not(static.implementation, o)
    how |= dict(activation=static.activation, gate_on=static.gate_on)
    return {name: functools.partial(f, **how) for name, f in entries.items() if refused.get(name) is None}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _routed_ffn(static: _Static, o: Operands) -> Array:
    table = _table(_FORWARD, static, o, save=False)
    if static.implementation is None and xla_few.suits(o.choice_R.shape[0], o.w_up_EDF.shape[0]):
        few = functools.partial(composed.forward, xla_few.forward)
        table["xla_tiles"] = functools.partial(few, activation=static.activation, gate_on=static.gate_on)
    return _choose.run(static.implementation, table, o)[0]


def _forward(static, o):
    out_TD, gate_RF, up_RF = _choose.run(static.implementation, _table(_FORWARD, static, o, save=True), o)
    return out_TD, (o, gate_RF, up_RF)


def _backward(static, saved, dout_TD):
    table = _table(_BACKWARD, static, saved[0])
    d = _choose.run(static.implementation, table, *saved, dout_TD)
    dgates_TK = d.gates_TK.astype(saved[0].gates_TK.dtype)
    return (Operands(*d[:4], None, None, None, None, dgates_TK),)


_routed_ffn.defvjp(_forward, _backward)
