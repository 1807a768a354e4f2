"""What a run leaves in the store: settings, curves over steps, routing statistics, how it ended.

Curves have at most 50 points and loads few enough numbers that a line stays below 60 kB; each point is the mean over
the steps since the one before.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_zoo.analysis.specialization import load_max_over_mean
from moe_zoo.models.counting import train_flops_per_token

_POINTS = 50
_LOAD_NUMBERS = 6000  # of a run's load over training

#: train metrics that are kept as curves, by their names in metrics.jsonl
_TRAIN_CURVES = {
    "bits_per_byte": "bits_per_byte",
    "moe/experts_per_token": "experts_per_token",
    "moe/dropped_fraction": "dropped_fraction",
    "moe/entropy": "entropy",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """What training had cost by the end of each logged step, all cumulative. `seconds`: by the clock of `clock`."""

    step: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray


def active_flops(model, seq_len: int, line: Mapping[str, Any], passes: int = 1) -> float:
    """Active FLOPs per token of one logged step, from the expert rows that its decisions asked for and that were kept.

    Where rows do not follow from choices (Soft MoE fills all slots), from what the router says. `passes`: of the
    objective.
    """
    rows = {}
    for path, block, ids in model.routed():
        counts = [_rows(line, layer) for layer in ids]
        if block.ffn.router.decision.__name__ != "Soft" and None not in counts:
            rows[path] = float(np.mean(counts))
    return train_flops_per_token(model, seq_len, rows, passes)


def _rows(line: Mapping[str, Any], layer: int) -> float | None:
    chosen = line.get(f"moe/layer_{layer:02d}/experts_per_token")
    return None if chosen is None else chosen * (1 - line.get(f"moe/layer_{layer:02d}/dropped_fraction", 0.0))


def clock(device: str) -> str:
    """By what time is told: "processor" seconds of training on a CPU, which other work on the machine does not
    lengthen; "wall" seconds on a device that a run has to itself.
    """
    return "processor" if device == "cpu" else "wall"


def cost_of(model, seq_len: int, lines: Sequence[Mapping[str, Any]], by: str, passes: int = 1) -> Cost:
    """Accumulated along the lines of kind "train"; a line stands for the steps since the one before it. `by`: of
    `clock`; `passes`: of the objective.
    """
    step, tokens, seconds = (
        np.asarray([line[name] for line in lines], float)
        for name in ("step", "tokens", {"wall": "seconds", "processor": "processor_seconds"}[by])
    )
    each = np.asarray([active_flops(model, seq_len, line, passes) for line in lines])
    return Cost(step, tokens, np.cumsum(each * np.diff(tokens, prepend=0.0)), seconds)


def curves(history: Sequence[Mapping[str, Any]], cost: Cost) -> dict[str, Any]:
    """{"train": {"step", "tokens", "flops", "seconds", ...}, "validation": {...}, "load": {"step", "layers"}}."""
    train = [line for line in history if line["kind"] == "train"]
    parts = np.array_split(np.arange(len(train)), min(_POINTS, len(train)))
    ends = [part[-1] for part in parts]
    found = {
        name: [train[i].get(metric, math.nan) for i in range(len(train))] for metric, name in _TRAIN_CURVES.items()
    }
    means = {name: [float(np.mean(np.asarray(values)[part])) for part in parts] for name, values in found.items()}
    violation = [_violation(line.get("expert_load")) for line in train]
    means["load_violation"] = [float(np.mean(np.asarray(violation)[part])) for part in parts]
    known = {name: values for name, values in means.items() if np.isfinite(values).any()}
    validation = [line for line in history if line["kind"] == "validation"]
    at = np.searchsorted(cost.step, [line["step"] for line in validation])
    return {
        "train": _cost_at(cost, ends) | {name: rounded(values, 5) for name, values in known.items()},
        "validation": _cost_at(cost, at)
        | {"bits_per_byte": rounded([line["bits_per_byte"] for line in validation], 6)},
        "load": _load(train),
    }


def _cost_at(cost: Cost, at) -> dict[str, list]:
    whole = lambda values: [int(v) for v in values[at]]
    return {
        "step": whole(cost.step), "tokens": whole(cost.tokens), "flops": rounded(cost.flops[at], 6),
        "seconds": rounded(cost.seconds[at], 5),
    }  # fmt: skip


def _violation(load: Sequence[Sequence[float]] | None) -> float:
    """Mean over layers of the busiest expert's load over an even share, minus 1 (MaxVio of arXiv 2408.15664)."""
    return float(np.mean([load_max_over_mean(layer) - 1 for layer in load])) if load else math.nan


