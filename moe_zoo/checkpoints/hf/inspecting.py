"""What a published directory holds, from config.json and the headers alone: seconds for any size."""

import math
from pathlib import Path
from typing import Any

from moe_zoo.checkpoints.hf.families import find
from moe_zoo.checkpoints.hf.plan import check, plan
from moe_zoo.checkpoints.hf.reading import describe, read_tensors
from moe_zoo.checkpoints.hf.safetensors import read_folder
from moe_zoo.models import ModelConfig, make_model
from moe_zoo.models.counting import count_parameters

#: memory of one device in GB
DEVICES = {
    "T4": 16, "TPU v5e": 16, "L4": 24, "RTX 4090": 24, "TPU v4": 32, "TPU v6e": 32, "A100 40GB": 40, "L40S": 48,
    "A100 80GB": 80, "H100": 80, "TPU v5p": 95, "H200": 141, "B200": 180, "MI300X": 192,
}  # fmt: skip
_ROOM = 1.15  # weights, and a little for activations and a cache


def inspect(folder: Path) -> dict[str, Any]:
    """Architecture, layers, experts, parameters, bytes by type, devices that hold the weights.

    Raises CheckpointError for all that `load` would refuse.
    """
    published, config = describe(folder)
    stored, tensors = read_folder(folder), read_tensors(published)
    model = make_model(config)
    check(plan(model, find(published.family.architectures[0], str(folder))), tensors, published.family, folder)
    counts = count_parameters(model)
    by_type: dict[str, int] = {}
    for tensor in stored.values():
        by_type[tensor.dtype.name] = by_type.get(tensor.dtype.name, 0) + tensor.size
    total = sum(by_type.values())
    routed = [block.ffn for _, block, _ in model.routed()]
    return {
        "architecture": published.settings["architectures"][0],
        "layers": _layers(config),
        "experts": config.num_experts if routed else 0,
        "experts_per_token": routed[0].router.active() if routed else 0,
        "router": config.router.name if routed else None,
        "parameters": counts["total"],
        "active_parameters": counts["active"],
        "tensors": len(stored),
        "files": len({tensor.file for tensor in stored.values()}),
        "bytes": total,
        "bytes_by_type": by_type,
        "fits": {name: math.ceil(total * _ROOM / (memory * 1e9)) for name, memory in DEVICES.items()},
    }


def _layers(config: ModelConfig) -> str:
    encoder = f"{config.encoder_config().layers} -> " if config.num_encoder_layers else ""
    return f"{encoder}{config.layers}"
