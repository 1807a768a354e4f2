"""What families with Mamba layers share: tensors, attention without positions."""

from collections.abc import Mapping
from typing import Any

from moe_zoo.checkpoints.hf.layout import Stored, linear
from moe_zoo.checkpoints.native import CheckpointError
from moe_zoo.models import ModelConfig


def tensors(prefix: str) -> dict[str, Stored]:
    """Of Mamba-2."""
    return {
        "mixer.in_proj": linear(f"{prefix}.in_proj.weight"),
        "mixer.in_bias": Stored(f"{prefix}.in_proj.bias"),
        "mixer.conv": Stored(f"{prefix}.conv1d.weight", "conv"),
        "mixer.conv_bias": Stored(f"{prefix}.conv1d.bias"),
        "mixer.dt_bias": Stored(f"{prefix}.dt_bias"),
        "mixer.A_log": Stored(f"{prefix}.A_log"),
        "mixer.skip": Stored(f"{prefix}.D"),
        "mixer.norm": Stored(f"{prefix}.norm.weight"),
        "mixer.out": linear(f"{prefix}.out_proj.weight"),
        "mixer.out_bias": Stored(f"{prefix}.out_proj.bias"),
    }


class NoPositions:
    """Attention layers without rotary positions."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"attention.rotary_dim": 0}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class NoLimit:
    """`time_step_limit`: only without one, which is its default."""

    def read(self, given: Mapping[str, Any]) -> dict[str, Any]:
        limit = given.get("time_step_limit")
        # JSON knows no infinity: newer files have {"__float__": "Infinity"}
        number = lambda x: float(x["__float__"] if isinstance(x, Mapping) else x)
        if limit is not None and [number(x) for x in limit] != [0.0, float("inf")]:
            raise CheckpointError(f"time_step_limit: {limit!r} is not supported; expected [0, inf]")
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}
