"""Low-rank experts beside a frozen linear layer, and the adapters of one block.

    y = y0 + sum_e G_te s_e (x_t A_e) B_e        A_e [R, D], B_e [R, N], s_e a number per rank, G the gates

One LoRA (arXiv 2106.09685) has one expert and G = 1. The mixtures differ in G, in what trains it and in what experts
share: a file per idea holds that and nothing else. All experts are two matrix products, with the gates between them:
((x A) * G s) B, A and B being all experts' ranks side by side. Parameters of the base are frozen.

T tokens, D and N the layer's input and output, E experts, R ranks of one.
"""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_zoo.adapters.experts import ExpertLora
from moe_zoo.adapters.shared import SharedAdapters
from moe_zoo.adapters.targets import AdapterConfig, Linear, check_patterns, linear_layers
from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import ByLayer, Constant, Frozen, Uniform, freeze, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import Choice
from moe_zoo.layers.tap import below
from moe_zoo.routing.router import gather_gates
from pallas_kernels.low_rank import from_ranks, grouped_pays, low_rank_matmul, to_ranks


class Adapter(nnx.Module):
    """The experts beside one linear layer. A subclass writes `gate`, unless G = 1."""

    Config: ClassVar[type] = AdapterConfig
    #: all experts have one A
    shared_a: ClassVar[bool] = False
    #: after how many steps `refreshed` is asked; 0: never
    refresh_every: ClassVar[int] = 0
    #: each expert is what LoRA calls an adapter: one that was trained alone can take its place
    takes_loras: ClassVar[bool] = True
    #: `gate` looks at `hidden_TER`
    reads_hidden: ClassVar[bool] = False

    def __init__(self, config: AdapterConfig, linear: Linear, *, kind: type = nnx.Param):
        """`kind`: of the experts' parameters, `Frozen` for those that were trained elsewhere."""
        scales = config.scales(linear)
        _, E, R = scales.shape
        D, N = linear.in_features, linear.out_features
        self.config, self.linear, self.dims = config, linear, (E, R, D, N)
        # kaiming-uniform with a = sqrt(5), as PEFT draws it
        axes = ("adapter", None, linear.axes[0])
        self.a = param((1 if self.shared_a else E, R, D), axes, Uniform(1 / math.sqrt(D)), kind=kind)
        self.b = param((E, R, N), ("adapter", None, linear.axes[1]), Constant(0.0), kind=kind)
        self.scale = param((E, R), ("adapter", None), ByLayer(linear.layers, scales), kind=Frozen)

    @property
    def num_experts(self) -> int:
        return self.dims[0]

    def __call__(
        self, x_TD: Float[Array, "T D"], y_TN: Float[Array, "T N"], w_DN: Float[Array, "D N"], ctx: RoutingContext
    ) -> tuple[Float[Array, "T N"], Aux]:
        """The layer's output with the experts' on top, and what there is to say of the gates."""
        x_TD = self.dropped(x_TD, ctx)
        hidden_TER = self.hidden(x_TD)
        gates_TE, aux = self.gate(x_TD, hidden_TER, ctx)
        if self._is_plain() and ctx.mesh is None:
            return self._product(x_TD, y_TN, gates_TE), aux
        return y_TN + self.out(hidden_TER, gates_TE), aux

    def _is_plain(self) -> bool:
        """Whether the product is this class's own, and nothing of it has been used before."""
        cls = type(self)
        own = cls.hidden is not Adapter.hidden or cls.out is not Adapter.out
        return not (own or self.shared_a or self.reads_hidden)

    def _product(self, x_TD, y_TN, gates_TE):
        """y + sum_e G_te (x A_e) s_e B_e on one device. Nothing needs `hidden_TER`: the program does not have it."""
        E, R, _, _ = self.dims
        if gates_TE is None:
            gates_TE = jnp.ones((x_TD.shape[0], E), x_TD.dtype)
        b_ERN = self.b[...] * self.scale[...][:, :, None]
        operands = x_TD, self.a[...].astype(x_TD.dtype), b_ERN.astype(x_TD.dtype)
        K = self.most_gates()
        if K is None or not grouped_pays(E, R, K):
            return low_rank_matmul(*operands, gates_TE, onto_TN=y_TN)
        ids_TK = jax.lax.top_k(jax.lax.stop_gradient(jnp.abs(gates_TE)), K)[1]
        return low_rank_matmul(*operands, gather_gates(gates_TE, ids_TK), ids_TK, onto_TN=y_TN, form="grouped")

    def most_gates(self) -> int | None:
        """How many gates of a token are not zero at most; the others must have no gradient either. None: all."""
        return None

    def gate(
        self, x_TD: Float[Array, "T D"], hidden_TER: Float[Array, "T E R"], ctx: RoutingContext
    ) -> tuple[Float[Array, "T E"] | None, Aux]:
        """G, None for ones, with its losses and statistics. `hidden_TER`: x A s of every expert."""
        return None, Aux()

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New values of buffers after an optimizer step, given the block's reduced statistics."""
        return {}

    def begun(self) -> dict[str, Array]:
        """New values of buffers with which a run begins from the weights of another."""
        return {}

    def steered(self, values: dict[str, Array], where: Literal["gradients", "updates"]) -> dict[str, Array]:
        """Gradients of own parameters as the optimizer is to see them, or its updates as they are to be added: those of
        `values`, by name, that change.
        """
        return {}

    def held(self) -> dict[str, Bool[Array, "..."]]:
        """Which numbers of own parameters, by name, stay as they are in this step, and their moments with them."""
        return {}

    def refreshed(self) -> dict[str, Array]:
        """New values of buffers that cost too much for every step: those of each `refresh_every`-th."""
        return {}

    def from_experts(
        self,
        a_ERD: Float[np.ndarray, "E R D"],
        b_ERN: Float[np.ndarray, "E R N"],
        scale_ER: Float[np.ndarray, "E R"],
    ) -> dict[str, np.ndarray]:
        """Values of one layer's variables that follow from experts that were trained before."""
        return {}

    @classmethod
    def beside_experts(cls, config: AdapterConfig, linear: Linear) -> ExpertLora:
        """What acts beside a linear layer of a routed layer's experts; raises ConfigError if nothing of this kind."""
        raise ConfigError(
            f"model.adapters.target_modules: {linear.name!r} is of experts that are routed already; beside those "
            "'lora' has one update for each"
        )

    @classmethod
    def make_shared(
        cls, config: AdapterConfig, linears: Sequence[Linear], *, num_layers: int, hidden_size: int
    ) -> SharedAdapters | None:
        """What the adapters of all layers of a model have in common, if there is such a thing, given the linear layers
        that have one, block by block.
        """
        return None

    @classmethod
    def feed_forward(cls, mlp, x: Float[Array, "... D"], tapped: "Tapped") -> Float[Array, "... D"]:
        """A block's dense feed-forward part with the adapters that are beside its linear layers."""
        beside = any(name.startswith("ffn.") for name, _ in tapped.adapters.items())
        return mlp(x, below("ffn", tapped)) if beside else mlp(x)

    def dropped(self, x_TD, ctx: RoutingContext):
        """The input as the experts see it: with dropout while training."""
        rate = self.config.lora_dropout
        if not (rate and ctx.train and ctx.key is not None):
            return x_TD
        key = jax.random.fold_in(ctx.key, zlib.crc32(self.linear.name.encode()))
        return jnp.where(jax.random.bernoulli(key, 1 - rate, x_TD.shape), x_TD / (1 - rate), 0).astype(x_TD.dtype)

    def hidden(self, x_TD: Float[Array, "T D"]) -> Float[Array, "T E R"]:
        """x A_e s_e of every expert."""
        _, R, D, _ = self.dims
        h_TL = to_ranks(x_TD, self.a[...].astype(x_TD.dtype).reshape(-1, D))
        return h_TL.reshape(x_TD.shape[0], -1, R) * self.scale[...].astype(x_TD.dtype)

    def out(self, hidden_TER: Float[Array, "T E R"], gates_TE: Float[Array, "T E"] | None) -> Float[Array, "T N"]:
        """sum_e G_te hidden_te B_e."""
        E, R, _, N = self.dims
        if gates_TE is not None:
            hidden_TER = hidden_TER * gates_TE[:, :, None].astype(hidden_TER.dtype)
        return from_ranks(hidden_TER.reshape(-1, E * R), self.b[...].astype(hidden_TER.dtype).reshape(E * R, N))

    def delta(self, weights_E: Float[Array, "E"] | None = None) -> Float[Array, "D N"]:
        """What is added to W if the gates are these numbers for all tokens; None: ones."""
        E, R, D, N = self.dims
        scale_ER = self.scale[...] if weights_E is None else self.scale[...] * weights_E[:, None]
        a_ERD = jnp.broadcast_to(self.a[...], (E, R, D)) * scale_ER[:, :, None]
        return a_ERD.reshape(E * R, D).T @ self.b[...].reshape(E * R, N)

    def merged(self, w_DN: Float[Array, "D N"], weights_E: Float[Array, "E"] | None = None) -> Float[Array, "D N"]:
        """The weight of the plain layer that does the same under constant gates."""
        return w_DN + self.delta(weights_E)

    def unmerged(self, w_DN: Float[Array, "D N"], weights_E: Float[Array, "E"] | None = None) -> Float[Array, "D N"]:
        """The weight that `merged` was given."""
        return w_DN - self.delta(weights_E)

    def idle_parameters(self) -> int:
        """How many trained numbers, over all layers of the stack, never move: ranks that a layer does not have."""
        if isinstance(self.b, Frozen):
            return 0
        _, _, D, N = self.dims
        idle_LER = self.config.scales(self.linear) == 0
        return int((idle_LER.all(1) if self.shared_a else idle_LER).sum()) * D + int(idle_LER.sum()) * N

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token; multiply-adds count two."""
        E, R, D, N = self.dims
        return 2 * R * ((1 if self.shared_a else E) * D + E * N)


class BlockAdapters(nnx.Dict):
    """The adapters of a block by the name of the linear layer, `mixer.q`."""

    def feed_forward(self, mlp, x, tapped: "Tapped"):
        """The dense feed-forward part, as the adapters' kind has it."""
        kinds = [type(adapter) for adapter in self.values()]
        return kinds[0].feed_forward(mlp, x, tapped) if kinds else mlp(x)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token through all of them."""
        return sum(adapter.flops_per_token() for adapter in self.values())

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New buffer values, by their path below this."""
        found = {name: adapter.after_step(stats) for name, adapter in self.items()}
        return {f"{name}.{key}": value for name, values in found.items() for key, value in values.items()}


