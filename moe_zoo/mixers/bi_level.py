"""Bi-level routing attention of BiFormer (arXiv 2303.08810) over a grid, and its stage without routing.

    q, k, v = x W + b;   q^r, k^r: their means over region r;   I_r = the K regions s of largest q^r . k^s
    o_i = softmax_j(scale q_i . k_j) v_j  over the tokens j of the regions I_r, for i in r;   y = (o + LCE(v)) W_o + b_o

Which regions is decided from the whole width, for all heads alike, and has no gradient. scale = D^-1/2: of the width,
not the head's. LCE is a depthwise convolution of the values. Where regions do not divide the grid, the ones at its end
have fewer tokens: their means are over those, and nobody attends to what is not there (the authors' code, which pads
with zeros, does).

B batch, S = Y * X tokens, R regions, P tokens of one, K regions that one attends to, N heads, H head size, D model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive
from moe_zoo.layers.grid import Depthwise, GridView
from moe_zoo.mixers.mixer import Mixer
from moe_zoo.routing.router import at_least_f32


@dataclasses.dataclass(frozen=True)
class BiLevelConfig:
    """`windows`: regions per side of the grid; where they do not divide it, the side is cut into pieces of
    floor(side / windows), and there are more. `topk`: K. `lce_size`: of LCE's kernel.
    """

    num_heads: int = 2
    windows: int = 7
    topk: int = 4
    lce_size: int = 5

    def validate(self, path: str) -> None:
        positive(self, path, "num_heads", "windows", "topk", "lce_size")
        if self.lce_size % 2 == 0:
            raise ConfigError(f"{join(path, 'lce_size')}: {self.lce_size}; expected an odd number")


class GridMixer(Mixer):
    """Mixes the tokens of a grid both ways, by heads. Of no use to a model of the next token."""

    def __init__(self, *, hidden_size: int, num_heads: int, out_scale: float, qkv_bias: bool):
        if hidden_size % num_heads:
            raise ConfigError(f"hidden size {hidden_size} does not divide into {num_heads} heads")
        D, N, H = hidden_size, num_heads, hidden_size // num_heads
        self.dims, self.qkv_bias = (D, N, H), qkv_bias
        for name in ("q", "k", "v"):
            setattr(self, f"w_{name}", param((D, N, H), ("embed", "heads", "head_dim"), fan_in(D)))
            if qkv_bias:
                setattr(self, f"b_{name}", param((N, H), ("heads", "head_dim"), Constant(0.0)))
        self.w_o = param((N, H, D), ("heads", "head_dim", "embed"), fan_in(D, out_scale))
        self.b_o = param((D,), ("embed",), Constant(0.0))

    def qkv(self, x_BSD) -> tuple[Float[Array, "B S N H"], ...]:
        """Queries, keys, values."""

        def one(name):
            y = jnp.einsum("bsd,dnh->bsnh", x_BSD, getattr(self, f"w_{name}")[...].astype(x_BSD.dtype))
            return y + getattr(self, f"b_{name}")[...].astype(x_BSD.dtype) if self.qkv_bias else y

        return one("q"), one("k"), one("v")

    def out(self, o_BSNH) -> Float[Array, "B S D"]:
        """Of all heads."""
        y_BSD = jnp.einsum("bsnh,nhd->bsd", o_BSNH, self.w_o[...].astype(o_BSNH.dtype))
        return y_BSD + self.b_o[...].astype(o_BSNH.dtype)

    def local(self, x_BS: Float[Array, "B S ..."], view: GridView) -> Float[Array, "B S ..."]:
        """LCE."""
        return self.lce(view.unfold(x_BS)).reshape(x_BS.shape)

    def _flops(self, keys: float) -> float:
        """Of one token that compares with that many."""
        D, _, _ = self.dims
        return 8 * D * D + 4 * D * keys + self.lce.flops_per_token


class BiLevel(GridMixer):
    """Attention of every region of the grid to the `topk` regions that it is most like."""

    Config = BiLevelConfig

    def __init__(self, config: BiLevelConfig, *, hidden_size: int, out_scale: float):
        super().__init__(
            hidden_size=hidden_size, num_heads=config.num_heads, out_scale=out_scale,
            qkv_bias=True,
        )  # fmt: skip
        self.config = config
        self.lce = Depthwise(self.dims[1:], ("heads", "head_dim"), config.lce_size)

    def __call__(self, x_BSD: Float[Array, "B S D"], view: GridView, cache: None = None, at=None):
        """Returns (y, None): there is no cache."""
        q, k, v = self.qkv(x_BSD)
        regions = Regions.of(view, self.config.windows)
        chosen_BRK = route(regions.cut(q), regions.cut(k), regions.live_RP(), self.config.topk)
        o_BRPNH = attend_regions(
            regions.cut(q), regions.cut(k), regions.cut(v), chosen_BRK, regions.live_RP(), self.dims[0] ** -0.5
        )
        return self.out(regions.joined(o_BRPNH) + self.local(v, view)), None

    def flops(self, view: GridView) -> float:
        """Forward FLOPs of one token of that grid."""
        regions = Regions.of(view, self.config.windows)
        tokens, R, P = view.height * view.width, regions.rows * regions.columns, regions.height * regions.width
        return self._flops(min(self.config.topk, R) * P) + 2 * R * R * self.dims[0] / tokens


class FullGrid(GridMixer):
    """The last stage's: all tokens attend to all. As in the authors' code the scale is the head's there, nothing has a
    bias but the output, and LCE convolves what comes in instead of the values.
    """

    Config = BiLevelConfig

    def __init__(self, config: BiLevelConfig, *, hidden_size: int, out_scale: float):
        super().__init__(
            hidden_size=hidden_size, num_heads=config.num_heads, out_scale=out_scale,
            qkv_bias=False,
        )  # fmt: skip
        self.lce = Depthwise(self.dims[:1], ("embed",), config.lce_size)

    def __call__(self, x_BSD: Float[Array, "B S D"], view: GridView, cache: None = None, at=None):
        """Returns (y, None): there is no cache."""
        q, k, v = self.qkv(x_BSD)
        _, N, H = self.dims
        scores_BNSL = at_least_f32(jnp.einsum("bsnh,blnh->bnsl", q * H**-0.5, k))
        weights_BNSL = jax.nn.softmax(scores_BNSL, axis=-1).astype(v.dtype)
        o_BSNH = jnp.einsum("bnsl,blnh->bsnh", weights_BNSL, v)
        # x reaches W_o past the heads: where both fsdp and tensor cut W_o, the compiler (jax 0.10.2) makes a wrong
        # gradient of that, unless it is told how the rows lie
        local_BSD = view.whole_rows(self.local(x_BSD, view))
        return self.out(o_BSNH + local_BSD.reshape(o_BSNH.shape)), None

    def flops(self, view: GridView) -> float:
        """Forward FLOPs of one token of that grid."""
        return self._flops(view.height * view.width)


@dataclasses.dataclass(frozen=True)
class Regions:
    """A grid cut into `rows` x `columns` regions of `height` x `width` tokens; the last ones may reach beyond it."""

    view: GridView
    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def of(cls, view: GridView, windows: int) -> "Regions":
        """Raises ConfigError if a region would have no token."""
        height, width = view.height // windows, view.width // windows
        if not height or not width:
            raise ConfigError(
                f"windows: {windows} per side of a grid of {view.height} x {view.width}; at most its side"
            )
        return cls(view, -(-view.height // height), -(-view.width // width), height, width)

    def cut(self, x_BS: Float[Array, "B S N H"]) -> Float[Array, "B R P N H"]:
        """The tokens of each region; zeros where there are none."""
        beyond = (self.rows * self.height - self.view.height, self.columns * self.width - self.view.width)
        x = jnp.pad(self.view.unfold(x_BS), ((0, 0), (0, beyond[0]), (0, beyond[1]), (0, 0), (0, 0)))
        x = x.reshape(x.shape[0], self.rows, self.height, self.columns, self.width, *x.shape[3:])
        return x.swapaxes(2, 3).reshape(x.shape[0], self.rows * self.columns, self.height * self.width, *x.shape[5:])

    def joined(self, x_BRP: Float[Array, "B R P N H"]) -> Float[Array, "B S N H"]:
        """The inverse of `cut`."""
        x = x_BRP.reshape(x_BRP.shape[0], self.rows, self.columns, self.height, self.width, *x_BRP.shape[3:])
        x = x.swapaxes(2, 3).reshape(x.shape[0], self.rows * self.height, self.columns * self.width, *x.shape[5:])
        return x[:, : self.view.height, : self.view.width].reshape(x.shape[0], -1, *x.shape[3:])

    def live_RP(self) -> Bool[Array, "R P"]:
        """Where there is a token."""
        ones = jnp.ones((1, self.view.height * self.view.width, 1, 1), bool)
        return self.cut(ones)[0, :, :, 0, 0]


def route(
    q_BRPNH: Float[Array, "B R P N H"], k_BRPNH: Float[Array, "B R P N H"], live_RP: Bool[Array, "R P"], topk: int
) -> Int[Array, "B R K"]:
    """The regions that each region attends to, most alike first, all of them if there are fewer than `topk`."""
    share_RP = live_RP / live_RP.sum(-1, keepdims=True)
    mean = lambda x: jnp.einsum("brpnh,rp->brnh", at_least_f32(jax.lax.stop_gradient(x)), share_RP)
    alike_BRR = jnp.einsum("brnh,bsnh->brs", mean(q_BRPNH), mean(k_BRPNH))
    return jax.lax.top_k(alike_BRR, min(topk, live_RP.shape[0]))[1]


def attend_regions(
    q_BRPNH: Float[Array, "B R P N H"],
    k_BRPNH: Float[Array, "B R P N H"],
    v_BRPNH: Float[Array, "B R P N H"],
    chosen_BRK: Int[Array, "B R K"],
    live_RP: Bool[Array, "R P"],
    scale: float,
) -> Float[Array, "B R P N H"]:
    """Softmax attention of each region's tokens to those of the regions that it chose; the softmax in float32."""
    of_chosen = jax.vmap(lambda x_RP, chosen_RK: x_RP[chosen_RK])
    k_BRKPNH, v_BRKPNH = of_chosen(k_BRPNH, chosen_BRK), of_chosen(v_BRPNH, chosen_BRK)
    scores = at_least_f32(jnp.einsum("brpnh,brkqnh->brnpkq", q_BRPNH * scale, k_BRKPNH))
    scores = jnp.where(live_RP[chosen_BRK][:, :, None, None], scores, -jnp.inf)
    B, R, N, P, K, _ = scores.shape
    weights = jax.nn.softmax(scores.reshape(B, R, N, P, -1), axis=-1).reshape(scores.shape).astype(v_BRPNH.dtype)
    return jnp.einsum("brnpkq,brkqnh->brpnh", weights, v_BRKPNH)
