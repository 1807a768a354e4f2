"""Our routers beside code in PyTorch. Each function gives the figures of authors.py for one router."""

import functools
import importlib
import itertools
from abc import ABC, abstractmethod
from types import SimpleNamespace as Space
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np
from authors_inputs import BIAS_E, KERNEL_DE, MIX_TE, X_TD, B, D, E, K, S, T, V, context, normal, router, spread
from checkout import (
    Checkout,
    Config,
    Idle,
    UnitVectors,
    difference,
    gates,
    lenient,
    numpy,
    tensor,
    torch,
)

from moe_zoo.analysis import chunk_sparsity
from moe_zoo.core import param
from moe_zoo.core.aux import Stat
from moe_zoo.losses.chunk_sparsity import ChunkSparsity, ChunkSparsityConfig
from moe_zoo.losses.load_balance import load_balance
from moe_zoo.losses.locality import Locality, LocalityConfig
from moe_zoo.losses.null_load_balance import null_load_balance
from moe_zoo.models import ModelAux
from moe_zoo.routing import ROUTERS
from moe_zoo.routing.recurrent import GRU
from moe_zoo.routing.router import Dims
from moe_zoo.routing.sinkhorn import log_plan
from moe_zoo.train.adaptive_sparsity import AdaptiveSparsity, AdaptiveSparsityConfig
from moe_zoo.train.scheduled_loss import ScheduledLoss, ScheduledLossConfig
from moe_zoo.train.thor import Thor, ThorConfig


def deepseek(checkout: Checkout) -> dict[str, float]:
    """Gates of V3 (sigmoid, groups by their two best, bias) and of V2 (softmax, groups by their best)."""
    theirs, out = checkout.run("inference/model.py", "Gate", "linear"), {}
    sizes = dict(dim=D, n_routed_experts=E, n_activated_experts=K, n_expert_groups=4, n_limited_groups=2)
    common = dict(num_experts_per_tok=K, n_group=4, topk_group=2, routed_scaling_factor=2.5)
    for name, score, ours, bias in (
        ("V3 ", "sigmoid", {"score_function": "sigmoid", "correction_bias": True}, {"correction": BIAS_E}),
        ("V2 ", "softmax", {"norm_topk_prob": False, "group_score": "max"}, {}),
    ):
        gate = theirs.Gate(Space(score_func=score, route_scale=2.5, **sizes))
        gate.weight.data = tensor(KERNEL_DE.T)
        gate.bias = torch.nn.Parameter(tensor(BIAS_E)) if bias else None  # theirs has one at D = 7168 only
        with torch.no_grad():
            weights_TK, experts_TK = gate(tensor(X_TD))
        decision = router("top_k", {"kernel": KERNEL_DE, **bias}, **common, **ours)(X_TD, context()).decision
        out |= gates(decision.dense().gates, spread(experts_TK, weights_TK), name)
    return out


RAW, GROUPS, TOP = {"norm_topk_prob": False}, {"n_group": 4, "topk_group": 2}, {"score_function": "softmax_of_top_k"}
SIGMOID = {"score_function": "sigmoid", "correction_bias": True, **GROUPS}
CONVENTIONS = {"mixtral": {}, "qwen3_moe": {}, "olmoe": RAW, "qwen2_moe": RAW, "granitemoe": TOP}
CONVENTIONS |= {"gpt_oss": {**TOP, "linear_bias": True}, "deepseek_v2": {**RAW, **GROUPS, "group_score": "max"}}
CONVENTIONS |= {"deepseek_v3": SIGMOID, "glm4_moe": SIGMOID}


