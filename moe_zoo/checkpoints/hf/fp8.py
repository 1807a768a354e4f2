"""Weights in 8-bit floats with a scale per block, as DeepSeek-V3 publishes them, decoded to bfloat16 while reading.

`NAME.weight` e4m3 [out, in] times `NAME.weight_scale_inv` [ceil(out / 128), ceil(in / 128)], one number for each block
of `weight_block_size`; blocks at the edges are cut off. The product is taken in float32 and rounded once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from moe_zoo.checkpoints.hf.safetensors import Tensor
from moe_zoo.checkpoints.native import CheckpointError

_SCALES = "_scale_inv"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A weight and its scales. Reads like any other tensor."""

    weight: Tensor
    scales: Tensor
    block: tuple[int, int]

    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def file(self) -> Path:
        return self.weight.file

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def size(self) -> int:
        return self.weight.size + self.scales.size

    @property
    def where(self) -> str:
        return self.weight.where

    def read(self, mapped: Callable[[Path], np.ndarray]) -> np.ndarray:
        """The numbers, decoded."""
        return decode(self.weight.read(mapped), self.scales.read(mapped), self.block)


def decode(
    weight: Float[np.ndarray, "out in"], scales: Float[np.ndarray, "rows columns"], block: tuple[int, int]
) -> Float[np.ndarray, "out in"]:
    """One row of blocks after the other, so that only one is held in float32."""
    out = np.empty(weight.shape, Blocks.dtype)
    for i, at in enumerate(range(0, len(weight), block[0])):
        rows = slice(at, at + block[0])
        across = np.repeat(scales[i].astype(np.float32), block[1])[: weight.shape[1]]
        out[rows] = (weight[rows].astype(np.float32) * across).astype(out.dtype)
    return out


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, from a `quantization_config`. Raises CheckpointError where there are no blocks."""
    size, kind = config.get("weight_block_size"), config.get("fmt", "e4m3")
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise CheckpointError(
            f"fp8 with weight_block_size {size!r} is not supported; expected two sizes, as [128, 128]"
        )
    if kind != "e4m3":
        raise CheckpointError(f"fp8 with fmt {kind!r} is not supported; expected 'e4m3'")
    return tuple(size)


def unpack(tensors: Mapping[str, Any], block: tuple[int, int]) -> dict[str, Any]:
    """Every 8-bit weight and its scales as the one tensor that it is; the others as they are."""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALES) and name.removesuffix(_SCALES) in tensors:
            continue
        if tensor.dtype != np.dtype(ml_dtypes.float8_e4m3fn):
            found[name] = tensor
            continue
        scales = tensors.get(name + _SCALES)
        if scales is None:
            raise CheckpointError(f"{tensor.where} has no {name + _SCALES} beside it")
        expected = tuple(-(-n // size) for n, size in zip(tensor.shape, block))
        if len(tensor.shape) != 2 or scales.shape != expected:
            raise CheckpointError(
                f"{scales.where} has shape {list(scales.shape)}; blocks of {list(block)} in {list(tensor.shape)} make "
                f"it {list(expected)}"
            )
        found[name] = Blocks(tensor, scales, block)
    return found
