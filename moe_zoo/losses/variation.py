"""The two balance losses of noisy top-k gating (arXiv 1701.06538, section 4 and appendix A).

    CV(v)^2 = variance of v over experts / squared mean
    importance: v_e = sum over tokens of the gate of e          equal weight
    expected load: v_e = sum over tokens of the chance of e     equal numbers of tokens

Both are of the micro-batch, whatever devices hold it, and 0 at balance. Per layer; layers add up.
"""

import dataclasses
from typing import ClassVar

from jaxtyping import Array, Float

from moe_zoo.core.context import Routing, RoutingContext
from moe_zoo.core.decision import TokenChoice
from moe_zoo.core.schema import positive


@dataclasses.dataclass(frozen=True)
class VariationConfig:
    """`coef` multiplies the loss of each layer (paper: 0.1 for either loss)."""

    coef: float = 0.1

    def validate(self, path: str) -> None:
        positive(self, path, "coef", zero=True)


@dataclasses.dataclass(frozen=True)
class Importance:
    """Squared coefficient of variation of the experts' summed gates: equal weight for all."""

    Config: ClassVar = VariationConfig
    decisions: ClassVar = (TokenChoice,)
    uses: ClassVar = "probs"  # of which the gates are made: those of a router without any have no gradient

    config: VariationConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        return cv_squared(routing.decision.dense().gates.sum(0))


@dataclasses.dataclass(frozen=True)
class ExpectedLoad:
    """Squared coefficient of variation of the experts' smooth load, which only noisy top-k knows."""

    Config: ClassVar = VariationConfig
    decisions: ClassVar = (TokenChoice,)
    uses: ClassVar = "expected_load"

    config: VariationConfig

    def __call__(self, routing: Routing, ctx: RoutingContext) -> Float[Array, ""]:
        """The raw loss, without the coefficient."""
        return cv_squared(routing.aux.terms["expected_load"])


def cv_squared(v_E: Float[Array, "E"]) -> Float[Array, ""]:
    """Variance over squared mean; 0 if all are 0."""
    return v_E.var() / (v_E.mean() ** 2 + 1e-10)
