"""Duo-LLM's bank (arXiv 2410.10846): two feed-forward networks of different widths, and perhaps nothing as a third.

    E_0 = big, of width F;   E_1 = small, of width F / ratio;   E_2(x) = 0, where there are three: the layer is skipped

Any dispatcher moves tokens here. `dropless` sorts them, and each network computes only the rows that chose it: two
calls of the grouped kernel, as widths differ. `everywhere` has both compute all tokens and weighs: 1 + 1 / ratio of
big's work, and nothing moves. The networks lie whole on every shard of a mesh's `expert` axis; `tensor` splits them.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import positive
from moe_zoo.layers.mlp import MLP, Activation, FeedForwardConfig

BIG, SMALL, SKIP = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class BigSmallConfig:
    """`ratio`: how many times wider big is than small (paper: 16). `activation`, `gated`: as in `FeedForwardConfig`."""

    ratio: int = 16
    activation: Activation = "silu"
    gated: bool = True

    def validate(self, path: str) -> None:
        positive(self, path, "ratio")


class BigSmall(nnx.Module):
    """A big and a small feed-forward network, and with three experts a third that adds nothing."""

    Config = BigSmallConfig
    quantized = False

    def __init__(
        self, config: BigSmallConfig, *, num_experts: int, hidden_size: int, intermediate_size: int, out_scale: float
    ):
        """Raises ConfigError for other than two or three experts, or a width that `ratio` does not divide."""
        E, D, F = num_experts, hidden_size, intermediate_size
        if E not in (2, 3):
            raise ConfigError(f"model.num_experts: {E}; 'big_small' is a big and a small network (2), and a skip (3)")
        if F % config.ratio:
            raise ConfigError(f"model.moe_intermediate_size: {F} does not divide by experts.ratio={config.ratio}")
        self.config, self.dims = config, (E, D, F)
        formula = FeedForwardConfig(activation=config.activation, gated=config.gated)
        self.big = MLP(formula, hidden_size=D, intermediate_size=F, out_scale=out_scale)
        self.small = MLP(formula, hidden_size=D, intermediate_size=F // config.ratio, out_scale=out_scale)

    def routed(self, x_TD: Float[Array, "T D"], plan) -> Float[Array, "T D"]:
        """Sums each token's networks by a ragged RowPlan; a network computes the rows of its group and no others."""
        one = lambda expert, mlp: plan.ffn(
            x_TD, *self._stacked(mlp, x_TD.dtype), activation=self.config.activation, group_offset=expert
        )
        return one(BIG, self.big) + one(SMALL, self.small)

    def batched(self, x_ECD: Float[Array, "E C D"]) -> Float[Array, "E C D"]:
        """The same number of rows for every expert."""
        skipped = [jnp.zeros_like(x_CD) for x_CD in x_ECD[SKIP:]]
        return jnp.stack([self.big(x_ECD[BIG]), self.small(x_ECD[SMALL]), *skipped])

    def _stacked(self, mlp: MLP, dtype) -> list:
        """The matrices of one network as those of a bank of one."""
        names = ("w_gate", "w_up", "w_down")
        return [getattr(mlp, name)[...].astype(dtype)[None] if hasattr(mlp, name) else None for name in names]

    def quantize(self) -> None:
        """Raises ConfigError: there is no int8 form."""
        raise ConfigError("model.experts: 'big_small' has no int8 form; load it without quantization")

    def flops_per_row(self) -> float:
        """Forward, the mean over the experts; multiply-adds count two. So a token that draws one of two counts as half
        of each network, and one that has both (two rows) as the whole of each.
        """
        return (self.big.flops_per_token() + self.small.flops_per_token()) / self.dims[0]