def _load(train: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Load over an even share, [layer][point][expert]."""
    lines = [line for line in train if "expert_load" in line]
    if not lines:
        return None
    sizes = [len(layer) for layer in lines[-1]["expert_load"]]
    parts = np.array_split(np.arange(len(lines)), min(_POINTS, len(lines), max(4, _LOAD_NUMBERS // sum(sizes))))
    layers = []
    for layer, num_experts in enumerate(sizes):
        ratio = np.asarray([line["expert_load"][layer] for line in lines]) * num_experts
        layers.append([[round(float(v), 2) for v in ratio[part].mean(0)] for part in parts])
    return {"step": [int(lines[part[-1]]["step"]) for part in parts], "layers": layers}


def results(cost: Cost, history: Sequence[Mapping[str, Any]], test: Mapping[str, Any]) -> dict[str, float | None]:
    """Every statistic of `claims.STATISTICS`; None where it does not apply."""
    train = [line for line in history if line["kind"] == "train"]
    mean = lambda name: float(np.mean([line[name] for line in train])) if name in train[-1] else None
    worst = [float(load_max_over_mean(layer)) - 1 for layer in test["expert_load"]]
    bits = (test.get("specialization") or {}).get("bits")
    values = {
        "test_bits_per_byte": test["bits_per_byte"]["overall"],
        "load_violation": float(np.mean(worst)) if worst else None,
        "max_load_violation": max(worst, default=None),
        "dropped_fraction": mean("moe/dropped_fraction"),
        "experts_per_token": mean("moe/experts_per_token"),
        "train_flops_per_token": float(cost.flops[-1] / cost.tokens[-1]),
        "specialization": float(np.mean(bits)) if bits and None not in bits else None,
        "token_sparsity": _known_mean(test["sparsity"]["token"]),
        "chunk_sparsity": _known_mean(test["sparsity"]["chunk"]),
        "reuse": _known_mean(test["sparsity"]["reuse"]),
        "tokens_per_second": float(cost.tokens[-1] / cost.seconds[-1]) if cost.seconds[-1] > 0 else None,
    }
    return {name: rounded(value, 6) for name, value in values.items()}


def _known_mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def specialization(test: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of `evaluate`'s: names, bits, and the loads as shares of each domain; the most specialised layer's alone if all
    would be too many numbers.
    """
    found = test.get("specialization")
    if not found or not found["load"]:
        return None
    bits = [value if value is not None else -1.0 for value in found["bits"]]
    kept = list(range(len(bits)))
    if sum(np.size(matrix) for matrix in found["load"]) > _LOAD_NUMBERS // 2:
        kept = [int(np.argmax(bits))]
    share = {}
    for place in kept:
        matrix_DE = np.asarray(found["load"][place], float)
        share[str(found["layers"][place])] = rounded(matrix_DE / np.maximum(matrix_DE.sum(1, keepdims=True), 1), 3)
    return {
        "domains": found["domains"], "layers": found["layers"], "bits": rounded(found["bits"], 4),
        "normalised": rounded(found.get("normalised", []), 4), "share": share,
    }  # fmt: skip


def rounded(value: Any, digits: int) -> Any:
    """Floats to so many significant digits, in nested lists too; what is not finite becomes None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [rounded(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    return value