def huggingface(package) -> dict[str, float]:
    """Gates and logits in every convention, by the model's name there; one layer's balance loss (theirs is K times)."""
    out = {"choices": 0}
    for model, settings in CONVENTIONS.items():
        module = importlib.import_module(f"{package.__name__}.models.{model}.modeling_{model}")
        (cls,) = [c for name, c in vars(module).items() if name.lower().endswith("topkrouter")]
        scale = 2.5 if "n_group" in settings else 1.0
        made = router("top_k", {}, num_experts_per_tok=K, routed_scaling_factor=scale, **settings)
        weights = {n: jnp.asarray(KERNEL_DE if n == "kernel" else BIAS_E) for n in param.arrays(made)}
        routing = param.replace(made, weights)(X_TD, context())
        sizes = dict(num_experts_per_tok=K, num_experts=E, num_local_experts=E, hidden_size=D, n_group=4, topk_group=2)
        norm, method = settings.get("norm_topk_prob", True), "group_limited_greedy"
        there = cls(Space(**sizes, routed_scaling_factor=scale, norm_topk_prob=norm, topk_method=method))
        for name, value in dict(weight=KERNEL_DE.T, bias=BIAS_E, e_score_correction_bias=BIAS_E).items():
            if hasattr(there, name):
                getattr(there, name).data = tensor(value)
        with torch.no_grad():
            logits_TE, weights_TK, experts_TK = there(tensor(X_TD))
        figures = gates(routing.decision.dense().gates, spread(experts_TK, weights_TK))
        out["choices"] += figures["choices"]
        out[model] = max(figures["gates"], difference(routing.logits, logits_TE))
        if model == "mixtral":
            for label, valid in (("balance", None), ("balance with padding", np.arange(T) % S < 50)):
                mask = None if valid is None else tensor(valid.reshape(B, S))
                ours = K * load_balance(routing.probs, routing.decision.masked(valid).counts(), valid)
                out[label] = difference(ours, module.load_balancing_loss_func((logits_TE,), E, K, mask))
    return out


def recurrent(rmoe: Checkout) -> dict[str, float]:
    """Logits and gates of three layers, and gradients back through the depth."""
    L, size = 3, 8
    cell = rmoe.run("llama_moe_rnn/rnn.py", "CustomGRUCell", nn=lenient()).CustomGRUCell
    file, stubs = "llama_moe_rnn/llama_moe_modeling.py", dict(MixtralBLockSparseTop2MLP=lambda config: None)
    block = rmoe.run(file, "MixtralSparseMoeBlock", nn=lenient(ModuleList=UnitVectors), **stubs).MixtralSparseMoeBlock
    sizes = dict(moe_router_rnn_hidden_size=size, hidden_size=D, num_local_experts=E, num_experts_per_tok=K)
    config = Config(**sizes, moe_router_type="gru", init_method=lambda parameter: None)
    w = {"project": normal(4, L, D, size, scale=0.3), "kernel": normal(5, L, size, E)}
    w |= {"w_in": normal(6, size, 3, size, scale=0.5), "w_state": normal(7, size, 3, size, scale=0.5)}
    w |= {"b_in": normal(8, 3, size, scale=0.5), "b_state": normal(9, 3, size, scale=0.5)}

    def ours(w):
        gru, carry, logits, dense = GRU(size), jnp.zeros((T, size)), [], []
        gru = param.replace(gru, {n: w[n] for n in param.arrays(gru)})
        for i in range(L):
            values = {n: w[n][i] for n in ("project", "kernel")}
            made = router("recurrent", values, num_experts_per_tok=K, recurrent_size=size)
            routing = made(jnp.asarray(X_TD), context(carry=carry, shared=gru))
            carry, logits, dense = routing.carry, [*logits, routing.logits], [*dense, routing.decision.dense().gates]
        return (sum(dense) * MIX_TE).sum(), (jnp.stack(logits), jnp.stack(dense))

    (_, (our_logits, our_gates)), grads = jax.value_and_grad(ours, has_aux=True)(w)
    gru, state, layers, logits, dense = cell(config), None, [block(config) for _ in range(L)], [], []
    for g, gate in enumerate("rzn"):
        for letter, name in (("i", "in"), ("h", "state")):
            getattr(gru, f"weight_{letter}{gate}").data = tensor(w[f"w_{name}"][:, g].T)
            getattr(gru, f"bias_{letter}{gate}").data = tensor(w[f"b_{name}"][g])
    for i, there in enumerate(layers):
        there.weight1.data, there.weight2.data = tensor(w["project"][i].T), tensor(w["kernel"][i].T)
        y_BSD, logits_TE, state = there(tensor(X_TD).reshape(B, S, D), rnn=gru, router_previous=state)
        logits, dense = [*logits, logits_TE], [*dense, y_BSD.reshape(T, D)[:, :E]]
    (sum(dense) * tensor(MIX_TE)).sum().backward()
    return {
        "logits": difference(our_logits, torch.stack(logits)),
        **gates(our_gates, torch.stack(dense)),
        "gradient of A_1": difference(grads["project"][0].T, layers[0].weight1.grad),
        "gradient of W_hn": difference(grads["w_state"][:, 2].T, gru.weight_hn.grad),
    }


