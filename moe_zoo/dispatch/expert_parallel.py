"""Dropless dispatch over a mesh: the only place with collectives.

All-gather and psum-scatter ("ring of experts"): every shard of the `expert` axis collects the tokens and decisions of
its group, computes the rows of its own experts, and the partial sums are scattered back. No ragged collective, nothing
dropped, the function computed is that of one device. Traffic per layer and direction is (W - 1) * T * D elements for W
expert shards, whatever K is; the row buffer holds W * T * K rows, of which only those of the shard's experts cost
work. Weights are gathered over `fsdp` just before use (their gradient is the reduce-scatter); `tensor` splits the
hidden width, whose partial products are summed.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from moe_zoo.core import param as P
from moe_zoo.core.decision import TokenChoice
from moe_zoo.sharding import DEFAULT_RULES, sharding_of


def run(mesh: Mesh, plan, x_TD: Float[Array, "T D"], decision: TokenChoice, bank) -> Float[Array, "T D"]:
    """The bank's output for every token, computed where the experts live.

    `plan(decision)` makes the RowPlan of a decision over the shard's own experts. T tokens that do not divide over the
    batch axes (a prompt, a decoded token) are filled up with tokens that go nowhere.
    """
    T, K = decision.experts.shape
    fill = -T % math.prod(mesh.shape[axis] for axis in DEFAULT_RULES["batch"])
    if fill:
        nowhere = TokenChoice(
            jnp.concatenate([decision.experts, jnp.full((fill, K), decision.num_experts, jnp.int32)]),
            jnp.concatenate([decision.gates, jnp.zeros((fill, K), decision.gates.dtype)]),
            decision.num_experts,
        )
        return run(mesh, plan, jnp.concatenate([x_TD, jnp.zeros((fill, x_TD.shape[1]), x_TD.dtype)]), nowhere, bank)[:T]
    batch = PartitionSpec(DEFAULT_RULES["batch"])
    variables = P.flat(bank)
    specs = {name: _spec(mesh, name, var) for name, var in variables.items()}
    weights = {name: var.get_value() for name, var in variables.items()}
    split_hidden = any("tensor" in _axes(spec) for spec in specs.values())
    # experts of different widths are not stacked: every shard has all of them, and computes its own tokens
    apart = any("expert" in var.logical_axes for var in variables.values())

    def body(x_tD, experts_tK, gates_tK, weights):
        gather = lambda x: jax.lax.all_gather(x, "expert", axis=0, tiled=True) if apart else x
        x_gD, local = gather(x_tD), TokenChoice(experts_tK, gates_tK, decision.num_experts)
        if apart:
            local = _own(gather(experts_tK), gather(gates_tK), decision.num_experts)
        weights = {name: _gather_weight(w, specs[name]) for name, w in weights.items()}
        if split_hidden:  # the partial products are summed, what is added to the sum counts once
            shards = jax.lax.axis_size("tensor")
            weights = {name: w / shards if name in getattr(bank, "after_sum", ()) else w for name, w in weights.items()}
        y_gD = plan(local).run(x_gD, P.replace(bank, weights))
        if split_hidden:
            y_gD = jax.lax.psum(y_gD, "tensor")
        return jax.lax.psum_scatter(y_gD, "expert", scatter_dimension=0, tiled=True) if apart else y_gD

    sharded = jax.shard_map(body, mesh=mesh, in_specs=(batch, batch, batch, specs), out_specs=batch)
    return sharded(x_TD, decision.experts, decision.gates, weights)


def _spec(mesh: Mesh, name: str, var) -> PartitionSpec:
    shape = var.get_value().shape
    axes = var.logical_axes[-len(shape) :]  # inside the scan the stacking axis has been sliced away
    return sharding_of(mesh, axes, shape, f"experts.{name}").spec


def _own(experts_TK, gates_TK, num_experts: int) -> TokenChoice:
    """The choices of this shard's experts, numbered from 0; all others go nowhere."""
    local = num_experts // jax.lax.axis_size("expert")
    mine_TK = experts_TK - jax.lax.axis_index("expert") * local
    here_TK = (mine_TK >= 0) & (mine_TK < local) & (experts_TK < num_experts)
    return TokenChoice(jnp.where(here_TK, mine_TK, local), jnp.where(here_TK, gates_TK, 0), local)


def _gather_weight(w: Array, spec: PartitionSpec) -> Array:
    for dim, names in enumerate(spec):
        if "fsdp" in _tuple(names):
            w = jax.lax.all_gather(w, "fsdp", axis=dim, tiled=True)
    return w


def _axes(spec: PartitionSpec) -> set[str]:
    return {name for names in spec for name in _tuple(names)}


def _tuple(names) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)
