"""Norms that bound: DyT, tanh(alpha x) in place of a statistic (arXiv 2503.10622), and BHyT, a tanh of x over its
root mean square (arXiv 2601.09719).

    DyT(x)       = w tanh(alpha x) + b
    BHyT(x; s^2) = w tanh(lambda x / (kappa sqrt(s^2 + eps)))           s^2 = mean(x^2)

By Chebyshev at most 1/kappa^2 of all channels have |x| >= kappa s, so that the argument stays within lambda for the
others. A block h = x + Attn(BHyT_1(x; s^2)), y = h + FFN(BHyT_2(h; s'^2)) measures s^2 alone; the second is predicted:

    s'^2 = s^2 + c lambda_1^2 / kappa^2,    c = ||W_V W_O||_F^2 / (n D)

since BHyT_1 returns channels of variance (lambda_1 / kappa)^2, attention spread evenly over n independent tokens
divides that by n, and W_V W_O multiplies it by ||W_V W_O||_F^2 / D. No gradient goes through c and the lambda_1 in it.

D model, N query heads, M key-value heads, H head size.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from moe_zoo.core.param import Buffer, Constant, param
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import join, positive

#: before the mixer, before the feed-forward part, before the head
Place = Literal["mixer", "ffn", "last"]


@dataclasses.dataclass(frozen=True)
class TanhNormConfig:
    """Where the learned scalars begin, by place: `alpha_*` of DyT, whose defaults are those of the paper's LLaMA-7B,
    wider models having smaller ones; `lambda_*` of BHyT, `lambda_last` 0: RMSNorm before the head.

    `kappa`: how many root mean squares away |x| counts as far out. `tokens`: over how many tokens attention is taken to
    average, of rows as long as `seq_len` ("seq_len", the paper), or as many as the token sees ("position").
    `refresh_every`: how many steps pass until W_V W_O is looked at again.
    """

    alpha_mixer: float = 0.8
    alpha_ffn: float = 0.2
    alpha_last: float = 0.2
    lambda_mixer: float = 2.0
    lambda_ffn: float = 1.0
    lambda_last: float = 0.0
    kappa: float = 10.0
    tokens: Literal["seq_len", "position"] = "seq_len"
    seq_len: int = 1024
    refresh_every: int = 100

    def validate(self, path: str) -> None:
        positive(self, path, "alpha_mixer", "alpha_ffn", "alpha_last", "lambda_mixer", "lambda_ffn")
        positive(self, path, "kappa", "seq_len", "refresh_every")
        positive(self, path, "lambda_last", zero=True)


class DyT(nnx.Module):
    """w tanh(alpha x) + b over the last axis: no statistic at all."""

    def __init__(self, size: int, alpha: float, axis: str = "embed", bias: bool = True):
        self.alpha = param((), (), Constant(alpha))
        self.scale = param((size,), (axis,), Constant(1.0))
        if bias:
            self.bias = param((size,), (axis,), Constant(0.0))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        bounded = jnp.tanh(self.alpha[...] * wide(x)) * self.scale[...]
        return (bounded + self.bias[...] if hasattr(self, "bias") else bounded).astype(x.dtype)


class BHyT(nnx.Module):
    """w tanh(lambda x / (kappa rms)) over the last axis."""

    def __init__(self, size: int, eps: float, slope: float, kappa: float, axis: str = "embed"):
        """`slope`: where lambda begins."""
        self.eps, self.kappa = eps, kappa
        self.slope = param((), (), Constant(slope))
        self.scale = param((size,), (axis,), Constant(1.0))

    def __call__(self, x: Float[Array, "... D"], square: Float[Array, "... 1"] | None = None) -> Float[Array, "... D"]:
        """`square`: the mean square to divide by; None: that of x."""
        square = mean_square(x) if square is None else square
        bounded = jnp.tanh(self.slope[...] / self.kappa * jax.lax.rsqrt(square + self.eps) * wide(x))
        return (bounded * self.scale[...]).astype(x.dtype)


class PredictingBHyT(BHyT):
    """The second norm of a block, whose mean square is predicted from that of the block's input.

    `growth` is ||W_V W_O||_F^2 / D, without the number of tokens, so that it holds for any. It begins at what it is on
    average for weights as they are drawn.
    """

    def __init__(self, size: int, eps: float, config: TanhNormConfig, out_scale: float, axis: str = "embed"):
        super().__init__(size, eps, config.lambda_ffn, config.kappa, axis)
        self.config = config
        self.growth = param((), (), Constant(out_scale**2), kind=Buffer)

    def squares(self, x_BSD: Float[Array, "B S D"], positions_BS: Int[Array, "B S"], first: BHyT):
        """(mean square of x, predicted mean square of what this norm will see), each [B, S, 1]."""
        square = mean_square(x_BSD)
        spread = jax.lax.stop_gradient(self.growth[...] * (first.slope[...] / first.kappa) ** 2)
        if self.config.tokens == "seq_len":
            return square, square + spread / self.config.seq_len
        return square, square + spread / (positions_BS[..., None] + 1)

    def refreshed(self, mixer, step: Int[Array, ""]) -> Float[Array, ""]:
        """`growth` for the weights of `mixer`, if it is its turn at `step`; else as it is."""
        due = step % self.config.refresh_every == 0
        measure = lambda v, o, old: growth(v, o).astype(old.dtype)
        return jax.lax.cond(due, measure, lambda v, o, old: old, mixer.v[...], mixer.o[...], self.growth[...])


def growth(v_DMH: Float[Array, "D M H"], o_NHD: Float[Array, "N H D"]) -> Float[Array, ""]:
    """||W_V W_O||_F^2 / D, of W_V expanded to all query heads."""
    D, M, H = v_DMH.shape
    # heads that share values: the sum of their outputs' matrices, before the product that is the same for all of them
    o_MHD = wide(o_NHD).reshape(M, -1, H, o_NHD.shape[-1]).sum(1)
    both_DD = jnp.einsum("dmh,mhe->de", wide(v_DMH), o_MHD)
    return jnp.sum(both_DD * both_DD) / D


def mean_square(x: Float[Array, "... D"]) -> Float[Array, "... 1"]:
    """mean(x^2) over the last axis, in float32 or wider."""
    return jnp.mean(jnp.square(wide(x)), -1, keepdims=True)


def wide(x):
    """In float32 or wider."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def why_not_predicted(model, path: str) -> None:
    """Raises ConfigError if a block of `model` (ModelConfig) is other than the prediction takes it to be."""
    attention, wrong = model.attention, None
    for name, there in (
        ("latent", attention.latent.kv_lora_rank), ("experts", attention.experts.num_experts),
        ("output_gate", attention.output_gate), ("clip_qkv", attention.clip_qkv), ("sinks", attention.sinks),
    ):  # fmt: skip
        if there:
            wrong = f"{join(path, 'norm')}: 'bhyt' looks at W_V W_O alone, and there is attention.{name}"
    if model.mixer.name not in ("attention", "none"):
        wrong = f"{join(path, 'norm')}: 'bhyt' looks at W_V W_O of attention, not of {model.mixer.name!r}"
    if model.depth.name != "none":
        wrong = f"{join(path, 'norm')}: 'bhyt' reckons with all tokens, depth {model.depth.name!r} takes some"
    for name, usual in (("norm_placement", "pre"), ("residual_multiplier", 1.0), ("skip_multiplier", 1.0)):
        if getattr(model, name) != usual:
            wrong = f"{join(path, name)}: with norm 'bhyt' {usual!r} only, got {getattr(model, name)!r}"
    if wrong:
        raise ConfigError(f"{wrong}; model.norm 'bhyt_star' measures both")