def relu(remoe: Checkout) -> dict[str, float]:
    """Gates, penalty, the gradient of both, sparsity, and the coefficient over 50 steps of random sparsity."""
    folder, logged, coefficient = "megatron/core/transformer/moe", {}, 0.3
    shared = remoe.run(f"{folder}/moe_utils.py", "switch_load_balancing_loss_func", "MoEAuxLossAutoScaler")
    stubs = dict(ABC=ABC, abstractmethod=abstractmethod, MegatronModule=lenient().Module, parallel_state=Idle())
    stubs["save_to_aux_losses_tracker"] = lambda name, loss, *a, **k: logged.update({name: loss.item()})
    shared = {n: getattr(shared, n) for n in ("switch_load_balancing_loss_func", "MoEAuxLossAutoScaler")}
    theirs = remoe.run(f"{folder}/router.py", "Router", "ReLURouter", **stubs, **shared)
    config = Config(num_moe_experts=E, hidden_size=D, moe_router_topk=K, params_dtype=torch.float32)
    config.moe_relu_sparsity, config.moe_relu_l1_reg_coeff = 0, torch.tensor(coefficient)
    there = theirs.ReLURouter(config)
    there.weight.data = tensor(KERNEL_DE.T)
    there.gating = lambda x: torch.nn.functional.linear(x, there.weight)  # theirs moves the weights to a GPU first
    gates_TE, _ = there(tensor(X_TD))
    (gates_TE * tensor(MIX_TE)).sum().backward()

    def ours(kernel):
        routing = router("relu", {"kernel": kernel}, num_experts_per_tok=K)(jnp.asarray(X_TD), context())
        return (routing.decision.gates * MIX_TE).sum() + coefficient * routing.aux.terms["sparsity"], routing

    (_, routing), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(KERNEL_DE))
    out = gates(routing.decision.gates, gates_TE)
    out["penalty"] = difference(routing.aux.terms["sparsity"], logged["l1_reg_loss"])
    out["gradient"] = difference(gradient.T, there.weight.grad)
    out["sparsity"] = difference(1 - routing.aux.stats["active_fraction"].value(), config.moe_relu_sparsity)
    objective, state, logs = AdaptiveSparsity(AdaptiveSparsityConfig()), {"coefficient": jnp.float32(1e-8)}, []
    config.moe_relu_l1_reg_coeff, config.moe_relu_l1_reg_coeff_multiplier = torch.tensor(1e-8), 1.2
    file, condition = "megatron/training/training.py", "config.moe_relu_sparsity < target_sparsity"
    for active in np.random.default_rng(4).uniform(size=50):
        fractions = {"active_fraction": jnp.float32(active), "target_fraction": jnp.float32(K / E)}
        state = objective.update(state, {"layers": {"moe": {n: Stat.average(v) for n, v in fractions.items()}}})
        config.moe_relu_sparsity = torch.tensor(1 - active)
        remoe.run(file, condition, config=config, target_sparsity=1 - K / E)
        logs.append(np.log([float(state["coefficient"]), config.moe_relu_l1_reg_coeff.item()]))
    return out | {"log coefficient": difference(*np.transpose(logs))}


