"""What encoder-decoders attend with: a sequence to itself, causally or both ways, and to what is known of another one.

B batch, S queries, L keys, N heads, M key-value heads, H head size, D model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from moe_zoo.core.sight import Sight
from moe_zoo.layers.attend import attend
from moe_zoo.layers.attention import Attention, View

_ALL = slice(None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairView(View):
    """A view of one of two sequences. `bias` is added to the scores of its tokens, `ahead`: they see those behind them.
    `memory`: what the encoder made of the other sequence, None in the encoder, and where a cache has the keys and
    values of it; `memory_valid`: which of it is no padding.
    """

    bias: Float[Array, "N S L"] | None = None
    memory: Float[Array, "B L D"] | None = None
    memory_valid: Bool[Array, "B L"] | None = None
    ahead: bool = dataclasses.field(default=False, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairSight(Sight):
    """Who sees whom, and the bias of their scores."""

    bias: Float[Array, "N S L"] | None = None
    ahead: bool = dataclasses.field(default=False, metadata={"static": True})

    def mask(self, queries: slice, keys: slice, window: int | None = None) -> Bool[Array, "B s l"]:
        if not self.ahead:
            return super().mask(queries, keys, window)
        B, S = self.positions.shape
        valid = jnp.ones((B, S), bool) if self.key_valid is None else self.key_valid
        return jnp.broadcast_to(valid[:, None, keys], (B, len(range(S)[queries]), len(range(S)[keys])))


class SelfAttention(Attention):
    """Attention of a sequence to itself, with a bias, or both ways."""

    def _sight(self, view: PairView, cache, at) -> PairSight:
        plain = super()._sight(view, cache, at)
        fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
        return PairSight(**fields, bias=view.bias, ahead=view.ahead)

    def _mix(self, q, k, v, sight: PairSight):
        if sight.bias is None and not sight.ahead:
            return super()._mix(q, k, v, sight)
        return attend(q, k, v, sight.mask(_ALL, _ALL), self.config.softmax_scale, None, sight.bias)


class CrossAttention(Attention):
    """Attention of a sequence to another one: queries of the one, keys and values of the other."""

    def keys_values(self, memory_BLD: Float[Array, "B L D"]) -> dict[str, Array]:
        """What does not change while the text grows: k and v [B, M, L, H]."""
        return {name: self._heads(memory_BLD, name) for name in "kv"}

    def __call__(
        self, x_BSD: Float[Array, "B S D"], kv: dict[str, Array], valid_BL: Bool[Array, "B L"] | None
    ) -> Float[Array, "B S D"]:
        """`kv`: of `keys_values`; `valid`: which of these are no padding."""
        D, N, _, H = self.dims
        B, S, _ = x_BSD.shape
        L = kv["k"].shape[2]
        mask_BSL = jnp.ones((B, S, L), bool)
        if valid_BL is not None:
            mask_BSL = jnp.broadcast_to(valid_BL[:, None], mask_BSL.shape)
        out_BNSH = attend(self._heads(x_BSD, "q"), kv["k"], kv["v"], mask_BSL, self.config.softmax_scale)
        mixed = out_BNSH.transpose(0, 2, 1, 3).reshape(B * S, N * H)
        out = (mixed @ self.o[...].astype(x_BSD.dtype).reshape(N * H, D)).reshape(B, S, D)
        return out + self.o_bias[...].astype(out.dtype) if self.config.output_bias else out

    def _heads(self, x_BSD, name: str):
        """x projected to the heads of "q", "k" or "v"."""
        D, _, _, H = self.dims
        B, S, _ = x_BSD.shape
        y = x_BSD.reshape(B * S, D) @ getattr(self, name)[...].astype(x_BSD.dtype).reshape(D, -1)
        if self.config.qkv_bias:
            y = y + getattr(self, f"{name}_bias")[...].astype(y.dtype)
        return y.reshape(B, S, -1, H).transpose(0, 2, 1, 3)
