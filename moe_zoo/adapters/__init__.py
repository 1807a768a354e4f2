"""Mixtures of LoRA: what acts beside a frozen linear layer. One file per idea; this table is their registry."""

from moe_zoo.core.registry import Registry

ADAPTERS = Registry(
    "adapter",
    {
        "arrow": "moe_zoo.adapters.arrow:Arrow",
        "dynmole": "moe_zoo.adapters.dynmole:DynMole",
        "glider": "moe_zoo.adapters.glider:Glider",
        "hydralora": "moe_zoo.adapters.hydralora:HydraLora",
        "lora": "moe_zoo.adapters.lora:Lora",
        "lora_mixer": "moe_zoo.adapters.lora_mixer:LoraMixer",
        "loramoe": "moe_zoo.adapters.loramoe:LoraMoE",
        "mixlora": "moe_zoo.adapters.mixlora:MixLora",
        "mogu": "moe_zoo.adapters.mogu:Mogu",
        "mola": "moe_zoo.adapters.mola:Mola",
        "mole": "moe_zoo.adapters.mole:Mole",
        "mos": "moe_zoo.adapters.mos:Mos",
        "none": "moe_zoo.adapters.none:NoAdapter",
        "phatgoose": "moe_zoo.adapters.phatgoose:Phatgoose",
        "poly": "moe_zoo.adapters.poly:Poly",
        "same": "moe_zoo.adapters.same:Same",
        "smora": "moe_zoo.adapters.smora:Smora",
        "xlora": "moe_zoo.adapters.xlora:XLora",
    },
    base="moe_zoo.adapters.adapter:Adapter",
)
