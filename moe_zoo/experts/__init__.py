"""Banks compute: E experts with their weights stacked."""

from moe_zoo.core.registry import Registry

EXPERTS = Registry(
    "expert bank",
    {
        "big_small": "moe_zoo.experts.big_small:BigSmall",
        "feed_forward": "moe_zoo.experts.feed_forward:FeedForward",
    },
)
