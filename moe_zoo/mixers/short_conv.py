"""The gated short convolution of LFM2 (arXiv 2511.23404): all that a token sees of others are the K - 1 before it.

    y = W_out (c * conv(b * x));   b, c, x = W_b u, W_c u, W_x u

B batch, S sequence, D model, K taps.
"""

import dataclasses

import jax.numpy as jnp

from moe_zoo.core.param import Constant, Uniform, fan_in, param
from moe_zoo.core.schema import positive
from moe_zoo.mixers.conv import causal_conv
from moe_zoo.mixers.mixer import Mixer, Span


@dataclasses.dataclass(frozen=True)
class ShortConvConfig:
    """`bias`: of the projections and the convolution."""

    conv_kernel: int = 3
    bias: bool = False

    def validate(self, path: str) -> None:
        positive(self, path, "conv_kernel")


class ShortConv(Mixer):
    """Short convolution between two gates; its state are a few inputs."""

    Config = ShortConvConfig

    def __init__(self, config: ShortConvConfig, *, hidden_size: int, out_scale: float):
        D = hidden_size
        self.config, self.size = config, D
        for name in "bcx":
            setattr(self, f"in_{name}", param((D, D), ("embed", "mlp"), fan_in(D)))
        self.conv = param((D, config.conv_kernel), ("channels", None), Uniform(config.conv_kernel**-0.5))
        self.out = param((D, D), ("mlp", "embed"), fan_in(D, out_scale))
        if config.bias:
            for name in "bcx":
                setattr(self, f"in_{name}_bias", param((D,), ("mlp",), Constant(0.0)))
            self.conv_bias = param((D,), ("mlp",), Constant(0.0))
            self.out_bias = param((D,), ("embed",), Constant(0.0))

    def init_cache(self, batch: int, max_seq: int, dtype) -> dict:
        """The last inputs of the convolution."""
        return {"conv": jnp.zeros((batch, self.config.conv_kernel - 1, self.size), dtype)}

    def mix(self, x_BSD, span: Span, state: dict):
        """As `Mixer`."""
        b, c, x = (self._through(x_BSD, f"in_{name}") for name in "bcx")
        bias = self.conv_bias[...] if self.config.bias else None
        y, conv = causal_conv(b * x, self.conv[...], bias, span, state["conv"])
        return self._through(c * y, "out"), {"conv": conv}

    def _through(self, x, name: str):
        y = x @ getattr(self, name)[...].astype(x.dtype)
        return y + getattr(self, f"{name}_bias")[...].astype(x.dtype) if self.config.bias else y

    def flops_per_token(self, context: float) -> float:
        """Four projections and the convolution."""
        return 2 * self.size * (4 * self.size + self.config.conv_kernel)
