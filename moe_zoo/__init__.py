"""moe_zoo: conditional computation in JAX. A router decides, a dispatcher moves, a bank computes."""

import importlib

__version__ = "0.1.0"

_LAZY = dict.fromkeys(("Loaded", "Output", "load", "save", "save_hf"), "moe_zoo.inference")

__all__ = ["Loaded", "Output", "load", "routers", "save", "save_hf"]


def routers() -> dict[str, str]:
    """Every router by name, with a line on what it does."""
    from moe_zoo.routing import ROUTERS

    return ROUTERS.lines()


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'moe_zoo' has no attribute {name!r}")
