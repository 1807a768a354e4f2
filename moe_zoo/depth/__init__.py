"""Which tokens go through a block (mixture of depths), one file per idea; this table is the registry."""

from moe_zoo.core.registry import Registry

SELECTORS = Registry(
    "selector",
    {
        "mod": "moe_zoo.depth.mixture_of_depths:MixtureOfDepths",
        "none": "moe_zoo.depth.selector:NoSelector",
        "random_depth": "moe_zoo.depth.random_depth:RandomDepth",
    },
    base="moe_zoo.depth.selector:Selector",
)
