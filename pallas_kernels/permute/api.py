"""Gathers between tokens and routed rows, with gathers as derivatives.

Dims: T tokens, K experts per token, R routed rows, D model. Each of the T*K choices (t, k) has at most one row and each
row at most one choice, so both directions have an inverse, and the derivative of a gather is the gather by the inverse:
no scatter-add, which is slow on every platform. Values that nobody refers to (NaN too) reach nothing: they are
selected away, never multiplied by zero.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _varying
from pallas_kernels.permute import xla


def gather_rows(
    x_TD: Float[Array, "T D"], token_R: Int[Array, " R"], slot_TK: Int[Array, "T K"]
) -> Float[Array, "R D"]:
    """x[token], and zeros where there is no token.

    Args:
      x_TD: tokens.
      token_R: token of each row; T means no token.
      slot_TK: the inverse: row of choice (t, k); R means dropped. Used by the derivative:
        dx[t] = sum over k of drows[slot[t, k]].

    Raises ValueError or TypeError for shapes and dtypes that don't fit. Reverse mode only.
    """
    op = "gather_rows"
    x_TD, token_R, slot_TK = jnp.asarray(x_TD), jnp.asarray(token_R), jnp.asarray(slot_TK)
    shapes = _checks.describe(x=x_TD, token=token_R, slot=slot_TK)
    _checks.check_rank(op, "x", x_TD, "T D")
    _checks.check_rank(op, "token", token_R, "R")
    _checks.check_rank(op, "slot", slot_TK, "T K")
    _checks.check_equal(op, "dim 0 of slot (T of x)", slot_TK.shape[0], x_TD.shape[0], shapes)
    _checks.check_integer(op, "token", token_R, shapes)
    _checks.check_integer(op, "slot", slot_TK, shapes)
    return _gather_rows(*_varying.same_varying(x_TD, token_R, slot_TK))


def combine_rows(
    y_RD: Float[Array, "R D"],
    slot_TK: Int[Array, "T K"],
    gates_TK: Float[Array, "T K"],
    choice_R: Int[Array, " R"],
) -> Float[Array, "T D"]:
    """out[t] = sum over k of gates[t, k] * y[slot[t, k]], summed in float32 at least, in y's dtype.

    Args:
      y_RD: rows.
      slot_TK: row of choice (t, k); R means dropped: contributes zero, and its gate gets no gradient.
      gates_TK: weights; may be wider than y.
      choice_R: the inverse: t * K + k of each row; T * K means none. (A sort of the T * K choices gives it, and
        choice // K is `token_R` of gather_rows.) Used by the derivative: dy[r] = gates[choice[r]] * dout[token[r]].

    Raises ValueError or TypeError for shapes and dtypes that don't fit. Reverse mode only.
    """
    op = "combine_rows"
    y_RD, slot_TK, gates_TK, choice_R = (jnp.asarray(a) for a in (y_RD, slot_TK, gates_TK, choice_R))
    shapes = _checks.describe(y=y_RD, slot=slot_TK, gates=gates_TK, choice=choice_R)
    _checks.check_rank(op, "y", y_RD, "R D")
    _checks.check_rank(op, "slot", slot_TK, "T K")
    _checks.check_shape(op, "gates", gates_TK, slot_TK.shape, shapes)
    _checks.check_shape(op, "choice", choice_R, y_RD.shape[:1], shapes)
    _checks.check_integer(op, "slot", slot_TK, shapes)
    _checks.check_integer(op, "choice", choice_R, shapes)
    return _combine_rows(*_varying.same_varying(y_RD, slot_TK, gates_TK, choice_R))


@jax.custom_vjp
def _gather_rows(x_TD, token_R, slot_TK):
    return xla.take(x_TD, token_R)


def _gather_forward(x_TD, token_R, slot_TK):
    return _gather_rows(x_TD, token_R, slot_TK), slot_TK


def _gather_backward(slot_TK, drows_RD):
    return xla.sum_choices(drows_RD, slot_TK, None), None, None


_gather_rows.defvjp(_gather_forward, _gather_backward)


@jax.custom_vjp
def _combine_rows(y_RD, slot_TK, gates_TK, choice_R):
    return xla.sum_choices(y_RD, slot_TK, gates_TK)


def _combine_forward(y_RD, slot_TK, gates_TK, choice_R):
    return _combine_rows(y_RD, slot_TK, gates_TK, choice_R), (y_RD, slot_TK, gates_TK, choice_R)


def _combine_backward(saved, dout_TD):
    y_RD, slot_TK, gates_TK, choice_R = saved
    T, K = slot_TK.shape
    dtype = _checks.accumulator(y_RD.dtype)
    gate_R = xla.take(gates_TK.reshape(T * K), choice_R).astype(dtype)
    dy_RD = gate_R[:, None] * xla.take(dout_TD, choice_R // max(K, 1)).astype(dtype)
    dot = lambda k: jnp.sum(xla.take(y_RD, slot_TK[:, k]).astype(dtype) * dout_TD.astype(dtype), axis=1)
    dgates_TK = jnp.stack([dot(k) for k in range(K)], axis=1) if K else jnp.zeros_like(gates_TK)
    return dy_RD.astype(y_RD.dtype), None, dgates_TK.astype(gates_TK.dtype), None


_combine_rows.defvjp(_combine_forward, _combine_backward)
