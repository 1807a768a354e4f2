"""Public entries of the routing op: checks, choice of implementation, derivative.

Dims: T tokens, E experts, K experts per token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _checks, _choose, _varying
from pallas_kernels.route_top_k import pallas_gpu, pallas_gpu_rows, pallas_tpu, pallas_tpu_rows, reference, scoring, xla
from pallas_kernels.route_top_k.scoring import Priority, ScoreFunction, Settings

_OP = "route_top_k"
_ROUTE = {"xla": xla.route, "pallas_tpu": pallas_tpu.route, "pallas_gpu": pallas_gpu.route}
_POSITIONS = {"reference": reference.positions, "xla": xla.positions}
_ROWS = {
    "reference": reference.rows,
    "xla": xla.rows,
    "pallas_tpu": pallas_tpu_rows.rows,
    "pallas_gpu": pallas_gpu_rows.rows,
}
_AVAILABLE = ("reference", "xla")


class TopKRoutes(NamedTuple):
    """What route_top_k returns.

    experts: ids, best first; E for tokens that are not valid.
    gates: float32 at least; 0 for tokens that are not valid.
    counts: choices per expert.
    positions: how many earlier choices went to the same expert; 0 where the expert is E. In any order of rows that goes
      expert by expert, `cumsum(counts)[expert] - counts[expert] + position` is the row of a choice.
    scores: of all experts, for losses and analysis; None unless asked for.
    """

    experts: Int[Array, "T K"]
    gates: Float[Array, "T K"]
    counts: Int[Array, " E"]
    positions: Int[Array, "T K"]
    scores: Float[Array, "T E"] | None


def route_top_k(
    logits_TE: Float[Array, "T E"],
    k: int,
    *,
    score_function: ScoreFunction = "softmax",
    selection_bias_E: Float[Array, " E"] | None = None,
    renormalize: bool = False,
    scale: float = 1.0,
    valid_T: Bool[Array, " T"] | None = None,
    priority: Priority = "token",
    return_scores: bool = False,
    implementation: str | None = None,
) -> TopKRoutes:
    """The k best experts of every token by score, their gates, and each choice's place among its expert's choices.

    score = softmax(logits) or sigmoid(logits), in float32 at least; experts by score + selection_bias; gate = score,
    divided by the sum of the token's gates with `renormalize`, times `scale`.

    Args:
      logits_TE: router logits, any floating dtype.
      k: experts per token, 1 to E.
      score_function: "softmax" or "sigmoid".
      selection_bias_E: added to the scores for selection only, as DeepSeek-V3 balances load.
      renormalize: the gates of a token sum to `scale`.
      scale: factor of the gates.
      valid_T: tokens that take part; the others get expert E, gate 0, and count nowhere.
      priority: which choices are earlier: "token", those of earlier tokens; "choice", all first choices in token order,
        then all second ones, as capacity limits give places (GShard).
      return_scores: also return the scores of all experts.
      implementation: "reference", "xla", "pallas_tpu" and "pallas_gpu" (interpreted where they are lowered for a CPU),
        or None: "pallas_tpu" on TPU and "pallas_gpu" where this is traced for an NVIDIA GPU, inside a shard_map over
        all mesh axes, where the kernel's limits allow it; else "xla". (XLA cannot partition a kernel, and outside
        shard_map it may have to.)

    Ties go to the lower id. A NaN score is chosen last and never twice; its gate is NaN. A biased score of -inf counts
    as the least finite number.

    Raises:
      ValueError, TypeError: shapes, dtypes or settings that don't fit, or an unknown implementation.
      NotImplementedError: a named kernel that cannot run these shapes.

    Gradients reach logits through gates and scores, in reverse mode only; selection and its bias get none.
    """
    logits_TE = jnp.asarray(logits_TE)
    bias_E = None if selection_bias_E is None else jax.lax.stop_gradient(jnp.asarray(selection_bias_E))
    valid_T = None if valid_T is None else jnp.asarray(valid_T)
    shapes = _checks.describe(logits=logits_TE, selection_bias=bias_E, valid=valid_T) + f", k {k}"
    _check(logits_TE, k, bias_E, valid_T, shapes)
    _check_choice(_OP, "score_function", score_function, scoring.SCORE_FUNCTIONS)
    _check_choice(_OP, "priority", priority, scoring.PRIORITIES)
    settings = Settings(k, score_function, renormalize, float(scale), priority, return_scores)
    implementation = _chosen(_OP, implementation, shapes, _refusals(logits_TE, settings, implementation))
    operands = _varying.same_varying(logits_TE, bias_E, valid_T)
    if implementation == "reference":
        return TopKRoutes(*reference.route(*operands, settings=settings))
    return TopKRoutes(*_route(settings, implementation, *operands))


def expert_positions(
    experts_TK: Int[Array, "T K"], num_experts: int, *, priority: Priority = "token", implementation: str | None = None
) -> tuple[Int[Array, " E"], Int[Array, "T K"]]:
    """(choices per expert, earlier choices of the same expert), for ids that are already there.

    The counts and positions of route_top_k, for any router's decision: ids of num_experts mean no expert, count nowhere
    and have position 0. A token may name an expert more than once.

    Args:
      experts_TK: ids from 0 to num_experts, integers.
      num_experts: E.
      priority: as in route_top_k; with "token" the choices of one token come in the order of k.
      implementation: "reference", "xla", or None: "xla".

    Raises ValueError, TypeError for arguments that don't fit.
    """
    _check_choice("expert_positions", "priority", priority, scoring.PRIORITIES)
    experts_TK = jnp.asarray(experts_TK)
    shapes = _check_ids("expert_positions", experts_TK)
    _choose.check_implementation("expert_positions", implementation or "xla", shapes, available=_AVAILABLE)
    return _POSITIONS[implementation or "xla"](experts_TK, num_experts=num_experts, priority=priority)


def expert_rows(
    experts_TK: Int[Array, "T K"], num_experts: int, *, implementation: str | None = None
) -> tuple[Int[Array, " E"], Int[Array, "T K"]]:
    """(choices per expert, row of each choice when all are sorted by expert), without sorting.

    The sort is stable, choices in the order of t, then k; num_experts means no expert and gives row T * K. Arguments
    and errors as in expert_positions; implementations as in route_top_k.
    """
    op = "expert_rows"
    experts_TK = jnp.asarray(experts_TK)
    shapes = _check_ids(op, experts_TK)
    refusals = {
        "pallas_tpu": pallas_tpu_rows.refusal(experts_TK.shape, num_experts),
        "pallas_gpu": pallas_gpu_rows.refusal(experts_TK.shape, num_experts, implementation),
    }
    implementation = _chosen(op, implementation, shapes, refusals)
    entries = {name: function for name, function in _ROWS.items() if refusals.get(name) is None}
    table = {name: functools.partial(function, num_experts=num_experts) for name, function in entries.items()}
    return _choose.run(implementation, table, experts_TK, takes_batches=True)


def _check_ids(op: str, experts_TK: Array) -> str:
    shapes = _checks.describe(experts=experts_TK)
    _checks.check_rank(op, "experts", experts_TK, "T K")
    _checks.check_integer(op, "experts", experts_TK, shapes)
    return shapes


def _refusals(logits_TE: Array, settings: Settings, asked: str | None) -> dict[str, str | None]:
    """Why each kernel can't take the operands; None if it can."""
    return {
        "pallas_tpu": pallas_tpu.refusal(logits_TE.shape, logits_TE.dtype, settings),
        "pallas_gpu": pallas_gpu.refusal(logits_TE.shape, logits_TE.dtype, asked),
    }


