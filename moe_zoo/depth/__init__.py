"""Which tokens, or whole sequences, go through a block, one file per idea; this table is the registry."""

from moe_zoo.core.registry import Registry

SELECTORS = Registry(
    "selector",
    {
        "dr_llm": "moe_zoo.depth.dr_llm:DrLlm",
        "first": "moe_zoo.depth.first:First",
        "fixed_depth": "moe_zoo.depth.fixed_depth:FixedDepth",
        "ftp": "moe_zoo.depth.ftp:Ftp",
        "mod": "moe_zoo.depth.mixture_of_depths:MixtureOfDepths",
        "none": "moe_zoo.depth.selector:NoSelector",
        "random_depth": "moe_zoo.depth.random_depth:RandomDepth",
    },
    base="moe_zoo.depth.selector:Selector",
)
