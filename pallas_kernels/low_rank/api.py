"""Public entry of the low-rank product: checks, choice of form and implementation, derivative.

Dims: T tokens, D in, N out, E experts, R ranks of one, K experts named by a token, X gates of a token: E or K.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import _checks, _choose, _tpu_target, _varying
from pallas_kernels.low_rank import pallas_gpu_grouped, pallas_tpu, pallas_tpu_grouped, reference, xla

_OP = "low_rank_matmul"
_FORMS = ("dense", "grouped")
_AVAILABLE = ("reference", "xla")


def low_rank_matmul(
    x_TD: Float[Array, "T D"],
    a_ERD: Float[Array, "E R D"],
    b_ERN: Float[Array, "E R N"],
    gates_TX: Float[Array, "T E"] | Float[Array, "T K"],
    ids_TK: Int[Array, "T K"] | None = None,
    *,
    onto_TN: Float[Array, "T N"] | None = None,
    form: Literal["dense", "grouped"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "T N"]:
    """onto[t] + sum over e of gates[t, e] * (x[t] @ a[e].T) @ b[e]; sums run in float32 at least.

    Ranks are not padded: all experts' lie side by side, E R of them, or those of a token's own experts are used.

    Args:
      x_TD: tokens.
      a_ERD, b_ERN: each expert's two factors, of x's dtype.
      gates_TX: without `ids_TK` one for each expert, (T, E); may be wider than x.
      ids_TK: experts of each token, integers; E or more mean none. `gates_TX` is then (T, K). An expert that is named
        twice counts twice.
      onto_TN: what the product is added to, of x's dtype; zeros if None.
      form: "dense" computes all E R ranks of every token, "grouped" (with ids) sorts the T K choices by expert and
        computes theirs alone. None: "grouped" where `ids_TK` is given and that was measured to be cheaper
        (`xla.grouped_pays`).
      implementation: "reference", "xla", "pallas_tpu" (dense: one kernel forward, one backward, what lies between the
        two products never in HBM; grouped: the same on rows that XLA gathers), "pallas_gpu" (grouped alone, in the same
        way; by name only), both interpreted when lowered for a CPU, or None: "pallas_tpu" where it is known while
        tracing that this is for a TPU and no partitioning is left to XLA (one device, or inside a shard_map over all
        mesh axes) and the kernel takes the operands; else "xla".

    Raises:
      ValueError, TypeError: shapes or dtypes that don't fit, an unknown form or implementation, "grouped" without ids.
      NotImplementedError: a named kernel that cannot take these operands.

    Differentiable in x, a, b, the gates and `onto`, in reverse mode only. Source: the concatenated form of LoRA
    (https://arxiv.org/abs/2106.09685), and Punica's grouped one (https://arxiv.org/abs/2310.18547).
    """
    arrays = (x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN)
    x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN = jax.tree.map(jnp.asarray, arrays)
    shapes = _checks.describe(x=x_TD, a=a_ERD, b=b_ERN, gates=gates_TX, ids=ids_TK, onto=onto_TN)
    _check(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN, form, shapes)
    if form is None:
        pays = ids_TK is not None and xla.grouped_pays(*a_ERD.shape[:2], ids_TK.shape[1])
        form = "grouped" if pays else "dense"
    if form == "dense":
        refused = {"pallas_tpu": pallas_tpu.refusal(x_TD, b_ERN, gates_TX, ids_TK)}
        refused["pallas_gpu"] = "the kernel is of the grouped form; the dense one is two matrix products, XLA's"
    else:
        refused = {"pallas_tpu": pallas_tpu_grouped.refusal(x_TD, b_ERN)}
        refused["pallas_gpu"] = pallas_gpu_grouped.refusal(x_TD, a_ERD, b_ERN)
    if implementation is None:
        implementation = "pallas_tpu" if refused["pallas_tpu"] is None and _for_one_tpu() else "xla"
    _choose.check_implementation(_OP, implementation, shapes, refused, _AVAILABLE)
    operands = _varying.same_varying(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN)
    if implementation == "reference":
        return reference.forward(*operands)
    return _ENTRIES[form, implementation](*operands)


def _for_one_tpu() -> bool:
    """Whether this is traced for a TPU, in a place where XLA has nothing to partition."""
    if _tpu_target.current() is _tpu_target.UNKNOWN:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return mesh.size == 1 or set(mesh.manual_axes) == set(mesh.axis_names)


def _check(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN, form: str | None, shapes: str) -> None:
    for name, array, dims in (("x", x_TD, "T D"), ("a", a_ERD, "E R D"), ("b", b_ERN, "E R N")):
        _checks.check_rank(_OP, name, array, dims)
    T, (E, R, N) = x_TD.shape[0], b_ERN.shape
    _checks.check_shape(_OP, "a", a_ERD, (E, R, x_TD.shape[1]), shapes)
    _checks.check_same_float_dtype(_OP, shapes, x=x_TD, a=a_ERD, b=b_ERN, onto=onto_TN)
    _checks.check_same_float_dtype(_OP, shapes, gates=gates_TX)
    if ids_TK is not None:
        _checks.check_rank(_OP, "ids", ids_TK, "T K")
        _checks.check_integer(_OP, "ids", ids_TK, shapes)
        _checks.check_equal(_OP, "dim 0 of ids (T of x)", ids_TK.shape[0], T, shapes)
    _checks.check_shape(_OP, "gates", gates_TX, (T, E) if ids_TK is None else ids_TK.shape, shapes)
    if onto_TN is not None:
        _checks.check_shape(_OP, "onto", onto_TN, (T, N), shapes)
    if form is not None and form not in _FORMS:
        raise ValueError(f"{_OP}: form must be one of {', '.join(_FORMS)}, or None, got {form!r}")
    if form == "grouped" and (ids_TK is None or ids_TK.size == 0):
        raise ValueError(f"{_OP}: form 'grouped' sorts choices: it needs ids of at least one. Given: {shapes}")


@jax.custom_vjp
def _kernel(x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN):
    operands = (x_TD, a_ERD, b_ERN, gates_TX, ids_TK, onto_TN)
    return _choose.run("pallas_tpu", {"pallas_tpu": pallas_tpu.forward}, *operands)


def _forward(*operands):
    return _kernel(*operands), operands


def _backward(saved, dout_TN):
    *operands, onto_TN = saved
    gradients = _choose.run("pallas_tpu", {"pallas_tpu": pallas_tpu.backward}, *operands, dout_TN)
    return *gradients, None, None if onto_TN is None else dout_TN


_kernel.defvjp(_forward, _backward)

_ENTRIES = {
    ("dense", "xla"): xla.dense,
    ("dense", "pallas_tpu"): _kernel,
    ("grouped", "xla"): xla.grouped,
    ("grouped", "pallas_tpu"): pallas_tpu_grouped.grouped,
    ("grouped", "pallas_gpu"): pallas_gpu_grouped.grouped,
}
