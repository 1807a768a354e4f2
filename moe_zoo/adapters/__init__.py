"""Mixtures of LoRA: what acts beside a frozen linear layer. One file per idea; this table is their registry."""

from moe_zoo.core.registry import Registry

ADAPTERS = Registry(
    "adapter",
    {
        "hydralora": "moe_zoo.adapters.hydralora:HydraLora",
        "lora": "moe_zoo.adapters.lora:Lora",
        "loramoe": "moe_zoo.adapters.loramoe:LoraMoE",
        "mola": "moe_zoo.adapters.mola:Mola",
        "mole": "moe_zoo.adapters.mole:Mole",
        "none": "moe_zoo.adapters.none:NoAdapter",
    },
)
