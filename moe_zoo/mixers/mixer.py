"""What every mixer is to a block, and what those with a state have in common: padding, packed documents, cache.

B batch, S sequence, D model.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.aux import Stat
from moe_zoo.layers.attention import Attention, AttentionConfig, View
from moe_zoo.layers.head_experts import HeadExperts
from moe_zoo.layers.latent_attention import LatentAttention
from moe_zoo.layers.rope import Angles


@dataclasses.dataclass(frozen=True)
class NoSettings:
    """Nothing to set."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Span:
    """S tokens in order, those of padding behind all others. `count`: how many are no padding, None for all. `layer`:
    the number of the layer that they are mixed in. `angles`: of their positions, for a mixer with a `rotary_key`.

    `documents` number the packed documents in order, from 0; None: one. The state before the first token is that of
    document 0.
    """

    valid: Bool[Array, "B S"] | None = None
    count: Int[Array, "B"] | None = None
    documents: Int[Array, "B S"] | None = None
    layer: Int[Array, ""] | None = None
    positions: Int[Array, "B S"] | None = None
    angles: Angles | None = None
    train: bool = dataclasses.field(default=False, metadata={"static": True})


class Mixer(nnx.Module):
    """Mixes tokens of a sequence causally by a state that is carried from token to token.

    A subclass defines `mix` and `init_cache`, a pytree of arrays [B, ...] that does not grow with the text; zeros are
    the state before the first token. It never sees padding between tokens.
    """

    Config = NoSettings

    @classmethod
    def build(cls, config, attention: AttentionConfig, *, hidden_size: int, out_scale: float, num_layers: int):
        """The module of one of `num_layers` layers; None where there is none. `attention`: the settings of that."""
        return cls(config, hidden_size=hidden_size, out_scale=out_scale)

    #: angles that it rotates by: none
    rotary_key = None
    #: linear layers that adapters can act beside: none
    linears: ClassVar[dict[str, int]] = {}
    #: variables that a token uses only in part: none
    shares: ClassVar[dict[str, float]] = {}

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The state before the first token."""
        raise NotImplementedError

    def mix(self, x_BSD: Float[Array, "B S D"], span: Span, state: dict) -> tuple[Float[Array, "B S D"], dict]:
        """(output, the state behind the last token that is no padding). Outputs on padding are arbitrary."""
        raise NotImplementedError

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs; multiply-adds count two. The state makes them independent of the `context`."""
        raise NotImplementedError

    def __call__(self, x_BSD: Float[Array, "B S D"], view: View, cache: dict | None = None, at=None):
        """Returns (output, cache), and what `mix` returns besides: with a cache, the tokens continue what it has seen.
        Padding changes no state.
        """
        state = cache if cache is not None else self.init_cache(x_BSD.shape[0], 0, x_BSD.dtype)
        angles = None if self.rotary_key is None else view.rotary[self.rotary_key]
        fixed = dict(layer=view.layer, train=view.train)
        if view.valid is None:
            order = dict(documents=documents(view.segment_ids), positions=view.positions, angles=angles)
            y_BSD, new, *aux = self.mix(x_BSD, Span(**order, **fixed), state)
        else:
            order_BS = jnp.argsort(~view.valid, axis=1, stable=True)
            at_front = lambda x: None if x is None else jnp.take_along_axis(x, order_BS, axis=1)
            turned = lambda x: jnp.take_along_axis(x, order_BS[:, None, :, None], axis=2)
            order = dict(
                valid=at_front(view.valid), count=view.valid.sum(1), documents=documents(at_front(view.segment_ids)),
                positions=at_front(view.positions), angles=jax.tree.map(turned, angles),
            )  # fmt: skip
            y_BSD, new, *aux = self.mix(take(x_BSD, order_BS), Span(**order, **fixed), state)
            y_BSD = take(y_BSD, jnp.argsort(order_BS, axis=1))
        if cache is None:
            return y_BSD, None, *aux
        return y_BSD, jax.tree.map(lambda new, old: new.astype(old.dtype), new, cache), *aux


class LearningMixer(Mixer):
    """A mixer with losses, statistics, and buffers that follow from these: `mix` returns (output, state, Aux).

    `as_trained`: tokens that compete in training do so outside of it, too, which looks at later ones.
    """

    #: whether in training tokens compete in a way that looks at later ones
    competes: bool = False
    as_trained: bool = False

    def after_step(self, stats: dict[str, Stat]) -> dict[str, Array]:
        """New values of buffers, by name, from a step's statistics, summed over micro-batches and devices."""
        return {}


class SoftmaxAttention(Mixer):
    """Softmax attention of the kind that the settings of `model.attention` ask for."""

    @classmethod
    def build(cls, config, attention: AttentionConfig, *, hidden_size: int, out_scale: float, num_layers: int) -> Any:
        if attention.experts.num_experts:
            return HeadExperts(attention, hidden_size=hidden_size, out_scale=out_scale)
        made = LatentAttention if attention.latent.kv_lora_rank else Attention
        return made(attention, hidden_size=hidden_size, out_scale=out_scale)


class NoMixer(Mixer):
    """None: a layer that is a feed-forward part alone (Nemotron-H)."""

    @classmethod
    def build(cls, config, attention: AttentionConfig, **sizes) -> None:
        return None


def take(x_BSD: Float[Array, "B S D"], order_BS: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """The tokens of every row in another order."""
    return jnp.take_along_axis(x_BSD, order_BS[..., None], axis=1)


def documents(segment_ids: Int[Array, "B S"] | None) -> Int[Array, "B S"] | None:
    """0, 1, 2, ... for the packed documents of each row."""
    if segment_ids is None:
        return None
    changes = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    return jnp.cumsum(changes, axis=1)