class Tapped:
    """One call of a block: gives every linear layer its adapter and keeps what that says, until the block takes it."""

    def __init__(self, adapters: BlockAdapters, ctx: RoutingContext):
        self.adapters, self.ctx, self.said = adapters, ctx, []

    def __call__(self, name: str, x, y, w):
        if name not in self.adapters:
            return y
        flat = lambda t: t.reshape(-1, t.shape[-1])
        with jax.named_scope("adapter"):
            out, aux = self.adapters[name](flat(x), flat(y), w, self.ctx)
        self.said.append(aux)
        return out.reshape(y.shape)

    def aux(self, prefix: str = "") -> Aux:
        """What all adapters of the block said: losses add up, statistics of the same name merge. `prefix`: of their
        names, where the block has others of its own.
        """
        return Aux(
            losses=together([aux.losses for aux in self.said], lambda a, b: a + b),
            stats={f"{prefix}{n}": s for n, s in together([a.stats for a in self.said], Stat.merge).items()},
        )


def together(dicts: Sequence[dict], join) -> dict:
    """One dict of several; values of the same key are joined."""
    found = {}
    for one in dicts:
        for name, value in one.items():
            found[name] = join(found[name], value) if name in found else value
    return found


def add_adapters(
    adapters: Choice, blocks: Sequence[tuple[nnx.Module, tuple[int, ...]]], *, num_layers: int, hidden_size: int
) -> SharedAdapters | None:
    """Gives blocks that are not stacked yet their adapters, and freezes all else in them. `blocks`: each with the
    layers that it will stand for. Returns what all of them share, if there is such a thing (`make_shared`).

    Raises ConfigError, with the nearest names, if a pattern matches no linear layer.
    """
    there = [linear_layers(block, layers, num_layers) for block, layers in blocks]
    check_patterns(adapters.config, [name for found in there for linear in found for name in linear.names()])
    targets = [[one for one in found if any(map(adapters.config.targets, one.names()))] for found in there]
    names = list(dict.fromkeys(one.name for found in targets for one in found))
    targets = [[dataclasses.replace(one, place=names.index(one.name)) for one in found] for found in targets]
    for (block, _), placed in zip(blocks, targets, strict=True):
        freeze(block)
        block.adapters = BlockAdapters({one.name: adapters.make(one) for one in placed if not one.bank})
        if banks := [one for one in placed if one.bank]:
            made = {one.name: adapters.cls.beside_experts(adapters.config, one) for one in banks}
            block.ffn.experts.adapters = nnx.Dict({n.rpartition(".")[2]: adapter for n, adapter in made.items()})
    linears = [one for placed in targets for one in placed]
    return adapters.cls.make_shared(adapters.config, linears, num_layers=num_layers, hidden_size=hidden_size)
