"""Routers decide. One file per idea; this table is their registry."""

from moe_zoo.core.registry import Registry

ROUTERS = Registry(
    "router",
    {
        "attention_aware": "moe_zoo.routing.token_graph:AttentionAware",
        "block_ffn": "moe_zoo.routing.block_ffn:BlockFFN",
        "duo_llm": "moe_zoo.routing.duo_llm:DuoLLM",
        "expert_choice": "moe_zoo.routing.expert_choice:ExpertChoice",
        "gshard": "moe_zoo.routing.gshard:GShard",
        "hash": "moe_zoo.routing.hashed:Hashed",
        "hybrid_k": "moe_zoo.routing.hybrid_k:HybridK",
        "modality_groups": "moe_zoo.routing.modality_groups:ModalityGroups",
        "null_experts": "moe_zoo.routing.null_experts:NullExperts",
        "noisy_top_k": "moe_zoo.routing.noisy_top_k:NoisyTopK",
        "pre_gate": "moe_zoo.routing.pre_gate:PreGate",
        "recurrent": "moe_zoo.routing.recurrent:Recurrent",
        "relu": "moe_zoo.routing.relu:ReLU",
        "similarity_aware": "moe_zoo.routing.token_graph:SimilarityAware",
        "sinkhorn": "moe_zoo.routing.sinkhorn:Sinkhorn",
        "smoe_dropout": "moe_zoo.routing.smoe_dropout:SMoEDropout",
        "soft": "moe_zoo.routing.soft:Soft",
        "sparse_ot": "moe_zoo.routing.sparse_ot:SparseOT",
        "sparsemixer": "moe_zoo.routing.sparsemixer:SparseMixer",
        "switch": "moe_zoo.routing.switch:Switch",
        "thor": "moe_zoo.routing.thor:Thor",
        "top_k": "moe_zoo.routing.top_k:TopK",
        "top_p": "moe_zoo.routing.top_p:TopP",
    },
    base="moe_zoo.routing.router:Router",
)
