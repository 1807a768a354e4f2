"""X-LoRA (Buehler and Buehler, arXiv 2402.07148): a first pass through the model says how the second mixes its LoRAs.

    h_t: the last hidden state of token t in a pass where every gate is `scaling_pass_value` (0: the base alone)
    G = softmax((h W + c) / temperature) over the E experts, one for all linear layers or one for each
    y = y0 + sum_e G_te s_e (x_t A_e) B_e

Experts are LoRAs that were trained before and stay as they are; what trains is W and c. A token's gates come from its
own place, so text can be generated, but both passes keep a cache, and the model runs twice. No gradient goes through
the first pass.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from moe_zoo.adapters.adapter import Adapter
from moe_zoo.adapters.routed import Routed, RoutedConfig, gate_stats, largest
from moe_zoo.adapters.shared import SharedAdapters
from moe_zoo.adapters.targets import Linear
from moe_zoo.core.aux import Aux
from moe_zoo.core.param import Uniform, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import linear_logits


@dataclasses.dataclass(frozen=True)
class XLoraConfig(RoutedConfig):
    """Names are PEFT's. `layerwise_scalings`: gates for each linear layer of each layer. `top_k_lora`: only the so many
    largest gates are kept; with `enable_softmax_topk` another softmax is taken of those, of the gates and not of their
    logits, as PEFT does. The classifier has one layer.
    """

    freeze_experts: bool = True
    layerwise_scalings: bool = False
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    enable_softmax_topk: bool = False
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0

    def validate(self, path: str) -> None:
        super().validate(path)
        positive(self, path, "softmax_temperature", "top_k_lora")
        if self.top_k_lora is not None and self.top_k_lora > self.num_experts:
            raise ConfigError(f"{join(path, 'top_k_lora')}: {self.top_k_lora} of num_experts={self.num_experts}")


class XLoraClassifier(SharedAdapters):
    """One for the whole model: the first pass's gates, and those that it leads to, each [layers, linear layers, T, E];
    an axis of size 1 stands for all.
    """

    two_passes = True

    def __init__(self, config: XLoraConfig, linears: Sequence[Linear], *, num_layers: int, hidden_size: int):
        D, E = hidden_size, config.num_experts
        self.config = config
        places = 1 + max(linear.place for linear in linears)
        self.shape = (num_layers, places) if config.layerwise_scalings else (1, 1)
        size = math.prod(self.shape) * E
        self.kernel = param((D, size), ("embed", "expert_logits"), Uniform(1 / math.sqrt(D)))
        self.bias = param((size,), ("expert_logits",), Uniform(1 / math.sqrt(D)))

    def first(self, instructions: Array | None) -> Float[Array, "1 1 1 E"]:
        """The gates of the first pass."""
        return jnp.full((1, 1, 1, self.config.num_experts), self.config.scaling_pass_value, jnp.float32)

    def second(self, h_BSD: Float[Array, "B S D"]) -> Float[Array, "L N T E"]:
        """The gates that follow from the last hidden states of the first."""
        c = self.config
        h_TD = jax.lax.stop_gradient(h_BSD).reshape(-1, h_BSD.shape[-1])
        logits = linear_logits(h_TD, self.kernel[...]) + self.bias[...]
        gates_TX = jax.nn.softmax(logits.reshape(-1, c.num_experts) / c.softmax_temperature)
        if c.top_k_lora is not None:
            kept = largest(gates_TX, c.top_k_lora)
            again = jax.nn.softmax(jnp.where(kept, gates_TX, -jnp.inf)) if c.enable_softmax_topk else gates_TX
            gates_TX = jnp.where(kept, again, 0)
        return jnp.moveaxis(gates_TX.reshape(-1, *self.shape, c.num_experts), 0, 2)

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token; multiply-adds count two."""
        return 2 * self.kernel.get_value().size


class XLora(Routed):
    """X-LoRA: frozen LoRAs, mixed token by token as the model's own last hidden state says; two passes."""

    Config = XLoraConfig

    def add_router(self) -> None:
        """What decides is the model's, not the layer's."""

    @classmethod
    def make_shared(cls, config, linears, *, num_layers, hidden_size):
        return XLoraClassifier(config, linears, num_layers=num_layers, hidden_size=hidden_size)

    def gate(self, x_TD, hidden_TER, ctx):
        gates = ctx.shared["adapters"]
        layers, names, _, E = gates.shape
        row = gates[ctx.layer if layers > 1 else 0]
        gates_TE = row[self.linear.place if names > 1 else 0]
        gates_TE = jnp.broadcast_to(gates_TE, (x_TD.shape[0], E)) * self.config.global_scaling_weight
        on = self.live().any().astype(jnp.float32)
        return gates_TE, Aux(stats=gate_stats(gates_TE, None, ctx, on))

    def idle_parameters(self) -> int:
        return Adapter.idle_parameters(self)

    def flops_per_token(self) -> int:
        return Adapter.flops_per_token(self)
