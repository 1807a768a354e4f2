"""LoRA (Hu et al., arXiv 2106.09685): one low-rank update per linear layer, y = x W + s (x A) B, s = alpha / r.

`use_rslora`: s = alpha / sqrt(r), so that the update's size does not fall with the rank (arXiv 2312.03732).
`use_dora` (Liu et al., arXiv 2402.09353): the updated weight's columns, one per output, get a trained length,

    y = m * x (W + s A B) / ||W + s A B||        norms of columns, no gradient through them (section 4.3)

m begins as ||W||. What is trained is `magnitude` = m - ||W||: the same steps, and weight decay pulls to the base.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.experts import ExpertLora
from moe_zoo.adapters.targets import AdapterConfig, Linear
from moe_zoo.core.aux import Aux
from moe_zoo.core.param import Constant, param
from moe_zoo.core.registry import ConfigError


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterConfig):
    """`use_dora`: magnitude and direction apart."""

    use_dora: bool = False


class Lora(Adapter):
    """LoRA, rsLoRA and DoRA: one low-rank update for all tokens."""

    Config = LoraConfig

    def __init__(self, config: LoraConfig, linear: Linear):
        super().__init__(config, linear)
        if config.use_dora:
            self.magnitude = param((linear.out_features,), (linear.axes[1],), Constant(0.0))

    @classmethod
    def beside_experts(cls, config: LoraConfig, linear: Linear) -> ExpertLora:
        if config.use_dora or config.lora_dropout:
            raise ConfigError(
                f"model.adapters: {linear.name!r} is of routed experts; beside those there is neither DoRA nor dropout"
            )
        return ExpertLora(config, linear)

    def __call__(self, x_TD, y_TN, w_DN, ctx):
        if not self.config.use_dora:
            return super().__call__(x_TD, y_TN, w_DN, ctx)
        seen_TD = self.dropped(x_TD, ctx)
        delta_TN = self.out(self.hidden(seen_TD), None)
        length_N = self.length(w_DN).astype(y_TN.dtype)
        # PEFT drops the base's input as well where its direction is scaled; without dropout it is the formula above
        base_TN = y_TN if seen_TD is x_TD else seen_TD @ w_DN
        return y_TN + (length_N - 1) * base_TN + length_N * delta_TN, Aux()

    def length(self, w_DN: Float[Array, "D N"]) -> Float[Array, "N"]:
        """m / ||W + s A B||; 1 where a layer is no target."""
        w_DN = w_DN.astype(self.b[...].dtype)
        now_N = jax.lax.stop_gradient(jnp.linalg.norm(w_DN + self.delta(), axis=0))
        length_N = (jnp.linalg.norm(w_DN, axis=0) + self.magnitude[...]) / jnp.maximum(now_N, 1e-30)
        return jnp.where((self.scale[...] != 0).any(), length_N, 1)

    def merged(self, w_DN: Float[Array, "D N"], weights_E: Array | None = None) -> Float[Array, "D N"]:
        if not self.config.use_dora:
            return super().merged(w_DN, weights_E)
        return self.length(w_DN) * (w_DN + self.delta())

    def unmerged(self, w_DN: Float[Array, "D N"], weights_E: Array | None = None) -> Float[Array, "D N"]:
        if not self.config.use_dora:
            return super().unmerged(w_DN, weights_E)
        raise ConfigError(
            "unmerge: DoRA rescales the base, whose lengths the merged weight does not keep; keep the base"
        )

    def idle_parameters(self) -> int:
        idle = super().idle_parameters()
        if self.config.use_dora:
            layers = (self.config.scales(self.linear) == 0).all((1, 2))
            idle += int(layers.sum()) * self.linear.out_features
        return idle