def _chosen(op: str, implementation: str | None, shapes: str, refusals: dict[str, str | None]) -> str | None:
    """The implementation to run; None where the platform decides."""
    if implementation is None and not _inside_shard_map():
        partition = "outside shard_map XLA may have to partition it"
        refusals = {name: refusal or partition for name, refusal in refusals.items()}
    implementation = _choose.check_implementation(op, implementation, shapes, refusals, _AVAILABLE)
    return "xla" if implementation is None and None not in refusals.values() else implementation


def _inside_shard_map() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and set(mesh.manual_axes) == set(mesh.axis_names)


def _check(logits_TE: Array, k: int, bias_E: Array | None, valid_T: Array | None, shapes: str) -> None:
    _checks.check_rank(_OP, "logits", logits_TE, "T E")
    _checks.check_same_float_dtype(_OP, shapes, logits=logits_TE)
    T, E = logits_TE.shape
    if not 1 <= k <= E:
        raise ValueError(f"{_OP}: k must lie in [1, E] = [1, {E}], got {k}. Given: {shapes}")
    if bias_E is not None:
        _checks.check_same_float_dtype(_OP, shapes, selection_bias=bias_E)
        _checks.check_shape(_OP, "selection_bias", bias_E, (E,), shapes)
    if valid_T is not None:
        _checks.check_shape(_OP, "valid", valid_T, (T,), shapes)
        if valid_T.dtype != jnp.bool_:
            raise TypeError(f"{_OP}: valid must be a bool array, got {valid_T.dtype}. Given: {shapes}")


def _check_choice(op: str, name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(known)}, got {given!r}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(settings, implementation, logits_TE, bias_E, valid_T):
    refusals = _refusals(logits_TE, settings, implementation)
    entries = {name: function for name, function in _ROUTE.items() if refusals.get(name) is None}
    table = {name: functools.partial(function, settings=settings) for name, function in entries.items()}
    return _choose.run(implementation, table, logits_TE, bias_E, valid_T, takes_batches=True)


def _forward(settings, implementation, logits_TE, bias_E, valid_T):
    routes = _route(settings, implementation, logits_TE, bias_E, valid_T)
    return routes, (logits_TE, routes[0])


def _backward(settings, implementation, saved, cotangents):
    logits_TE, experts_TK = saved
    _, dgates_TK, _, _, dscores_TE = cotangents

    def gates_and_scores(logits_TE):
        scores_TE = scoring.scores(logits_TE, settings.score_function)
        return scoring.gates(scores_TE, experts_TK, settings), scores_TE if settings.return_scores else None

    (dlogits_TE,) = jax.vjp(gates_and_scores, logits_TE)[1]((dgates_TK, dscores_TE))
    return dlogits_TE, None, None


_route.defvjp(_forward, _backward)
