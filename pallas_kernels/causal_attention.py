"""GPU kernels (Pallas, Triton) of a sequence's softmax attention to itself, forward and backward: no scores in memory.

FlashAttention (arXiv 2205.14135): a program has one block of queries, or in the second half of the backward pass of
keys, and walks over the blocks of the others that come before it, or after; only the largest score of each query and
one over the sum of its exponentials are kept. Who is seen is told by numbers per token: no mask is in memory either.

B batch, S sequence, N query heads, M key-value heads, G = N / M, H head size; Q rows of a block of queries, L of keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import _choose, _gpu_target
from pallas_kernels._gpu_rows import dot

Ref = Any
#: below every score; finite, so that differences are
_LOWEST = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What decides who is seen: query i sees key j of j <= i whose position is not behind its own, of equal segment.

    `keys`: as `segments`, with another number (one that no segment has) for keys that nobody sees.
    window: only keys of the `window` positions up to the query's own. chunk: only of the same run of `chunk` positions.
    """

    positions: Int[Array, "B S"]
    segments: Int[Array, "B S"]
    keys: Int[Array, "B S"]
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    chunk: int | None = dataclasses.field(default=None, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of queries and of keys per step, and warps, of a pass."""

    queries: int
    keys: int
    warps: int
    stages: int


def why_not(q_BNSH: Array, k_BMSH: Array, v_BMSH: Array) -> str | None:
    """Why the kernels can't take these operands; None if they can."""
    S, H = q_BNSH.shape[2:]
    if {a.dtype for a in (q_BNSH, k_BMSH, v_BMSH)} != {jnp.dtype(jnp.bfloat16)}:
        return "the kernel takes bfloat16"
    if v_BMSH.shape[-1] != H or H not in (16, 32, 64, 128):
        return f"the kernel takes heads of 16, 32, 64 or 128 numbers, not {H} and {v_BMSH.shape[-1]}"
    if S % 64:
        return f"the kernel takes multiples of 64 tokens, not {S}"
    target = _gpu_target.current()
    if target is not None and target.capability < 80:
        return f"the kernel needs compute capability 8.0, the device has {target.capability / 10:.1f}"
    return None


def run(
    implementation: str | None,
    blocks: Callable[..., Any],
    kernel: Callable[..., Any],
    q_BNSH: Array,
    k_BMSH: Array,
    v_BMSH: Array,
    sinks_N: Array | None,
    *rest: Any,
) -> Any:
    """`blocks` ("xla") or `kernel` ("pallas_gpu") of these operands, whichever is named. None takes the kernel where
    this is traced for an NVIDIA GPU that is the only device, if it can.

    Raises ValueError for another name, NotImplementedError if the kernel is named and can't take the operands.
    """
    operands = (q_BNSH, k_BMSH, v_BMSH, sinks_N, *rest)
    if implementation is None and _gpu_target.current() is None:
        return blocks(*operands)
    reason = "it has no sinks" if sinks_N is not None else why_not(q_BNSH, k_BMSH, v_BMSH)
    if implementation is None and jax.device_count() > 1:
        reason = f"XLA can't divide a kernel among {jax.device_count()} devices"
    shapes = f"q {q_BNSH.dtype.name}{list(q_BNSH.shape)}, k {list(k_BMSH.shape)}, v {list(v_BMSH.shape)}"
    chosen = _choose.check_implementation("attend_causally", implementation, shapes, {"pallas_gpu": reason}, ("xla",))
    if chosen == "xla" or reason is not None:
        return blocks(*operands)
    return _choose.run(chosen, {"xla": blocks, "pallas_gpu": kernel}, *operands)


def forward(
    q_BNSH: Float[Array, "B N S H"],
    k_BMSH: Float[Array, "B M S H"],
    v_BMSH: Float[Array, "B M S H"],
    tokens: Tokens,
    *,
    scale: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """out [B, N, S, H] in q's dtype; per query [B, N, S] in float32 the largest score and one over the sum of the
    exponentials beside it. A query that sees nothing gives zeros.
    """
    call = _Call.of(q_BNSH, k_BMSH, tokens, scale, blocks or _blocks(q_BNSH, sums=1))
    per_query = jax.ShapeDtypeStruct(q_BNSH.shape[:3], jnp.float32)
    out = jax.ShapeDtypeStruct(q_BNSH.shape, q_BNSH.dtype), per_query, per_query
    return call.run(_forward, out, call.query_blocks * call.N, "attention", interpret)(
        q_BNSH, k_BMSH, v_BMSH, tokens.positions, tokens.segments, tokens.keys
    )


def gradients(
    q_BNSH: Float[Array, "B N S H"],
    k_BMSH: Float[Array, "B M S H"],
    v_BMSH: Float[Array, "B M S H"],
    tokens: Tokens,
    out_BNSH: Float[Array, "B N S H"],
    highest_BNS: Float[Array, "B N S"],
    inverse_BNS: Float[Array, "B N S"],
    dout_BNSH: Float[Array, "B N S H"],
    *,
    scale: float,
    blocks: Blocks | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Those of q, k and v, in their dtypes, given what `forward` returned and the gradient of its first result."""
    mean_BNS = jnp.sum(dout_BNSH.astype(jnp.float32) * out_BNSH.astype(jnp.float32), -1)
    given = (
        q_BNSH, k_BMSH, v_BMSH, tokens.positions, tokens.segments, tokens.keys, highest_BNS, inverse_BNS, mean_BNS,
        dout_BNSH.astype(q_BNSH.dtype),
    )  # fmt: skip
    shape = lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype)
    of_queries = _Call.of(q_BNSH, k_BMSH, tokens, scale, blocks or _blocks(q_BNSH, sums=1))
    programs = of_queries.query_blocks * of_queries.N
    (dq,) = of_queries.run(_dq, (shape(q_BNSH),), programs, "attention_dq", interpret)(*given)
    of_keys = _Call.of(q_BNSH, k_BMSH, tokens, scale, blocks or _blocks(q_BNSH, sums=2))
    programs = of_keys.key_blocks * of_keys.M
    dk, dv = of_keys.run(_dkv, (shape(k_BMSH), shape(v_BMSH)), programs, "attention_dkv", interpret)(*given)
    return dq, dk, dv


def _blocks(q_BNSH: Array, sums: int) -> Blocks:
    """128 rows of queries where their sums are alone in registers, 64 beside the keys' two. Keys and values of the next
    step are on their way while one is multiplied, which must fit into shared memory.
    """
    S, H = q_BNSH.shape[2:]
    target = _gpu_target.current() or _gpu_target.SMALLEST
    keys = 64 if H < 128 or target.shared_bytes >= 128 * _gpu_target.KIB else 32
    queries = math.gcd(S, 128 if sums == 1 else 64)
    return Blocks(queries, keys, 8 if H == 128 or (sums == 1 and H == 64) else 4, 2)


@dataclasses.dataclass(frozen=True)
class _Call:
    B: int
    N: int
    M: int
    S: int
    H: int
    scale: float
    window: int | None
    chunk: int | None
    blocks: Blocks

    @classmethod
    def of(cls, q_BNSH: Array, k_BMSH: Array, tokens: Tokens, scale: float, blocks: Blocks) -> "_Call":
        B, N, S, H = q_BNSH.shape
        return cls(B, N, k_BMSH.shape[1], S, H, scale, tokens.window, tokens.chunk, blocks)

    @property
    def query_blocks(self) -> int:
        return self.S // self.blocks.queries

    @property
    def key_blocks(self) -> int:
        return self.S // self.blocks.keys

    def run(self, kernel: Any, out: Any, programs_per_row: int, name: str, interpret: bool) -> Any:
        return pl.pallas_call(
            functools.partial(kernel, self),
            out_shape=out,
            grid=(programs_per_row * self.B,),
            compiler_params=plgpu.CompilerParams(num_warps=self.blocks.warps, num_stages=self.blocks.stages),
            interpret=interpret,
            name=name,
        )

    def place(self, blocks: int, heads: int) -> tuple[Array, Array, Array]:
        """(row of the batch, head, block) of this program: blocks outermost, the heads that share keys side by side."""
        heads_and_rows = heads * self.B
        block = jax.lax.div(pl.program_id(0), jnp.int32(heads_and_rows))
        rest = pl.program_id(0) - block * heads_and_rows
        b = jax.lax.div(rest, jnp.int32(heads))
        return b, rest - b * heads, block

    def scores(self, q_QH: Array, k_LH: Array, sees_QL: Array) -> Array:
        return jnp.where(sees_QL, dot(q_QH, k_LH, (1, 1)) * self.scale, _LOWEST)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Numbers of some tokens: their places, positions and segments."""

    at: Array
    positions: Array
    segments: Array

    @classmethod
    def load(cls, b: Array, start: Array, size: int, positions: Ref, segments: Ref) -> "_Rows":
        rows = pl.ds(start, size)
        at = start + jax.lax.broadcasted_iota(jnp.int32, (size,), 0)
        return cls(at, plgpu.load(positions.at[b, rows]), plgpu.load(segments.at[b, rows]))


def _sees(call: _Call, queries: _Rows, keys: _Rows) -> Array:
    distance_QL = queries.positions[:, None] - keys.positions[None, :]
    sees_QL = (queries.at[:, None] >= keys.at[None, :]) & (distance_QL >= 0)
    sees_QL &= queries.segments[:, None] == keys.segments[None, :]
    if call.window is not None:
        sees_QL &= distance_QL < call.window
    if call.chunk is not None:

        def run(rows: _Rows) -> Array:  # rounded down
            whole = jax.lax.div(rows.positions, jnp.int32(call.chunk))
            return whole - (whole * call.chunk > rows.positions)

        sees_QL &= run(queries)[:, None] == run(keys)[None, :]
    return sees_QL


def _forward(call: _Call, q, k, v, positions, segments, key_segments, out, highest, inverse) -> None:
    Q, L = call.blocks.queries, call.blocks.keys
    b, n, i = call.place(call.query_blocks, call.N)
    i = call.query_blocks - 1 - i  # those that see most come first
    m, rows = jax.lax.div(n, jnp.int32(call.N // call.M)), pl.ds(i * Q, Q)
    q_QH = plgpu.load(q.at[b, n, rows, :])
    queries = _Rows.load(b, i * Q, Q, positions, segments)

    def step(j: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        sum_QH, total_Q, most_Q = sums
        keys = pl.ds(j * L, L)
        sees_QL = _sees(call, queries, _Rows.load(b, j * L, L, positions, key_segments))
        scores_QL = call.scores(q_QH, plgpu.load(k.at[b, m, keys, :]), sees_QL)
        new_Q = jnp.maximum(most_Q, jnp.max(scores_QL, 1))
        exp_QL = jnp.where(sees_QL, jnp.exp(scores_QL - new_Q[:, None]), 0)
        shrink_Q = jnp.exp(most_Q - new_Q)
        v_LH = plgpu.load(v.at[b, m, keys, :])
        sum_QH = sum_QH * shrink_Q[:, None] + dot(exp_QL.astype(v_LH.dtype), v_LH, (1, 0))
        return sum_QH, total_Q * shrink_Q + jnp.sum(exp_QL, 1), new_Q

    zeros = jnp.zeros((Q, call.H), jnp.float32), jnp.zeros((Q,), jnp.float32), jnp.full((Q,), _LOWEST, jnp.float32)
    end = jax.lax.div((i + 1) * Q + L - 1, jnp.int32(L))
    sum_QH, total_Q, most_Q = jax.lax.fori_loop(0, end, step, zeros)
    inverse_Q = jnp.where(total_Q > 0, 1 / total_Q, 0)
    plgpu.store(out.at[b, n, rows, :], (sum_QH * inverse_Q[:, None]).astype(out.dtype))
    plgpu.store(highest.at[b, n, rows], most_Q)
    plgpu.store(inverse.at[b, n, rows], inverse_Q)


def _block_gradients(call: _Call, q_QH, k_LH, v_LH, sees_QL, highest_Q, inverse_Q, mean_Q, dout_QH):
    """(weights, gradients of the scores) [Q, L] of one block, in float32."""
    scores_QL = call.scores(q_QH, k_LH, sees_QL)
    weights_QL = jnp.where(sees_QL, jnp.exp(scores_QL - highest_Q[:, None]) * inverse_Q[:, None], 0)
    return weights_QL, weights_QL * (dot(dout_QH, v_LH, (1, 1)) - mean_Q[:, None])


def _dq(call: _Call, q, k, v, positions, segments, key_segments, highest, inverse, mean, dout, dq) -> None:
    Q, L = call.blocks.queries, call.blocks.keys
    b, n, i = call.place(call.query_blocks, call.N)
    i = call.query_blocks - 1 - i
    m, rows = jax.lax.div(n, jnp.int32(call.N // call.M)), pl.ds(i * Q, Q)
    q_QH, dout_QH = (plgpu.load(ref.at[b, n, rows, :]) for ref in (q, dout))
    per_query = [plgpu.load(ref.at[b, n, rows]) for ref in (highest, inverse, mean)]
    queries = _Rows.load(b, i * Q, Q, positions, segments)

    def step(j: Array, dq_QH: Array) -> Array:
        k_LH, v_LH = (plgpu.load(ref.at[b, m, pl.ds(j * L, L), :]) for ref in (k, v))
        sees_QL = _sees(call, queries, _Rows.load(b, j * L, L, positions, key_segments))
        _, d_scores_QL = _block_gradients(call, q_QH, k_LH, v_LH, sees_QL, *per_query, dout_QH)
        return dq_QH + dot(d_scores_QL.astype(k_LH.dtype), k_LH, (1, 0))

    end = jax.lax.div((i + 1) * Q + L - 1, jnp.int32(L))
    dq_QH = jax.lax.fori_loop(0, end, step, jnp.zeros((Q, call.H), jnp.float32))
    plgpu.store(dq.at[b, n, rows, :], (dq_QH * call.scale).astype(dq.dtype))


def _dkv(call: _Call, q, k, v, positions, segments, key_segments, highest, inverse, mean, dout, dk, dv) -> None:
    Q, L = call.blocks.queries, call.blocks.keys
    b, m, j = call.place(call.key_blocks, call.M)
    columns = pl.ds(j * L, L)
    k_LH, v_LH = (plgpu.load(ref.at[b, m, columns, :]) for ref in (k, v))
    keys = _Rows.load(b, j * L, L, positions, key_segments)
    G, first = call.N // call.M, jax.lax.div(j * L, jnp.int32(Q))
    steps = call.query_blocks - first

    def step(at: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        dk_LH, dv_LH = sums
        head = jax.lax.div(at, steps)
        n, i = m * G + head, first + at - head * steps
        rows = pl.ds(i * Q, Q)
        q_QH, dout_QH = (plgpu.load(ref.at[b, n, rows, :]) for ref in (q, dout))
        per_query = [plgpu.load(ref.at[b, n, rows]) for ref in (highest, inverse, mean)]
        sees_QL = _sees(call, _Rows.load(b, i * Q, Q, positions, segments), keys)
        weights_QL, d_scores_QL = _block_gradients(call, q_QH, k_LH, v_LH, sees_QL, *per_query, dout_QH)
        dv_LH = dv_LH + dot(weights_QL.astype(dout_QH.dtype), dout_QH, (0, 0))
        return dk_LH + dot(d_scores_QL.astype(q_QH.dtype), q_QH, (0, 0)), dv_LH

    zeros = jnp.zeros((L, call.H), jnp.float32)
    dk_LH, dv_LH = jax.lax.fori_loop(0, G * steps, step, (zeros, zeros))
    plgpu.store(dk.at[b, m, columns, :], (dk_LH * call.scale).astype(dk.dtype))
    plgpu.store(dv.at[b, m, columns, :], dv_LH.astype(dv.dtype))
