"""A trained model in, another model out. Each returns a new `Loaded`; the given one stays as it is."""

from moe_zoo.transform.adapters import (
    add_adapters,
    as_lora,
    average_skills,
    describe_experts,
    join_experts,
    merge,
    unmerge,
)
from moe_zoo.transform.depth import Questions, add_selectors, answered, label_paths, set_budget, teach_paths
from moe_zoo.transform.null_experts import add_null_experts
from moe_zoo.transform.oracle import losses_along, patterns, search_apart, search_greedily
from moe_zoo.transform.peft import load_adapters, save_adapter
from moe_zoo.transform.sparsity import search_sparsities, set_sparsities
from moe_zoo.transform.task_vectors import breadcrumbs, dare, task_arithmetic, ties
from moe_zoo.transform.upcycle import upcycle

__all__ = [
    "Questions", "add_adapters", "add_null_experts", "add_selectors", "answered", "as_lora", "average_skills",
    "breadcrumbs", "dare", "describe_experts", "join_experts", "label_paths", "load_adapters", "losses_along", "merge",
    "patterns", "save_adapter", "search_apart", "search_greedily", "search_sparsities", "set_budget", "set_sparsities",
    "task_arithmetic", "teach_paths", "ties", "unmerge", "upcycle",
]  # fmt: skip