def block_ffn(checkout: Checkout) -> dict[str, float]:
    """Gates, both losses, their gradients, sparsity, and the coefficient of the second loss over 600 steps.

    The first sequence has two documents, the second ends in padding.
    """
    folder = "pretrain/cpm/dragonfly"
    bmt = Idle(DistributedModule=torch.nn.Module, DistributedParameter=lambda t, **k: torch.nn.Parameter(t))
    losses = checkout.run(f"{folder}/activation_context.py", "ActivationContext", bmt=bmt).ActivationContext
    parts = vars(checkout.run(f"{folder}/layer_norm.py", "LayerNorm", "rms_layernorm", bmt=bmt))
    activation = dict(bmt=bmt, get_activation_fn=lambda name: {"relu": torch.relu}[name])
    parts |= vars(checkout.run(f"{folder}/moe_modules.py", "MoELinearActiveGate", **activation))
    bank = {"forward": lambda self, x, score, up: torch.nn.functional.pad(score, (0, D - E))}
    parts |= {"MoEUpDownExperts": type("Bank", (lenient().Module,), bank)}
    parts |= {"ActivationRecorder": Idle(), "ActivationContext": losses}
    layer = checkout.run(f"{folder}/blockffn.py", "BLockFeedForward", **parts).BLockFeedForward
    L, kernel, scale = 16, KERNEL_DE / 6, 1 + normal(4, E, scale=0.3)
    chunks = dict(chunk_regularization_enabled=True, chunk_regularization_length=L)
    settings = dict(l1_lambda_option="fixed", stat_act_window_sizes="1", transfer_lambda=1.0, **chunks)
    for name, value in settings.items():
        getattr(losses, f"set_{name}")(value)
    valid_T, left_T = np.arange(T) < T - 6, np.arange(T) - 1
    left_T[[0, 23, S, *range(T - 6, T)]] = -1
    ctx, out = context(segment_ids=jnp.cumsum(left_T < 0), valid=jnp.asarray(valid_T)), {}

    def ours(kernel, loss):
        routing = router("block_ffn", {"kernel": kernel, "scale": scale})(jnp.asarray(X_TD), ctx)
        return loss(routing, ctx), routing

    chunks = ChunkSparsity(ChunkSparsityConfig(length=L))
    for name, place, loss in (("locality", 4, Locality(LocalityConfig())), ("chunk sparsity", 5, chunks)):
        there = layer(D, 8, E, dtype=torch.float32, norm_after_router="rms", eps=1e-5)
        there.moe_router.w_gate.data, there.router_norm.weight.data = tensor(kernel.T), tensor(scale)
        result = there(tensor(X_TD[None]), None, None, torch.tensor(left_T), torch.tensor(valid_T))
        result[place].backward()
        (value, routing), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(kernel), loss)
        out |= gates(routing.decision.gates, result[0][0, :, :E])
        out[name] = difference(value, result[place])
        out[f"its gradient ({name})"] = difference(gradient.T, there.moe_router.w_gate.grad)
    losses.set_stat_act_window_sizes("1,8")
    losses.stat_window_activation(tensor(routing.decision.gates))
    _, lengths, needed, places = losses.get_clear_transfer_loss()
    active_BSE = np.asarray(routing.decision.live()).reshape(B, S, E)
    for length, mine, every in zip(lengths, needed, places, strict=True):
        total, count = chunk_sparsity(active_BSE, np.ones((B, S), bool), length)
        out[f"sparsity of {length}"] = difference(total / count, 1 - mine / every)
    classes = ("BaseValueScheduler", "LinearScheduler", "AdaptiveLinearScheduler")
    schedule = checkout.run("pretrain/cpm/training_utils/value_scheduler.py", *classes, ABC=ABC, bmt=bmt)
    schedule = schedule.AdaptiveLinearScheduler(1.0, 0, 40, 20, max_factor=1.1, min_factor=1.025)
    objective, scales = ScheduledLoss(ScheduledLossConfig(start=40, every=20, cap=1.1)), []
    state = objective.init_state()
    for step, loss in enumerate(1 + np.sin(np.arange(600) / 50) / 8 + normal(5, 600, scale=0.1), 1):
        scales.append([float(state["scale"]), schedule.step(step, loss, True)])
        state = objective.update(state, {"layers": {"moe": {"chunk_sparsity": Stat.average(jnp.float32(loss))}}})
    return out | {"coefficient": difference(*np.transpose(scales))}


