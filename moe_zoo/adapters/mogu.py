"""MoGU (Du et al., NeurIPS 2024): a responder that refuses and one that complies, mixed token by token by two routers.

    alpha, beta = sigmoid(x W_r + c)        weights of the unwilling (expert 0) and of the glad responder (expert 1)
    y = (alpha + beta) y0 + alpha s (x A_0) B_0 + beta s (x A_1) B_1

beside the attention's output projection. A gate weighs a whole variant of the layer, base and LoRA: nothing makes
alpha + beta 1, and the base's output is scaled by it. Three stages, each begun from the run before:

    stage "glad"    beta = 1, alpha = 0; B_1, A_1 train with the ratio of losses (objective `answer_ratio`)
    stage "unwill"  alpha = 1, beta = 0; A_0, B_0 train likewise
    stage "route"   responders stay; the routers train with the task's loss and
                    router_coef * mean (alpha - label)^2 + (beta - (1 - label))^2   over layers and all tokens

where label is 1 for sequences of `unsafe_domains`. When text is generated the adapters act for the prompt and the first
`decoded_tokens` tokens; then the base goes on alone, with a cache of its own (`inference.generate`).

W_r and c begin at zero: alpha = beta = 1/2, the base and the mean of both responders. The authors' router is three
linear maps without anything between them, D to `d_router` to D to 1: one affine map in other coordinates, which is what
is applied here, so all there is to compute for a token is [x A_0, x A_1, x W_r].
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_zoo.adapters.routed import Routed, RoutedConfig, gate_stats, mean_over_valid
from moe_zoo.core.aux import Aux
from moe_zoo.core.param import Constant, Frozen, Uniform, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import linear_logits

_RESPONDERS = ("unwill", "glad")  # by their expert's number


@dataclasses.dataclass(frozen=True)
class MoguConfig(RoutedConfig):
    """`gate` "softmax": alpha + beta = 1. `d_router`: the authors' factors (512 for them); None: W_r itself.
    `router_coef` lambda. `unsafe_domains`: ids of the data's domains that the unwilling responder is to answer; tokens
    of no domain have no label. `decoded_tokens` m; None: the adapters act throughout.
    """

    target_modules: tuple[str, ...] = ("mixer.o",)
    num_experts: int = 2
    freeze_experts: bool = True
    stage: Literal["unwill", "glad", "route"] = "route"
    gate: Literal["sigmoid2", "softmax"] = "sigmoid2"
    d_router: int | None = None
    router_coef: float = 2.0
    unsafe_domains: tuple[int, ...] = ()
    decoded_tokens: int | None = 5

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "d_router")
        positive(self, path, "router_coef", "decoded_tokens", zero=True)
        if self.num_experts != 2:
            raise ConfigError(f"{join(path, 'num_experts')}: {self.num_experts}; there are two responders")
        if self.stage != "route" and self.freeze_experts:
            raise ConfigError(f"{join(path, 'freeze_experts')}: true; in stage {self.stage!r} a responder is trained")
        if self.stage == "route" and self.router_coef and not self.unsafe_domains:
            raise ConfigError(
                f"{join(path, 'unsafe_domains')}: empty; router_coef={self.router_coef} needs the ids of the data's "
                "domains that the unwilling responder is to answer, (1,) say"
            )

    @property
    def adapted_tokens(self) -> int | None:
        return self.decoded_tokens if self.stage == "route" else None


class Mogu(Routed):
    """MoGU: an unwilling and a glad responder, each with a router of its own, for the first decoded tokens."""

    Config = MoguConfig

    def add_router(self) -> None:
        E, _, D, _ = self.dims
        H, inputs = self.config.d_router, self.linear.axes[0]
        kind = nnx.Param if self.config.stage == "route" else Frozen
        # of the three maps the last begins at zero: gradients reach the others from the second step on
        self.router = param((D, E), (inputs if H is None else None, "expert_logits"), Constant(0.0), kind=kind)
        self.bias = param((E,), ("expert_logits",), Constant(0.0), kind=kind)
        if H is not None:
            self.down = param((E, D, H), ("expert_logits", inputs, None), Uniform(1 / math.sqrt(D)), kind=kind)
            self.up = param((E, H, D), ("expert_logits", None, None), Uniform(1 / math.sqrt(H)), kind=kind)
            self.up_bias = param((E, D), ("expert_logits", None), Constant(0.0), kind=kind)

    def __call__(self, x_TD, y_TN, w_DN, ctx):
        x_TD = self.dropped(x_TD, ctx)
        hidden_TER = self.hidden(x_TD)
        gates_TE, aux = self.gate(x_TD, hidden_TER, ctx)
        of_base_T1 = jnp.where(self.live().any(), gates_TE.sum(-1, keepdims=True), 1)
        return of_base_T1.astype(y_TN.dtype) * y_TN + self.out(hidden_TER, gates_TE), aux

    def gate(self, x_TD, hidden_TER, ctx):
        on = self.live().any().astype(jnp.float32)
        if self.config.stage != "route":
            gates_TE = jnp.broadcast_to(jnp.eye(2)[_RESPONDERS.index(self.config.stage)], (x_TD.shape[0], 2))
            return gates_TE, Aux(stats=gate_stats(gates_TE, None, ctx, on))
        w_DE, c_E = self.affine()
        squash = jax.nn.sigmoid if self.config.gate == "sigmoid2" else jax.nn.softmax
        gates_TE = squash(linear_logits(x_TD, w_DE) + c_E)
        losses = {f"adapter_{name}": on * value for name, value in self.losses(gates_TE, gates_TE, ctx).items()}
        return gates_TE, Aux(losses=losses, stats=gate_stats(gates_TE, None, ctx, on))

    def affine(self) -> tuple[Float[Array, "D E"], Float[Array, "E"]]:
        """W_r and c, of the three maps if there are three."""
        w_DE, c_E = self.router[...], self.bias[...]
        if self.config.d_router is None:
            return w_DE, c_E
        w_EH = jnp.einsum("ehk,ke->eh", self.up[...], w_DE)
        return jnp.einsum("edh,eh->de", self.down[...], w_EH), c_E + jnp.einsum("ek,ke->e", self.up_bias[...], w_DE)

    def losses(self, probs_TE, gates_TE, ctx):
        """The squared distance to the labels, a mean over tokens of a known domain; of all layers together, since each
        adds its share.
        """
        c = self.config
        if ctx.domain is None or not c.router_coef:
            return {}
        unsafe_T = jnp.isin(ctx.domain, jnp.asarray(c.unsafe_domains)).astype(jnp.float32)
        label_TE = jnp.stack([unsafe_T, 1 - unsafe_T], axis=-1)
        known_T = ctx.domain >= 0
        known = ctx.replace(valid=known_T if ctx.valid is None else known_T & ctx.valid)
        layers = self.linear.num_layers if c.layers_to_transform is None else len(c.layers_to_transform)
        return {"label": c.router_coef / layers * mean_over_valid(((gates_TE - label_TE) ** 2).sum(-1), known)}

    def held(self) -> dict[str, Bool[Array, "E 1 1"]]:
        if self.config.stage == "route":
            return {}
        other_E11 = (jnp.arange(2) != _RESPONDERS.index(self.config.stage))[:, None, None]
        return {"a": other_E11, "b": other_E11}

    def merged(self, w_DN, weights_E=None):
        return self._of_base(weights_E) * w_DN + self.delta(weights_E)

    def unmerged(self, w_DN, weights_E=None):
        return (w_DN - self.delta(weights_E)) / self._of_base(weights_E)

    def _of_base(self, weights_E) -> Float[Array, ""]:
        """What the base is multiplied by under these gates."""
        total = 2.0 if weights_E is None else weights_E.sum()
        return jnp.where(self.live().any(), total, 1)

    def idle_parameters(self) -> int:
        _, R, D, N = self.dims
        live_LER = self.config.scales(self.linear) != 0
        if self.config.stage == "route":
            H = self.config.d_router
            router = 2 * (D + 1 + (0 if H is None else 2 * D * H + D))
            idle = int((~live_LER.any((1, 2))).sum()) * router
            return idle if self.config.freeze_experts else idle + self._idle_ranks()
        # of the responder that waits nothing moves
        return self._idle_ranks() + int(live_LER[:, 0].sum()) * (D + N)

    def _idle_ranks(self) -> int:
        _, _, D, N = self.dims
        return int((self.config.scales(self.linear) == 0).sum()) * (D + N)
