"""Dispatchers move. They turn a decision into rows for a bank and bring the rows back; drops are counted here."""

from moe_zoo.core.registry import Registry

DISPATCHERS = Registry(
    "dispatcher",
    {
        "capacity": "moe_zoo.dispatch.capacity:Capacity",
        "dropless": "moe_zoo.dispatch.dropless:Dropless",
        "everywhere": "moe_zoo.dispatch.everywhere:Everywhere",
        "slots": "moe_zoo.dispatch.slots:Slots",
    },
)