def smoe_dropout(checkout: Checkout) -> dict[str, float]:
    """Gates and the gradient into x for k from 2, and k at the steps of several schedules."""
    base = checkout.run("gates/base_gate.py", "BaseGate").BaseGate
    gate = checkout.run("custom_gate.py", "CustomNaiveGate", BaseGate=base).CustomNaiveGate
    schedule = checkout.run("new_utils.py", "calculate_gate_number").calculate_gate_number
    out = {"choices": 0, "gates": 0.0, "gradient into x": 0.0, "k": 0}

    def ours(x_TD, k):
        made = router("smoe_dropout", {"kernel": KERNEL_DE, "bias": BIAS_E}, eval_experts_per_tok=k)
        dense_TE = made(x_TD, context(step=jnp.int32(0))).decision.dense().gates
        return (dense_TE * MIX_TE).sum(), dense_TE

    for k in range(2, E + 1):
        there, x_TD = gate(D, E, 1, top_k=k), tensor(X_TD, requires_grad=True)
        there.gate.weight.data, there.gate.bias.data = tensor(KERNEL_DE.T), tensor(BIAS_E)
        theirs_TE = torch.zeros(T, E).scatter(1, *there(x_TD))
        (theirs_TE * tensor(MIX_TE)).sum().backward()
        (_, ours_TE), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(X_TD), k)
        figures = {**gates(ours_TE, theirs_TE), "gradient into x": difference(gradient, x_TD.grad)}
        out |= {n: max(out[n], v) for n, v in figures.items()}
    for low, high, total in ((8, 16, 400_000), (8, 16, 1000), (2, 12, 1000), (1, 16, 997), (3, 13, 260)):
        made = router("smoe_dropout", {}, k_min=low, k_max=high, total_steps=total)
        steps = np.arange(0, total + 1, max(total // 4000, 1))
        ours_k = jax.vmap(lambda step, made=made: made.k(context(train=True, step=step)))(jnp.asarray(steps))
        theirs_k = [schedule(int(n), Space(dynamic_moe_mode="linear_increase"), total, low, high) for n in steps]
        out["k"] += int((np.asarray(ours_k) != theirs_k).sum())
    return out


def unit_vectors():
    """A class of experts for lists that are iterated: the e-th one made answers with the e-th unit vector."""

    class Unit(torch.nn.Module):
        def __init__(self, *sizes):
            super().__init__()
            self.e = next(Unit.made)

        def forward(self, x):
            return torch.eye(D)[self.e].expand(x.shape)

    Unit.made = itertools.count()
    return Unit


def top_p(checkout: Checkout) -> dict[str, float]:
    """Gates and the gradient into the router for several p."""
    file, out = "modeling/modeling_moe.py", {"choices": 0, "gates": 0.0, "gradient": 0.0}

    def ours(kernel, p):
        dense_TE = router("top_p", {"kernel": kernel}, top_p=p)(X_TD, context()).decision.dense().gates
        return (dense_TE * MIX_TE).sum(), dense_TE

    for p in (0.1, 0.4, 0.7, 0.95):
        theirs = checkout.run(file, "top_p_sampling_batched_all_sequence", "SwitchMLP", LlamaMLP=unit_vectors())
        config = Config(expert_frequency=2, top_p_threshold=p, num_experts=E, hidden_size=D)
        there = theirs.SwitchMLP(config, 0)
        there.router.weight.data = tensor(KERNEL_DE.T)
        theirs_TE = there(tensor(X_TD).reshape(B, S, D)).reshape(T, D)[:, :E]
        (theirs_TE * tensor(MIX_TE)).sum().backward()
        (_, ours_TE), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(KERNEL_DE), p)
        figures = {**gates(ours_TE, theirs_TE), "gradient": difference(gradient.T, there.router.weight.grad)}
        out |= {n: max(out[n], v) for n, v in figures.items()}
    return out


def null_experts(checkout: Checkout) -> dict[str, float]:
    """Gates and the gradient into both halves of the router, and the loss where there are no nulls to average."""
    file, n = "exp_2/LLaMA_Factory/src/llamafactory/model/adaptive_moe_utils.py", 8  # their code knows 8 true experts
    names = ("CustomMixtralSparseMoeBlock", "load_balancing_loss_func_with_null_experts")
    stubs = dict(nn=lenient(ModuleList=UnitVectors), MixtralBlockSparseTop2MLP=lambda config: None)
    theirs, out = checkout.run(file, *names, **stubs, Optional=Optional), {}
    kernel, null = KERNEL_DE[:, :n], KERNEL_DE[:, n:] * 1.5

    def ours(values, **settings):
        cls = ROUTERS.get("null_experts")
        made = param.materialize(cls(cls.Config(**settings), Dims(num_experts=n, hidden_size=D)), 0)
        routing = param.replace(made, values)(jnp.asarray(X_TD), context())
        dense_TE = routing.decision.dense().gates
        return (dense_TE * MIX_TE[:, :n]).sum(), (dense_TE, routing)

    for m, k in ((8, 3), (8, 6), (4, 4)):
        values = {"kernel": jnp.asarray(kernel), "null_kernel": jnp.asarray(null[:, :m])}
        sizes = dict(hidden_size=D, num_local_experts=n, num_experts_per_tok=k, router_jitter_noise=0.0)
        there = theirs.CustomMixtralSparseMoeBlock(Config(**sizes), m)
        there.gate.weight.data, there.gate2.weight.data = tensor(kernel.T), tensor(null[:, :m].T)
        y_BSD, logits_TN = there(tensor(X_TD).reshape(B, S, D))
        theirs_TE = y_BSD.reshape(T, D)[:, :n]
        (theirs_TE * tensor(MIX_TE[:, :n])).sum().backward()
        run = jax.value_and_grad(functools.partial(ours, num_null_experts=m, picks_per_token=k), has_aux=True)
        (_, (ours_TE, routing)), gradient = run(values)
        label = f"{m} nulls k={k} "
        out |= gates(ours_TE, theirs_TE, label)
        out[f"{label}logits"] = difference(routing.logits, logits_TN)
        out[f"{label}gradient"] = difference(gradient["kernel"].T, there.gate.weight.grad)
    _, (_, routing) = ours({"kernel": jnp.asarray(kernel)}, num_null_experts=0, picks_per_token=2)
    loss = theirs.load_balancing_loss_func_with_null_experts((tensor(routing.logits),), n, 2)
    balance = null_load_balance(routing.probs, routing.decision.counts(), 2 * T)
    return out | {"balance without nulls": difference(2 * balance, loss)}


def sinkhorn(megatron: Checkout) -> dict[str, float]:
    """Gates for one and K experts, in training (both plans iterated to their end) and at inference; the plan itself."""
    folder, out = "megatron/core/transformer/moe", {}
    plan = megatron.run(f"{folder}/moe_utils.py", "sinkhorn").sinkhorn
    stubs = dict(ABC=ABC, abstractmethod=abstractmethod, MegatronModule=lenient().Module)
    stubs["sinkhorn"] = lambda logits: plan(logits, tol=1e-7)
    theirs = megatron.run(f"{folder}/router.py", "Router", "TopKRouter", **stubs).TopKRouter
    logits_TE, everyone = X_TD @ KERNEL_DE, jnp.ones(T, bool)
    ours_TE = jnp.exp(log_plan(logits_TE, everyone, 100))
    out["plan (times T)"] = T * difference(ours_TE, plan(tensor(logits_TE), 1e-7))
    for k, train in ((1, True), (K, True), (1, False), (K, False)):
        there = Space(topk=k, training=train, config=Space(moe_aux_loss_coeff=0))
        scores_TE, _ = theirs.sinkhorn_load_balancing(there, tensor(logits_TE))
        made = router("sinkhorn", {"kernel": KERNEL_DE}, num_experts_per_tok=k, iterations=100)
        decision = made(X_TD, context(train=train)).decision
        out |= gates(decision.dense().gates, scores_TE, f"top-{k} {'trained' if train else 'inference'} ")
    return out


def hashed(parlai: Checkout) -> dict[str, float]:
    """With their random table in our router: the output of the layer with their experts."""
    file = "projects/params_vs_compute/hash_ladder/hash_ladder.py"
    there, ids_T = parlai.run(file, "HashLayerFFN").HashLayerFFN({"hash_size": E, "dict_size": V}, D, 8), np.arange(T)
    x_TD, experts = tensor(X_TD), zip(there.linears1, there.linears2, strict=True)
    y_BSD = there(x_TD.reshape(B, S, D), torch.tensor(ids_T.reshape(B, S)))
    y_ETD = torch.stack([last(torch.relu(first(x_TD))) for first, last in experts])
    made = router("hash", {"table": np.asarray(there.hash_bin_map, np.int32)})
    decision = made(X_TD, context(token_ids=jnp.asarray(ids_T))).decision
    y_TD = np.einsum("te,etd->td", decision.dense().gates, numpy(y_ETD))
    return {"output": difference(y_TD, y_BSD.reshape(T, D))}


def thor(checkout: Checkout) -> dict[str, float]:
    """Loss, consistency, and gradients into the logits of both passes, by the authors' training step: over the number
    of tokens, as their trainer divides. For the model stand the logits of its two passes; the end is padding.
    """
    alpha, targets_T, counts_T = 5.0, np.random.default_rng(6).integers(1, V, T), np.arange(T) < T - 9
    logits = [normal(seed, T, V, scale=2.0) for seed in (7, 8)]
    file, register = "thor/translation_thor.py", lambda *args, **kwargs: lambda cls: cls
    stubs = dict.fromkeys(("TranslationTask", "TranslationConfig", "TranslationThorConfig", "AMPOptimizer"), Space)
    stubs["symmetric_KL_loss"] = checkout.run(file, "symmetric_KL_loss").symmetric_KL_loss
    cls = checkout.run(file, "TranslationThorTask", register_task=register, **stubs).TranslationThorTask
    task = cls.__new__(cls)
    task.cfg = Space(consistency_alpha=alpha)
    there, inputs = [tensor(z, requires_grad=True) for z in logits], ("src_tokens", "src_lengths", "prev_output_tokens")
    passes = iter(there)
    model = Idle(encoder=lambda **how: None, decoder=lambda **how: (next(passes), {}))
    padded_T = torch.tensor(np.where(counts_T, targets_T, 0))
    sample = {"target": padded_T, "ntokens": int(counts_T.sum()), "net_input": dict.fromkeys(inputs)}
    entropy = functools.partial(torch.nn.functional.cross_entropy, ignore_index=0, reduction="sum")
    compute = lambda model, output, sample, reduce: (entropy(output[0], sample["target"]),) * 2
    criterion = Space(compute_loss=compute, sentence_avg=False, padding_idx=0)
    optimizer = type("Optimizer", (), {"backward": lambda self, loss: loss.backward()})()
    loss, size, log = task.train_step(sample, model, criterion, optimizer, 0)

    def ours(logits):
        passes, rows = iter(logits), lambda x: jnp.asarray(x).reshape(B, S, *x.shape[1:])
        decoder = lambda *args, **how: (rows(next(passes)), ModelAux({}, {}), None)
        batch = {"targets": rows(targets_T), "loss_weights": rows(counts_T / counts_T.sum())}
        batch |= dict.fromkeys(("tokens", "positions", "segment_ids", "domain"), rows(np.ones(T, np.int32)))
        how = dict(step=jnp.int32(0), key=jax.random.key(0), fraction=1.0)
        return Thor(ThorConfig(alpha)).loss(decoder, batch, {}, **how)

    (our_loss, stats), gradients = jax.value_and_grad(ours, has_aux=True)([jnp.asarray(z) for z in logits])
    said = {name: stat.value() for name, stat in stats["scalars"].items()}
    return {
        "loss": difference(our_loss, loss.detach() / size),
        "reported loss": difference(said["loss"], log["loss"].mean() / size),
        "consistency": difference(said["consistency"], log["consistency"] / size),
        "gradients": max(difference(g, z.grad / size) for g, z in zip(gradients, there, strict=True)),
    }
