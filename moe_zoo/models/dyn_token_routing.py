"""DynTokenRoutingViT, our reading of dynamic token routing (arXiv 2308.03409), whose code was never released.

A grid of scales (rows i, each with half the sides of the one before) and stages (columns j). At node (i, j)

    F_ij = A_i,j-1 + down_i-1,j;   A_ij, down_ij = node(F_ij)        (blocks/token_gates.py)

with F_00 what the stem makes of the image; the mean of A of the last row and column is classified. Which tokens go
through a block, and which go down, is decided by gates, token by token, and paid for by `train/token_budget.py`.

In training everything is computed and weighted by the gates. `Capacities` make it cheaper: so many tokens of every
node are computed, those of the largest gates; what is open beyond them passes by and is counted.

B batch, S tokens of a row, I rows, J stages, D model, C classes.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from moe_zoo.blocks.token_gates import OPEN, GateConfig, Node, fours
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.param import Normal, param, stack
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.grid import GridView, Stem, light
from moe_zoo.layers.norm import LayerNorm
from moe_zoo.models.classifier import Classifier, ImagesConfig, PooledHead, collected
from moe_zoo.models.decoder import ModelAux


@dataclasses.dataclass(frozen=True)
class DynTokenRoutingConfig(ImagesConfig):
    """`hidden_sizes`, `num_heads`: one per row, the first at a quarter of the image's sides. `stages`: J. `kv_all`:
    tokens that go through a block see all of its grid and not only each other. `early_exit`: a token whose gate was
    closed once stays out of the later blocks of its row.
    """

    name: str = "dyn_token_routing_vit"
    hidden_sizes: tuple[int, ...] = (32, 32, 32)
    num_heads: tuple[int, ...] = (2, 2, 2)
    stages: int = 4
    mlp_ratio: int = 2
    kv_all: bool = False
    early_exit: bool = False
    gate: GateConfig = GateConfig()

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "stages", "mlp_ratio")
        if len(self.num_heads) != len(self.hidden_sizes) or not self.hidden_sizes:
            raise ConfigError(
                f"{join(path, 'num_heads')}: {list(self.num_heads)}; expected one for each of the "
                f"{len(self.hidden_sizes)} rows of hidden_sizes={list(self.hidden_sizes)}"
            )
        rows = len(self.hidden_sizes)
        if self.image_size % (least := 4 << (rows - 1)):
            raise ConfigError(f"{join(path, 'image_size')}: {self.image_size}; {rows} rows need a multiple of {least}")
        if self.gate.static_stages > self.stages:
            raise ConfigError(
                f"{join(path, 'gate.static_stages')}: {self.gate.static_stages} of stages={self.stages}; at most all"
            )

    @property
    def views(self) -> list[GridView]:
        """The grid of each row."""
        return [
            GridView(self.image_size // (4 << i), self.image_size // (4 << i)) for i in range(len(self.hidden_sizes))
        ]

    @property
    def num_layers(self) -> int:
        return len(self.hidden_sizes) * self.stages

    @property
    def summary(self) -> str:
        sides = ", ".join(str(view.height) for view in self.views)
        return f"gates {self.gate.kind}, {self.stages} stages of rows of sides {sides}"


@dataclasses.dataclass(frozen=True)
class Capacities:
    """How many tokens of each node are computed: `depth[i][j]` by its block, `scale[i][j]` on the way down."""

    depth: tuple[tuple[int, ...], ...]
    scale: tuple[tuple[int, ...], ...]


class DynTokenRoutingViT(Classifier):
    """Every token has its own depth and scale, by gates under a budget of FLOPs."""

    Config = DynTokenRoutingConfig
    #: None: everything is computed
    capacities: Capacities | None = None

    def __init__(self, config: DynTokenRoutingConfig, mesh: Mesh | None = None):
        super().__init__(config, mesh)
        sizes, J = config.hidden_sizes, config.stages
        self.stem = Stem(config.channels, sizes[0], lambda size: LayerNorm(size, config.norm_eps))
        self.position = param((config.tokens_per_example, sizes[0]), (None, "embed"), Normal(0.02))
        self.layer_ids = tuple(tuple(range(i * J, (i + 1) * J)) for i in range(len(sizes)))
        self.rows = nnx.List([stack(self._node(i), ids) for i, ids in enumerate(self.layer_ids)])
        self.head = PooledHead(sizes[-1], config.num_classes, config.norm_eps)

    def __call__(
        self, batch: dict[str, Array], *, valid=None, train=False, step=None, key=None, record=False
    ) -> tuple[Float[Array, "B C"], ModelAux]:
        """Logits and Aux of `batch["images"]`, uint8 [B, side, side, channels]. Terms of each node: "cost" and "full",
        what the gates say of its FLOPs and what they are at most; with `record` "depth_gate" [B, S] and, but in the
        last row, "scale_gate" [B, S / 4].
        """
        x = self.stem(light(batch["images"], jnp.dtype(self.config.dtype)))
        B, J = x.shape[0], self.config.stages
        x = x.reshape(B, -1, x.shape[-1]) + self.position[...].astype(x.dtype)
        valid = jnp.ones(B, bool) if valid is None else valid
        # before the first stage: nothing but the image's tokens at the finest scale, and every token still there
        empty = [
            jnp.zeros((B, v.height * v.width, D), x.dtype) for v, D in zip(self.config.views, self.config.hidden_sizes)
        ]
        carry = ([x, *empty[1:]], [jnp.ones(e.shape[:2], bool) for e in empty])
        run = lambda carry, nodes, j, capacity: self._stage(carry, nodes, j, key, valid, record, capacity)
        if self.capacities is None:
            body = lambda carry, xs: run(carry, *xs, None)
            (arrived, _), auxes = jax.lax.scan(body, carry, (list(self.rows), jnp.arange(J)))
        else:
            told = []
            for j in range(J):
                nodes = [jax.tree.map(lambda a, j=j: a[j], node) for node in self.rows]
                capacity = [(d[j], s[j]) for d, s in zip(self.capacities.depth, self.capacities.scale)]
                carry, auxes = run(carry, nodes, j, capacity)
                told.append(auxes)
            arrived, auxes = carry[0], jax.tree.map(lambda *a: jnp.stack(a), *told)
        return self.head(arrived[-1]), collected(
            {f"rows.{i}": pair for i, pair in enumerate(zip(self.layer_ids, auxes))}
        )

    def _stage(self, carry, nodes, j, key, valid, record, capacities):
        """(carry behind stage j, the Aux of its nodes)."""
        arrived, alive = carry
        out, alive_out, auxes, down = [], [], [], 0.0
        for i, (node, view) in enumerate(zip(nodes, self.config.views)):
            depth_key, scale_key = (
                (None, None) if key is None else jax.random.split(jax.random.fold_in(key, 1000 * i + j))
            )
            x = arrived[i] + down
            depth_cap, scale_cap = (None, None) if capacities is None else capacities[i]
            with jax.named_scope("gates"):
                depth_BS = node.depth(x, j, depth_key)
                if self.config.early_exit:
                    depth_BS = jnp.where(alive[i], depth_BS, 0)
            out.append(node.through(x, depth_BS, depth_cap))
            alive_out.append(depth_BS > OPEN)
            scale_BU = None
            if node.sizes[1] is not None:
                fours_BUF = fours(x, view)
                mean_BUD = fours_BUF.reshape(*fours_BUF.shape[:2], 4, -1).mean(2)
                scale_BU = node.scale(mean_BUD, j, scale_key)
                down = node.down(fours_BUF, scale_BU, scale_cap)
            auxes.append(_told(node, depth_BS, scale_BU, valid, record, depth_cap, scale_cap))
        return (out, alive_out), auxes

    def blocks(self):
        for i, row in enumerate(self.rows):
            yield f"rows.{i}", row, self.layer_ids[i]

    def flops_per_example(self) -> float:
        """With every gate open; what was open of a data set is in a score's `layers`."""
        nodes = 0.0
        for i, view in enumerate(self.config.views):
            node, S = self._node(i), view.height * view.width
            nodes += node.block_flops(S, S) + node.down_flops(S // 4) + node.gate_flops(S)
        return self.config.stages * nodes + self.fixed_flops()

    def fixed_flops(self) -> float:
        """Forward FLOPs of an example outside the nodes."""
        config = self.config
        head = 2 * config.hidden_sizes[-1] * config.num_classes
        return config.tokens_per_example * self.stem.flops_per_token + head

    def with_capacities(self, capacities: Capacities | None) -> "DynTokenRoutingViT":
        """The model with the same arrays and those capacities; None: everything is computed."""
        other = nnx.merge(*nnx.split(self))
        other.capacities = capacities
        return other

    def calibrated(self, batches: Iterable[dict[str, Array]], kappa: float = 1.25) -> "DynTokenRoutingViT":
        """With the capacities ceil(kappa * mean of open tokens) of each node on these batches of fields."""
        shares, count, key = None, 0, jax.random.key(0)
        run = jax.jit(lambda model, batch: [aux.stats for _, aux in model(batch, key=key)[1].layers.values()])
        for batch in batches:
            told = [{name: np.asarray(s.value()) for name, s in stats.items()} for stats in run(self, batch)]
            shares = told if shares is None else [{n: a[n] + b[n] for n in a} for a, b in zip(shares, told)]
            count += 1
        if not count:
            raise ValueError("batches: expected at least one to calibrate on")
        sizes = [view.height * view.width for view in self.config.views]
        take = lambda share, size: max(1, min(size, math.ceil(round(kappa * float(share) / count * size, 6))))
        depth = tuple(tuple(take(v, S) for v in row["depth_share"]) for row, S in zip(shares, sizes))
        scale = [tuple(take(v, S // 4) for v in row["scale_share"]) for row, S in zip(shares[:-1], sizes)]
        return self.with_capacities(Capacities(depth, (*scale, (0,) * self.config.stages)))

    def _node(self, i: int) -> Node:
        config = self.config
        sizes = (*config.hidden_sizes, None)
        return Node(
            config.gate, hidden_size=sizes[i], coarse=sizes[i + 1], num_heads=config.num_heads[i],
            mlp_ratio=config.mlp_ratio, kv_all=config.kv_all, eps=config.norm_eps,
            out_scale=(2 * config.stages) ** -0.5,
        )  # fmt: skip


def _told(node: Node, depth_BS, scale_BU, valid: Bool[Array, "B"], record, depth_cap, scale_cap) -> Aux:
    """A node's terms and statistics."""
    S = depth_BS.shape[1]
    weight = lambda gate: valid[:, None] / (jnp.maximum(valid.sum(), 1) * gate.shape[1])
    mean = lambda gate: (gate * weight(gate)).sum()
    rows = lambda value_B: Stat.mean(jnp.where(valid, value_B, 0).sum(), valid.sum().astype(jnp.float32))
    opens = lambda gate: (gate > OPEN).sum(1).astype(jnp.float32)
    used = lambda gate, cap: opens(gate) if cap is None else jnp.minimum(opens(gate), cap)
    full_block, full_down = node.block_flops(S, S), node.down_flops(S // 4)
    cost = mean(depth_BS) * full_block
    flops_B = node.block_flops(used(depth_BS, depth_cap), S) + node.gate_flops(S)
    stats, terms = {"depth_share": rows(opens(depth_BS) / S), "depth_gate_mean": rows(depth_BS.mean(1))}, {}
    over_B = opens(depth_BS) - used(depth_BS, depth_cap)
    if scale_BU is not None:
        cost += mean(scale_BU) * full_down
        flops_B += node.down_flops(used(scale_BU, scale_cap))
        stats |= {"scale_share": rows(opens(scale_BU) / (S // 4)), "scale_gate_mean": rows(scale_BU.mean(1))}
        over_B += opens(scale_BU) - used(scale_BU, scale_cap)
    stats |= {"flops": rows(flops_B)} | ({} if depth_cap is None else {"overflow": rows(over_B)})
    terms = {"cost": cost, "full": jnp.float32(full_block + full_down)}
    if record:
        terms |= {"depth_gate": depth_BS} | ({} if scale_BU is None else {"scale_gate": scale_BU})
    return Aux(terms=terms, stats=jax.lax.stop_gradient(stats))
