"""Every adapter by the formula of its paper, one token at a time, plain numpy in float64; and how each is tried.

D and N the layer's input and output, E experts, R ranks of one, K experts per token.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from naive import softmax


def lora(x_D, p, settings):
    """One update."""
    return p["scale"][0] * (p["a"][0] @ x_D) @ p["b"][0]


def expert(x_D, p, e):
    """The output of expert e; A may be shared."""
    return (p["scale"][e] * (p["a"][e if len(p["a"]) > 1 else 0] @ x_D)) @ p["b"][e]


def mix(gates_E, x_D, p):
    return sum(g * expert(x_D, p, e) for e, g in enumerate(gates_E))


def live(p):
    return [e for e in range(len(p["scale"])) if p["scale"][e].any()]


def probabilities(logits_E, p):
    """Softmax over the experts that there are."""
    out = np.zeros(len(logits_E))
    out[live(p)] = softmax(logits_E[live(p)])
    return out


def soft_gates(x_D, p, settings, task):
    return probabilities(x_D @ p["router"], p)


def top_gates(x_D, p, settings, task):
    probs = soft_gates(x_D, p, settings, task)
    kept = sorted(range(len(probs)), key=lambda e: (-probs[e], e))[: settings.num_experts_per_tok]
    out = np.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out


def mole_gates(x_D, p, settings, task):
    outputs = np.stack([expert(x_D, p, e) for e in range(len(p["scale"]))])
    outputs = outputs / np.sqrt((outputs**2).sum() / outputs.shape[1])
    logits = sum(outputs[e] @ p["router"][e] for e in range(len(outputs)))
    return probabilities(logits / np.exp(p["log_temperature"][0]), p)


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of an entry, and its gates for one token; None: it has one expert and none."""

    settings: dict
    gates: Callable | None = None


PATTERNS = {"target_modules": ["mixer.*", "w_up", "w_down"], "r": 3, "lora_alpha": 6.0}

CASES = {
    "lora": Case({"name": "lora", "rank_pattern": {"layers.1.mixer.q": 2}, "alpha_pattern": {"w_up": 3.0}}),
    "rslora": Case({"name": "lora", "use_rslora": True, "layers_to_transform": [1]}),
    "dora": Case({"name": "lora", "use_dora": True}),
    "loramoe": Case(
        {"name": "loramoe", "num_experts": 4, "blc_weight": 0.1, "blc_alpha": 0.5, "task_types": [1, 0]}, soft_gates
    ),
    "mola": Case({"name": "mola", "experts_by_depth": [2, 4], "router_aux_loss_coef": 0.1}, top_gates),
    "hydralora": Case({"name": "hydralora", "num_experts": 3}, soft_gates),
    "mole": Case({"name": "mole", "num_experts": 3}, mole_gates),
}
