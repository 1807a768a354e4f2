"""What a router decides, told apart by type. Shapes are static; a varying number of experts is `experts == E`.

T tokens, E experts, K experts per token, C capacity, G groups (1: the batch, B: per sequence).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def _pytree(*, static=()):
    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return wrap


@_pytree(static=("num_experts",))
class TokenChoice:
    """Each token names its experts. `experts[t, k] == num_experts` means none (null, dropped, inactive, padding)."""

    experts: Int[Array, "T K"]
    gates: Float[Array, "T K"]
    num_experts: int

    def counts(self) -> Int[Array, "E"]:
        """Tokens per expert, before any drop."""
        # a scatter-add is serial on a CPU; comparing with the E ids and summing is a vector loop, up to forty times
        # faster if the short sum over K is kept apart from the long one
        hits_TKE = self.experts[..., None] == jnp.arange(self.num_experts)
        hits_TE = jax.lax.optimization_barrier(hits_TKE.sum(1, dtype=jnp.int32))
        return hits_TE.sum(0)

    def live(self) -> Bool[Array, "T K"]:
        return self.experts < self.num_experts

    def masked(self, valid_T: Bool[Array, "T"] | None) -> "TokenChoice":
        """Sends the tokens that are not valid nowhere, with gate zero."""
        if valid_T is None:
            return self
        keep_T1 = valid_T[:, None]
        experts_TK = jnp.where(keep_T1, self.experts, self.num_experts)
        return TokenChoice(experts_TK, jnp.where(keep_T1, self.gates, 0), self.num_experts)

    def dense(self) -> "Dense":
        """The same decision as one gate per (token, expert)."""
        onehot_TKE = jax.nn.one_hot(self.experts, self.num_experts, dtype=self.gates.dtype)
        return Dense(jnp.einsum("tk,tke->te", self.gates, onehot_TKE))


@_pytree()
class ExpertChoice:
    """Each expert names its tokens, within G groups of T/G tokens. `tokens` index inside the group; T/G means none."""

    tokens: Int[Array, "G E C"]
    gates: Float[Array, "G E C"]

    def masked(self, valid_T) -> "ExpertChoice":
        """As it is: the tokens of a group compete, so only the router can leave padding out."""
        return self


@_pytree()
class Soft:
    """Slots are mixtures of tokens and tokens are mixtures of slots, within G groups."""

    dispatch: Float[Array, "G S E C"]
    combine: Float[Array, "G S E C"]

    def masked(self, valid_T) -> "Soft":
        """As it is: the tokens of a group share slots, so only the router can leave padding out."""
        return self


@_pytree()
class Dense:
    """Every expert for every token, weighted."""

    gates: Float[Array, "T E"]

    def live(self) -> Bool[Array, "T E"]:
        return self.gates != 0

    def counts(self) -> Int[Array, "E"]:
        """Tokens per expert with a non-zero gate, before any drop."""
        return self.live().sum(0, dtype=jnp.int32)

    def masked(self, valid_T) -> "Dense":
        return self if valid_T is None else Dense(jnp.where(valid_T[:, None], self.gates, 0))

    def top(self, K: int) -> TokenChoice:
        """The K largest non-zero gates of each token; what is zero goes nowhere. Exact when at most K are non-zero."""
        E = self.gates.shape[-1]
        size_TK, experts_TK = jax.lax.top_k(jnp.abs(jax.lax.stop_gradient(self.gates)), K)
        experts_TK = jnp.where(size_TK > 0, experts_TK, E)
        gates_TK = jnp.take_along_axis(self.gates, jnp.minimum(experts_TK, E - 1), axis=-1)
        return TokenChoice(experts_TK, jnp.where(size_TK > 0, gates_TK, 0), E)


@_pytree()
class Merge:
    """Parameters are mixed and no token moves: one weighting of the E experts per group."""

    weights: Float[Array, "G E"]


Decision = TokenChoice | ExpertChoice | Soft | Dense | Merge
