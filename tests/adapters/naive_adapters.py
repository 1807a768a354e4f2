"""Every adapter by the formula of its paper, one token at a time, plain numpy in float64; and how each is tried.

D and N the layer's input and output, E experts, R ranks of one, K experts per token.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from naive import softmax


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


def tsallis_gates(x_D, p, settings, task):
    probs = soft_gates(x_D, p, settings, task)
    order = sorted(range(len(probs)), key=lambda e: (-probs[e], e))
    kept, mass = [], 0.0
    for rank, e in enumerate(order):
        mass += probs[e]
        kept += [e] if mass <= settings.top_p or rank < settings.keep_top_k else []
    q, E = settings.entropy_index, len(probs)
    entropy = (1 - ((probs + 1e-5) ** q).sum()) / (1 - E ** (1 - q))
    return probs if entropy > settings.entropy_threshold else np.where(np.isin(range(E), kept), probs, 0)


def rank_gates(x_D, p, settings, task):
    q = 1 / (1 + np.exp(-x_D @ p["router"])) + p["bias"]
    kept = sorted(range(len(q)), key=lambda e: (-q[e], e))[: settings.num_experts_per_tok]
    out = np.zeros_like(q)
    out[kept] = np.maximum(q[kept], 0)
    return settings.num_experts_per_tok * out / out.sum()


def responder_gates(x_D, p, settings, task):
    return 1 / (1 + np.exp(-(x_D @ p["router"] + p["bias"])))


def unfrozen_gates(x_D, p, settings, task):
    probs = soft_gates(x_D, p, settings, task)
    unit = lambda v: (v - v.min()) / (v.max() - v.min())
    score = unit(p["this_use"]) - unit(p["past_energy"])
    frozen = (score < settings.freeze_below) & (np.arange(len(score)) != score.argmax()) & (p["this_tokens"] > 0)
    return np.where(frozen, 0, probs) / probs[~frozen].sum()


def task_gates(x_D, p, settings, task):
    return np.eye(len(p["scale"]))[task]


#: gates that another part of the model decided, by task
GIVEN = np.array([[0.5, 0.2, 0.3], [0.0, 0.9, 0.1]])


def given_gates(x_D, p, settings, task):
    return GIVEN[task]


def merged_skills(x_D, p, settings, task):
    """A and B mixed head by head, then one LoRA."""
    S, R, D = p["a"].shape
    N, h = p["b"].shape[-1], settings.num_splits
    A, B = np.zeros((R, D)), np.zeros((R, N))
    for head in range(h):
        u = 1 / (1 + np.exp(-p["logits"][task, head]))
        w = u / u.sum()
        rows, columns = (slice(head * size // h, (head + 1) * size // h) for size in (D, N))
        for s in range(S):
            A[:, rows] += w[s] * p["a"][s][:, rows]
            B[:, columns] += w[s] * p["b"][s][:, columns]
    return p["scale"][0] * (A @ x_D) @ B


def arrow_gates(x_D, p, settings, task):
    probs = probabilities(np.abs(x_D @ p["router"]), p)
    kept = sorted(range(len(probs)), key=lambda e: (-probs[e], e))[: settings.num_experts_per_tok]
    out = np.where(np.isin(range(len(probs)), kept), probs, 0)
    return out / out.sum()


def sigmoid_gates(x_D, p, settings, task):
    return 1 / (1 + np.exp(-x_D @ p["router"]))


def standard_gates(x_D, p, settings, task, bias_E=0):
    standard = lambda v: (v - v.mean()) / np.sqrt(v.var() + 1e-5)
    scores = np.array([standard(x_D) @ standard(v) for v in p["router"].T]) / np.sqrt(len(x_D))
    probs = probabilities(scores + bias_E, p)
    kept = sorted(range(len(probs)), key=lambda e: (-probs[e], e))[: settings.num_experts_per_tok]
    out = np.where(np.isin(range(len(probs)), kept), probs, 0)
    return out / out.sum()


#: what is added to the logits of all tokens of a sequence
BIAS = np.array([[0.9, -0.4, 0.2]])


def biased_gates(x_D, p, settings, task):
    return standard_gates(x_D, p, settings, task, BIAS[0])


def assembled(pool, row, per_vector):
    """A and B of one layer from its shards, in strides."""
    join = lambda shards, index: np.concatenate([shards[index][i::per_vector] for i in range(per_vector)], axis=1)[None]
    index = pool["index"].astype(int)
    return {"a": join(pool["shards_a"], index[0, row]), "b": join(pool["shards_b"], index[-1, row])}


@dataclasses.dataclass(frozen=True)
class Case:
    """Settings of an entry; its gates for one token, or what it adds, if that is no sum over gates. `own_feed_forward`:
    its feed-forward part is no sum of linear layers' and has a test of its own. `shared`: what all layers are told.
    """

    settings: dict
    gates: Callable | None = None
    adds: Callable | None = None
    gates_base: bool = False  # gates weigh the base's output, too
    own_feed_forward: bool = False
    shared: np.ndarray | None = None


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
    "mixlora": Case(
        {"name": "mixlora", "num_experts": 3, "target_modules": ["mixer.*", "ffn.*"], "router_aux_loss_coef": 0.1},
        own_feed_forward=True,
    ),
    "dynmole": Case(
        {"name": "dynmole", "num_experts": 4, "entropy_threshold": 0.7, "router_aux_loss_coef": 0.1}, tsallis_gates
    ),
    "mogu": Case({"name": "mogu", "freeze_experts": False, "unsafe_domains": [1]}, responder_gates, gates_base=True),
    "same": Case({"name": "same", "num_experts": 3, "freeze_below": -0.6}, unfrozen_gates),
    "smora": Case({"name": "smora", "r": 6, "num_experts_per_tok": 2, "bias_update_rate": 0.1}, rank_gates),
    "lora_mixer": Case({"name": "lora_mixer", "num_experts": 3, "num_experts_per_tok": 2}, soft_gates),
    "lora_mixer_by_task": Case(
        {"name": "lora_mixer", "num_experts": 2, "num_experts_per_tok": 1, "routing": "task"}, task_gates
    ),
    "xlora": Case({"name": "xlora", "num_experts": 3}, given_gates),
    "xlora_layerwise": Case(
        {"name": "xlora", "num_experts": 3, "layerwise_scalings": True, "freeze_experts": False}, given_gates
    ),
    "arrow": Case({"name": "arrow", "num_experts": 3, "num_experts_per_tok": 2, "freeze_experts": False}, arrow_gates),
    "phatgoose_gate": Case({"name": "phatgoose"}, sigmoid_gates),
    "phatgoose": Case(
        {"name": "phatgoose", "stage": "route", "num_experts": 3, "freeze_experts": False}, standard_gates
    ),
    "glider": Case(
        {"name": "glider", "num_experts": 3, "freeze_experts": False, "embedding_size": 8}, biased_gates, shared=BIAS
    ),
    "mos": Case({"name": "mos", "r": 3, "rank_budget": 2, "private_rank": 1}),
    "poly": Case({"name": "poly", "num_tasks": 2, "num_skills": 3}, adds=merged_skills),
    "mhr": Case({"name": "poly", "num_tasks": 2, "num_skills": 3, "num_splits": 2}, adds=merged_skills),
}
