"""Routers decide. One file per idea; this table is their registry."""

from moe_zoo.core.registry import Registry

ROUTERS = Registry(
    "router",
    {
        "top_k": "moe_zoo.routing.top_k:TopK",
        "switch": "moe_zoo.routing.switch:Switch",
    },
)
