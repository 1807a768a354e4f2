"""Tokens that lie on a grid: images, convolutions over them.

B batch, Y rows and X columns of a grid, S = Y * X tokens in reading order, D model.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from moe_zoo.core.param import Constant, fan_in, param
from moe_zoo.sharding import batch_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GridView:
    """Where the tokens of a row are: all of a grid, in reading order. `mesh`: what the batch is spread over."""

    height: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    def unfold(self, x_BS: Float[Array, "B S ..."]) -> Float[Array, "B Y X ..."]:
        return x_BS.reshape(x_BS.shape[0], self.height, self.width, *x_BS.shape[2:])

    def whole_rows(self, x_B: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """The same, each device holding whole rows."""
        if self.mesh is None or self.mesh.devices.size == 1:
            return x_B
        return jax.lax.with_sharding_constraint(x_B, batch_sharding(self.mesh))


class Depthwise(nnx.Module):
    """A convolution of every channel by itself, of odd `size`, with zeros beyond the edges, and a bias.

    `channels`: the sizes of the channels' dims, with their logical `axes`.
    """

    def __init__(self, channels: tuple[int, ...], axes: tuple[str, ...], size: int):
        self.size = size
        self.kernel = param((size, size, *channels), (None, None, *axes), fan_in(size * size))
        self.bias = param(channels, axes, Constant(0.0))

    def __call__(self, x: Float[Array, "B Y X ..."]) -> Float[Array, "B Y X ..."]:
        Y, X = x.shape[1:3]
        kernel, edge = self.kernel[...].astype(x.dtype), self.size // 2
        wide = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), *[(0, 0)] * (x.ndim - 3)))
        # shifted products: XLA's own grouped convolution takes many times as long on a CPU, most of all its gradient
        y = sum(wide[:, i : i + Y, j : j + X] * kernel[i, j] for i in range(self.size) for j in range(self.size))
        return y + self.bias[...].astype(x.dtype)

    @property
    def flops_per_token(self) -> int:
        """Forward, multiply-adds count two."""
        return 2 * self.kernel.get_value().size


class Downsample(nnx.Module):
    """A 3 x 3 convolution of stride 2 that overlaps, with a bias, and a norm: half as many rows and columns."""

    def __init__(self, inputs: int, outputs: int, norm: nnx.Module):
        self.kernel = param((3, 3, inputs, outputs), (None, None, None, "embed"), fan_in(9 * inputs))
        self.bias = param((outputs,), ("embed",), Constant(0.0))
        self.norm = norm

    def __call__(self, x_BYXC: Float[Array, "B Y X C"]) -> Float[Array, "B Y/2 X/2 D"]:
        y = jax.lax.conv_general_dilated(
            x_BYXC, self.kernel[...].astype(x_BYXC.dtype), (2, 2), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return self.norm(y + self.bias[...].astype(x_BYXC.dtype))

    @property
    def flops_per_token(self) -> int:
        """Forward, of one token that it makes."""
        return 2 * self.kernel.get_value().size


class Stem(nnx.Module):
    """Pixels to tokens of 4 x 4 of them: two overlapping convolutions of stride 2, GELU between."""

    def __init__(self, channels: int, hidden_size: int, make_norm):
        self.first = Downsample(channels, hidden_size // 2, make_norm(hidden_size // 2))
        self.second = Downsample(hidden_size // 2, hidden_size, make_norm(hidden_size))

    def __call__(self, images_BYXC: Float[Array, "B Y X C"]) -> Float[Array, "B Y/4 X/4 D"]:
        return self.second(jax.nn.gelu(self.first(images_BYXC), approximate=False))

    @property
    def flops_per_token(self) -> int:
        """Forward, of one token that it makes."""
        return 4 * self.first.flops_per_token + self.second.flops_per_token


def light(images: Array, dtype) -> Float[Array, "B Y X C"]:
    """uint8 pixels as numbers in [-1, 1]."""
    return images.astype(dtype) / 127.5 - 1
