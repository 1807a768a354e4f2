"""What a router is trained by, besides the task. This table is the registry; a model names any number of them."""

from moe_zoo.core.registry import Registry

LOSSES = Registry(
    "loss",
    {
        "chunk_sparsity": "moe_zoo.losses.chunk_sparsity:ChunkSparsity",
        "entropy_loss": "moe_zoo.losses.entropy_loss:EntropyLoss",
        "expected_load": "moe_zoo.losses.variation:ExpectedLoad",
        "importance": "moe_zoo.losses.variation:Importance",
        "load_balance": "moe_zoo.losses.load_balance:LoadBalance",
        "locality": "moe_zoo.losses.locality:Locality",
        "null_load_balance": "moe_zoo.losses.null_load_balance:NullLoadBalance",
        "route_targets": "moe_zoo.losses.route_targets:RouteTargets",
        "z_loss": "moe_zoo.losses.z_loss:ZLoss",
    },
)
