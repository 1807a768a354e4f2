"""MoS, Mixture of Shards (Wang et al., arXiv 2410.00938): every layer's LoRA is put together from parts of one pool.

All L layers that have a linear layer of one name, D inputs and N outputs, share two pools of parameters,

    P_A [e L l, D / l],  P_B [e L l, N / l]        as many numbers as L LoRAs of rank e

and each takes r l shards of both, r > e: row i of its A is l of them, one behind the other,

    A_i = P_A[I_A[i l]], ..., P_A[I_A[i l + l - 1]];   B_i likewise by I_B;   y = y0 + (alpha / r) (x A) B

I is drawn once, without replacement, and never moves: no router, nothing depends on the input. The last p rows of each
layer are of shards that no other layer has. A pool's gradient is the sum over the layers that use a shard. Four things
tell layers apart, each with a setting: which shards they take (`subset_selection`), that I_A and I_B are independent
(`pair_dissociation`), l > 1 (`shards_per_vector`) and p > 0 (`private_rank`).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.shared import SharedAdapters
from moe_zoo.adapters.targets import AdapterConfig, Linear, layer_of
from moe_zoo.core.aux import Aux
from moe_zoo.core.param import ByLayer, Constant, Frozen, Uniform, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive


@dataclasses.dataclass(frozen=True)
class MosConfig(AdapterConfig):
    """`r`: the rank that each layer's A and B have; `rank_budget` e: what is trained is as much as LoRAs of that rank
    have; `private_rank` p: so many of the ranks are a layer's own; `shards_per_vector` l. Without `subset_selection`
    all layers take the same public shards, without `pair_dissociation` I_B is I_A.
    """

    rank_budget: int = 4
    private_rank: int = 1
    shards_per_vector: int = 2
    subset_selection: bool = True
    pair_dissociation: bool = True

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "rank_budget", "shards_per_vector")
        if not 0 <= self.private_rank <= min(self.rank_budget, self.r):
            raise ConfigError(
                f"{join(path, 'private_rank')}: {self.private_rank}; expected 0 to {min(self.rank_budget, self.r)}, of "
                f"rank_budget={self.rank_budget} and r={self.r}"
            )
        if self.rank_pattern:
            raise ConfigError(f"{join(path, 'rank_pattern')}: layers that share a pool all have rank r={self.r}")


@dataclasses.dataclass(frozen=True)
class Draw:
    """The initial value of an index [sides, L, r l]: for each of `layers` some of the first `public` shards in random
    order, then `private` of its own in their order; 0 for other layers. `same`: the public ones are the same for all.
    """

    layers: tuple[int, ...]
    public: int
    private: int
    same: bool

    def __call__(self, rng: np.random.Generator, shape) -> np.ndarray:
        index = np.zeros(shape, np.int64)
        taken = shape[-1] - self.private
        for side in index:
            rows = [rng.permutation(self.public)[:taken] for _ in self.layers]
            for place, layer in enumerate(self.layers):
                side[layer, :taken] = rows[0 if self.same else place]
                side[layer, taken:] = self.public + place * self.private + np.arange(self.private)
        return index


class Pool(nnx.Module):
    """The shards of all layers' A and B beside linear layers of one name, and which of them each layer takes."""

    def __init__(self, config: MosConfig, linear: Linear, layers: tuple[int, ...], num_layers: int):
        shards, D, N = config.shards_per_vector, linear.in_features, linear.out_features
        for size in (D, N):
            if size % shards:
                raise ConfigError(
                    f"model.adapters.shards_per_vector: {shards} shards do not divide {size} dims of {linear.name!r}"
                )
        L, e, p, r = len(layers), config.rank_budget, config.private_rank, config.r
        if r - p > (e - p) * L:
            raise ConfigError(
                f"model.adapters.r: {r}; with rank_budget={e} and private_rank={p} {linear.name!r} of {L} layers has "
                f"{(e - p) * L} public ranks, so r is at most {p + (e - p) * L}"
            )
        # small, and a row is of shards from anywhere: every device has all
        self.shards_a = param((e * L * shards, D // shards), (None, None), Uniform(1 / math.sqrt(D)))
        self.shards_b = param((e * L * shards, N // shards), (None, None), Constant(0.0))
        draw = Draw(layers, (e - p) * L * shards, p * shards, same=not config.subset_selection)
        shape = (2 if config.pair_dissociation else 1, num_layers, r * shards)
        self.index = param(shape, (None, None, None), draw, dtype=jnp.int32, kind=Frozen)
        self.rank = r

    def vectors(self) -> tuple[Float[Array, "L R D"], Float[Array, "L R N"]]:
        """A and B of every layer."""
        index = self.index[...]
        put = lambda shards, rows: jnp.take(shards, rows, axis=0).reshape(rows.shape[0], self.rank, -1)
        return put(self.shards_a[...], index[0]), put(self.shards_b[...], index[-1])


class Pools(SharedAdapters):
    """A pool for each name of linear layers that have adapters. A and B are put together once per call of the model."""

    def __init__(self, config: MosConfig, linears: Sequence[Linear], num_layers: int):
        pools = {}
        for linear in linears:
            alike = [one for one in linears if one.name == linear.name]
            sizes = sorted({one.shape for one in alike})
            if len(sizes) > 1:
                raise ConfigError(
                    f"model.adapters.target_modules: {linear.name!r} has sizes {' and '.join(map(str, sizes))}, which "
                    "cannot share a pool; name the layers of one size"
                )
            layers = sorted(layer_of(name) for one in alike for name in one.names() if config.targets(name))
            if linear.name not in pools:
                pools[linear.name] = Pool(config, linear, tuple(layers), num_layers)
        self.pools = nnx.Dict(pools)

    def per_layer(self):
        return {name: pool.vectors() for name, pool in self.pools.items()}


class Mos(Adapter):
    """MoS: LoRAs of a high rank, put together from shards of a small pool that all layers share."""

    Config = MosConfig
    takes_loras = False

    def __init__(self, config: MosConfig, linear: Linear):
        # A and B are the pools'
        scales = config.scales(linear)
        self.config, self.linear = config, linear
        self.dims = (1, config.r, linear.in_features, linear.out_features)
        self.scale = param(scales.shape[1:], ("adapter", None), ByLayer(linear.layers, scales), kind=Frozen)

    @classmethod
    def make_shared(cls, config, linears, *, num_layers, hidden_size):
        return Pools(config, linears, num_layers)

    def __call__(self, x_TD, y_TN, w_DN, ctx):
        a_RD, b_RN = (vectors.astype(x_TD.dtype) for vectors in ctx.inputs["adapters"][self.linear.name])
        hidden_TR = self.dropped(x_TD, ctx) @ a_RD.T * self.scale[...][0].astype(x_TD.dtype)
        return y_TN + hidden_TR @ b_RN, Aux()

    def idle_parameters(self) -> int:
        return 0
