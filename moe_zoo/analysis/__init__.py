"""What the routers did: load, specialization, sparsity over neighbours, pictures.

Names are loaded at first use: matplotlib takes half a second that a training run should pay at its end, if at all.
Statistics of a model on held-out text are measured by `moe_zoo.train.evaluate`; here is what is made of the counts.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Specialization": "specialization",
    "TokenDepth": "depth_over_text",
    "chunk_sparsity": "sparsity",
    "load_entropy": "specialization",
    "load_max_over_mean": "specialization",
    "mutual_information": "specialization",
    "plot_accuracy": "class_plots",
    "plot_domain_experts": "plots",
    "plot_expert_load": "plots",
    "plot_layer_load": "routing_plots",
    "plot_loss": "plots",
    "plot_patch_depth": "class_plots",
    "plot_token_depth": "depth_over_text",
    "plot_token_routing": "routing_plots",
    "reuse": "sparsity",
    "write_token_depth": "depth_over_text",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _HOME.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
