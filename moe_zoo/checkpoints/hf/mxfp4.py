"""MXFP4 (OCP microscaling): blocks of 32 four-bit floats with one power of two each, decoded to bfloat16 while reading.

Two tensors hold one matrix per expert: `NAME_blocks` u8 [E, out, in / 32, 16], the low half of a byte first, and
`NAME_scales` u8 [E, out, in / 32], exponents with an offset of 127. What they say is [E, in, out].
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, UInt8

from moe_zoo.checkpoints.hf.safetensors import Tensor
from moe_zoo.checkpoints.native import CheckpointError

_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_VALUES = np.concatenate([_VALUES, -_VALUES])


@dataclasses.dataclass(frozen=True)
class Packed:
    """A tensor that is two on disk. Reads like any other."""

    name: str
    blocks: Tensor
    scales: Tensor

    dtype = np.dtype(ml_dtypes.bfloat16)

    @property
    def file(self) -> Path:
        return self.blocks.file

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, rows, groups, half = self.blocks.shape
        return (*lead, groups * half * 2, rows)

    @property
    def size(self) -> int:
        return self.blocks.size + self.scales.size

    @property
    def where(self) -> str:
        return self.blocks.where

    def read(self, mapped: Callable[[Path], np.ndarray], experts: slice = slice(None)) -> np.ndarray:
        """The numbers, decoded; of some experts only, if asked."""
        return decode(self.blocks.read(mapped)[experts], self.scales.read(mapped)[experts])


def decode(
    blocks: UInt8[Array, "E out groups 16"], scales: UInt8[Array, "E out groups"]
) -> Float[np.ndarray, "E in out"]:
    """One expert after the other, so that only one is held in float32."""
    E, rows, groups, half = blocks.shape
    out = np.empty((E, rows, groups * half * 2), ml_dtypes.bfloat16)
    for e in range(E):
        pairs = np.stack([blocks[e] & 15, blocks[e] >> 4], -1).reshape(rows, groups, half * 2)
        numbers = np.ldexp(_VALUES[pairs], scales[e].astype(np.int32)[..., None] - 127)
        out[e] = numbers.reshape(rows, -1).astype(out.dtype)
    return np.swapaxes(out, 1, 2)


def unpack(tensors: dict[str, Tensor]) -> dict[str, Tensor | Packed]:
    """Every pair of blocks and scales as the one tensor that it is."""
    found: dict[str, Tensor | Packed] = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition("_")
        if kind == "scales" and f"{base}_blocks" in tensors:
            continue
        if kind != "blocks":
            found[name] = tensor
            continue
        scales = tensors.get(f"{base}_scales")
        if scales is None:
            raise CheckpointError(f"{tensor.where} has no {base}_scales beside it")
        u8 = all(t.dtype == np.uint8 for t in (tensor, scales))
        if not u8 or tensor.shape[:-1] != scales.shape or len(tensor.shape) != 4 or tensor.shape[-1] != 16:
            raise CheckpointError(
                f"{tensor.where}, {tensor.dtype} {list(tensor.shape)}, and its scales {list(scales.shape)} are no MXFP4"
            )
        found[base] = Packed(base, tensor, scales)
    return found
