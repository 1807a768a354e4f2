"""What the routers did: load, specialization, pictures.

Names are loaded at first use: matplotlib takes half a second that a training run should pay at its end, if at all.
The mutual information of domains and experts is `specialization.specialization`, since a function of the package
can't have the name of its module.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "load_entropy": "specialization",
    "load_max_over_mean": "specialization",
    "plot_domain_experts": "plots",
    "plot_expert_load": "plots",
    "plot_layer_load": "routing_plots",
    "plot_loss": "plots",
    "plot_token_routing": "routing_plots",
}

__all__ = [
    "load_entropy",
    "load_max_over_mean",
    "plot_domain_experts",
    "plot_expert_load",
    "plot_layer_load",
    "plot_loss",
    "plot_token_routing",
    "specialization",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _HOME.values():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
