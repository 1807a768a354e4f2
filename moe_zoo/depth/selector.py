"""What a selector says of the tokens of a sequence, and what it is asked; `blocks/selective.py` does the rest.

B batch, S sequence, D model, C tokens that go through.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from moe_zoo.core.aux import Aux
from moe_zoo.core.context import RoutingContext, keys_by_place
from moe_zoo.core.param import Frozen
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.routing.router import Shared


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selection:
    """`scores`: by what tokens of a sequence compete in training, if they do. `chosen`: who goes through at inference,
    each token by itself. `weights` w: of x + w (block(x) - x), for who goes through. `logits`: behind `chosen`, if it
    is learned. `again`: of those, who goes through twice. `seen`: who is looked at inside the block, if that is not who
    goes through; weights are then everybody's, 0 of those that stay, so that a gradient can say who should go. `cache`:
    what the selector keeps while decoding. `aux`: what it has to say already, whoever goes through.
    """

    scores: Float[Array, "B S"] | None
    chosen: Bool[Array, "B S"]
    weights: Float[Array, "B S"]
    logits: Float[Array, "B S"] | None = None
    again: Bool[Array, "B S"] | None = None
    seen: Bool[Array, "B S"] | None = None
    cache: Any = None
    aux: Aux = dataclasses.field(default_factory=Aux)


@dataclasses.dataclass(frozen=True)
class SelectorConfig:
    """`capacity`: the part of a sequence's tokens that go through in training, C = ceil(capacity S). `cache_factor`:
    while decoding there are places for cache_factor C tokens of the longest text, and tokens for which none is left
    pass the block by; None: for all of them.
    """

    capacity: float = 0.125
    cache_factor: float | None = 1.25

    def validate(self, path: str) -> None:
        positive(self, path, "capacity", "cache_factor")
        if self.capacity > 1:
            raise ConfigError(f"{join(path, 'capacity')}: {self.capacity} of a sequence's tokens; at most 1")


class Selector(nnx.Module):
    """Says which tokens go through one block. A subclass declares `Config`, builds its parameters from (config,
    hidden_size) and implements `__call__`. Its mathematics is float32 or wider.

    What it chooses at inference depends on no later token, and not on how many tokens it is shown at once. One that
    decides for whole sequences (`sequence.py`) says the same of all their tokens.
    """

    Config: ClassVar[type] = SelectorConfig
    #: in training the C best of a sequence go through; otherwise, as at inference, who is chosen
    competes: ClassVar[bool] = True
    #: they compete with those of all sequences of the batch, C of all tokens together
    over_batch: bool = False
    #: whole sequences go through or not, so that a cache has places for all of their tokens
    whole: ClassVar[bool] = False
    #: some go through twice
    repeats: ClassVar[bool] = False
    #: who passes by leaves keys and values all the same
    leaves_keys: ClassVar[bool] = False
    #: it looks at how much attention each token got in the block below, `ctx.carry["depth"]`
    reads_attention: ClassVar[bool] = False
    #: it is trained on a finished model, all of which is frozen
    retrofits: ClassVar[bool] = False

    def __init__(self, config: SelectorConfig, hidden_size: int):
        self.config, self.hidden_size = config, hidden_size

    def __call__(self, x_BSD: Float[Array, "B S D"], ctx: RoutingContext) -> Selection:
        """What it says of every token, padding included."""
        raise NotImplementedError(f"selector {type(self).__name__} does not define __call__")

    @classmethod
    def make_shared(cls, config: Any, hidden_size: int) -> Shared | None:
        """What the selectors of all layers share; they find it as `ctx.shared["depth"]`."""
        return None

    def learn(self, selection: Selection, best_BS: Bool[Array, "B S"], valid_BS: Bool[Array, "B S"]) -> Aux:
        """Its losses and statistics, given which tokens are the C best, or are chosen, if they do not compete."""
        return Aux()

    def size(self, seq_len: int) -> int:
        """C of a sequence of that length."""
        return _part(self.config.capacity, seq_len)

    def places(self, max_seq: int) -> int:
        """Of a cache for a text of that length."""
        factor = self.config.cache_factor
        return max_seq if factor is None else _part(factor * self.config.capacity, max_seq)

    @property
    def trains(self) -> bool:
        """Whether it is still learning: once it is frozen (beside adapters) it decides in training as it does later."""
        return not any(isinstance(var, Frozen) for var in vars(self).values())

    @property
    def share(self) -> float:
        """The part of the tokens that go through, as far as it is known beforehand."""
        return self.config.capacity

    def init_cache(self, batch: int, max_seq: int) -> Any:
        """What it keeps while decoding so many tokens; it finds that as `ctx.cache`."""
        return None

    def flops_per_token(self) -> float:
        """Forward FLOPs of what it says of one token; multiply-adds count two."""
        return 0


class Retrofit(Selector):
    """A selector for finished models, which are frozen: it alone is trained. How many go through is found out, so a
    cache has places for all.
    """

    competes = False
    retrofits = True

    def size(self, seq_len: int) -> int:
        """All that there are."""
        return seq_len

    def places(self, max_seq: int) -> int:
        """For all."""
        return max_seq

    @property
    def share(self) -> float:
        return 1.0


class NoSelector(Selector):
    """None: every token goes through."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        """No settings."""


def _part(part: float, whole: int) -> int:
    """ceil(part * whole), at most the whole; a product that is whole but for rounding is not rounded up."""
    return min(whole, math.ceil(round(part * whole, 6)))


def drawn(ctx: RoutingContext) -> Float[Array, "B S"]:
    """A number in [0, 1) for each token; without a key the same ones, layer by layer, whenever they are asked for."""
    key = jax.random.fold_in(jax.random.key(0), 0 if ctx.layer is None else ctx.layer)
    keys_T = keys_by_place(key if ctx.key is None else ctx.key, ctx)
    return jax.vmap(jax.random.uniform)(keys_T).reshape(ctx.batch, ctx.seq)
