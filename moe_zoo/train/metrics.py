"""One step's statistics as flat numbers: the same names for every router, in total and per layer."""

import math
from typing import Any

import numpy as np

from moe_zoo.analysis.specialization import load_max_over_mean
from moe_zoo.models.decoder import per_layer

# statistics that are arrays over experts have their own place in the line
_ARRAYS = ("load", "load_by_domain")


def flatten(stats: dict[str, Any], layer_ids: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Host statistics of a step -> one metrics line.

    `loss` (nats per token or example), `router_loss`, `grad_norm`, `learning_rate`, `skipped_steps`, then
    `moe/<name>` averaged over layers, `moe/layer_03/<name>` for each, and `expert_load`: for each routed layer, the
    share of each expert.
    """
    line = {name: float(value) for name, value in stats["scalars"].items()}
    rows = per_layer({path: (layer_ids[path], s) for path, s in stats["layers"].items()})
    names: dict[str, list[float]] = {}
    loads = []
    for layer, values in rows:
        scalars = {name: float(v) for name, v in values.items() if name not in _ARRAYS and np.ndim(v) == 0}
        if "load" in values:
            counts = np.asarray(values["load"], float)
            loads.append((counts / max(counts.sum(), 1)).tolist())
            scalars["load_max_over_mean"] = float(load_max_over_mean(counts))
        for name, value in scalars.items():
            line[f"moe/layer_{layer:02d}/{name}"] = value
            names.setdefault(name, []).append(value)
    line |= {f"moe/{name}": float(np.mean(values)) for name, values in names.items()}
    if loads:
        line["expert_load"] = loads
    return line


def first_non_finite(line: dict[str, Any]) -> str | None:
    """The first metric that is NaN or infinite, the loss before all others."""
    for name, value in sorted(line.items(), key=lambda item: item[0] != "loss"):
        if isinstance(value, float) and not math.isfinite(value):
            return name
    return None
