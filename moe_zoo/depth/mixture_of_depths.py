"""Mixture of depths (Raposo et al., arXiv 2404.02258): a router scores all tokens, the block takes a sequence's best.

    r_i = x_i . w;   T = the C largest r of the sequence;   x_i + r_i (block(x[T])_i - x_i) for i in T, x_i else

Whether a token is among the C best depends on later ones, so at inference another rule decides, token by token:

    "predictor"   SiLU(x A_1) A_2 > 0, behind a stop-gradient: the model feels nothing of it
    "aux_loss"    r > 0: the router itself learns it, and what it scores changes a little

Both learn by binary cross-entropy who the C best are. The weight is r either way.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.core.aux import Aux, Stat
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.param import Normal, fan_in, param
from moe_zoo.core.schema import positive
from moe_zoo.depth.selector import Selection, Selector, SelectorConfig
from moe_zoo.routing.router import at_least_f32

_COEF = {"predictor": 1.0, "aux_loss": 0.01}


@dataclasses.dataclass(frozen=True)
class MixtureOfDepthsConfig(SelectorConfig):
    """`sampling`: what decides at inference. `coef` multiplies the cross-entropy of a layer; None: 1 for a predictor,
    whose parameters are its own, 0.01 for the router. `weight`: r, or sigmoid(r) (MoMa, arXiv 2407.21770). `best_of`:
    with whom a token competes in training, its sequence or the batch (MoMa).
    """

    sampling: Literal["predictor", "aux_loss"] = "predictor"
    weight: Literal["score", "sigmoid"] = "score"
    coef: float | None = None
    init_std: float = 0.02
    best_of: Literal["sequence", "batch"] = dataclasses.field(default="sequence", metadata={"silent": True})

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "init_std")
        positive(self, path, "coef", zero=True)


class MixtureOfDepths(Selector):
    """MoD: the tokens with the highest scores go through, and their scores weight what the block adds."""

    Config = MixtureOfDepthsConfig

    def __init__(self, config: MixtureOfDepthsConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        D, hidden = hidden_size, max(1, hidden_size // 2)
        self.over_batch = config.best_of == "batch"
        self.kernel = param((D,), ("embed",), Normal(config.init_std))
        if config.sampling == "predictor":
            self.predict_in = param((D, hidden), ("embed", None), fan_in(D))
            self.predict_out = param((hidden,), (None,), fan_in(hidden))

    def __call__(self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext) -> Selection:
        x_BSD = at_least_f32(x_BSD)
        scores_BS = logits_BS = x_BSD @ at_least_f32(self.kernel[...])
        if self.config.sampling == "predictor":
            hidden_BSH = jax.nn.silu(jax.lax.stop_gradient(x_BSD) @ at_least_f32(self.predict_in[...]))
            logits_BS = hidden_BSH @ at_least_f32(self.predict_out[...])
        weights_BS = scores_BS if self.config.weight == "score" else jax.nn.sigmoid(scores_BS)
        return Selection(scores_BS, logits_BS > 0, weights_BS, logits_BS)

    def learn(self, selection: Selection, best_BS, valid_BS) -> Aux:
        """Binary cross-entropy to the C best, the mean over real tokens; F1, as few are chosen: always no is right for
        most.
        """
        logits_BS, count = selection.logits, lambda hit_BS: (hit_BS & valid_BS).sum().astype(jnp.float32)
        nats_BS = jax.nn.softplus(logits_BS) - jnp.where(best_BS, logits_BS, 0)
        loss = jnp.where(valid_BS, nats_BS, 0).sum() / jnp.maximum(valid_BS.sum(), 1)
        agreed = 2 * count(selection.chosen & best_BS)
        stats = {
            f"depth_{self.config.sampling}": Stat.average(jax.lax.stop_gradient(loss)),
            "depth_f1": Stat.mean(agreed, count(selection.chosen) + count(best_BS)),
        }
        coef = _COEF[self.config.sampling] if self.config.coef is None else self.config.coef
        return Aux(losses={f"depth_{self.config.sampling}": coef * loss}, stats=stats)

    def flops_per_token(self) -> float:
        D, hidden = self.hidden_size, max(1, self.hidden_size // 2)
        return 2 * D + (2 * hidden * (D + 1) if self.config.sampling == "predictor" else 0)
