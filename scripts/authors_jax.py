"""Our routers beside code in JAX and TensorFlow. Each function gives the figures of authors.py for one router."""

import dataclasses
import importlib
import math
from types import SimpleNamespace as Space

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from authors_inputs import KERNEL_DE, MIX_TE, X_TD, B, D, E, K, S, T, context, normal, router, spread
from checkout import (
    Checkout,
    Dimension,
    Idle,
    Named,
    Static,
    difference,
    gates,
    mesh_tensorflow,
    tensorflow,
)

from moe_zoo.dispatch.capacity import Capacity, CapacityConfig
from moe_zoo.losses.load_balance import LoadBalance, LoadBalanceConfig, load_balance
from moe_zoo.losses.variation import ExpectedLoad, Importance, VariationConfig
from moe_zoo.losses.z_loss import z_loss
from moe_zoo.routing.sparse_ot import transport_plan


def soft(vmoe: Checkout) -> dict[str, float]:
    """Dispatch and combine weights."""
    stubs = dict(nn=flax.linen, logging=Idle(), Bfloat16Dispatcher=lambda dispatcher: dispatcher)
    stubs["EinsumDispatcher"] = lambda combine, dispatch, **options: (dispatch, combine)
    theirs = vmoe.run("vmoe/projects/soft_moe/router.py", "normalize", "SoftRouter", "cosine_psim", **stubs)
    values = {"mu": normal(4, D, E, 3, scale=D**-0.5), "scale": jnp.float32(3)}
    (dispatch, combine), _ = theirs.SoftRouter(E, 3).apply({"params": values}, X_TD.reshape(B, S, D))
    made = router("soft", {"phi": values["mu"], "scale": values["scale"]}, slots_per_expert=3)
    decision = made(X_TD, context()).decision
    return {"dispatch": difference(decision.dispatch, dispatch), "combine": difference(decision.combine, combine)}


def flaxformer_router(checkout: Checkout, name: str, *fields):
    """One of their routers. The dense layer that makes its logits is a plain product."""
    names = ("_favor_one_hot_slices", "_take_along_axis", "_top_k", "_load_balancing_loss", "_router_z_loss")
    stubs = dict(nn=flax.linen, flax_partitioning=Space(with_sharding_constraint=lambda x, axes: x))
    file, classes = "flaxformer/architectures/moe/routing.py", ("RouterMask", "Router", "MaskedRouter", name)
    return getattr(checkout.run(file, *names, *classes, **stubs), name)(lambda x, _: x @ KERNEL_DE, *fields)


def expert_choice(flaxformer: Checkout) -> dict[str, float]:
    """Who chose whom, with padding in one sequence."""
    x_BSD = X_TD.reshape(B, S, D).copy()
    x_BSD[1, 50:] = 0  # they know padding by its zeros
    there = flaxformer_router(flaxformer, "ExpertsChooseMaskedRouter", 0.0, jnp.float32, True)
    theirs_BSE = there.apply({}, x_BSD, E, 2 * S // E).combine_array.sum(-1)
    ctx = context(valid=jnp.asarray(x_BSD.reshape(T, D).any(-1)))
    decision = router("expert_choice", {"kernel": KERNEL_DE})(x_BSD.reshape(T, D), ctx).decision
    return gates(jnp.einsum("bec,becs->bse", decision.gates, jax.nn.one_hot(decision.tokens, S)), theirs_BSE)


def switch(flaxformer: Checkout) -> dict[str, float]:
    """Top-1 with jitter and raw top-2, both with capacity and drops; balance and z losses (theirs is K times ours)."""
    out = {}
    for k, name, settings in ((1, "switch", {"jitter": 0.1}), (2, "top_k", {"norm_topk_prob": False})):
        fields = ("TokensChooseMaskedRouter", settings.get("jitter", 0.0), jnp.float32, False, k, False)
        there = flaxformer_router(flaxformer, *fields)
        rng = {"jitter": jax.random.key(3)}
        ctx = context(train=True, key=there.apply({}, rngs=rng, method=lambda m: m.make_rng("jitter")))
        mask = there.apply({}, X_TD.reshape(B, S, D), E, math.ceil(1.25 * k * S / E), rngs=rng)
        routing = router(name, {"kernel": KERNEL_DE}, **settings)(jnp.asarray(X_TD), ctx)
        plan = Capacity(CapacityConfig(1.25, group="sequence")).plan(routing.decision, ctx)
        kept_TE = spread(routing.decision.experts, np.where(plan.slot < plan.num_rows, routing.decision.gates, 0))
        counts_BE = (routing.decision.dense().gates > 0).reshape(B, S, E).sum(1)
        balance_B = [load_balance(p, c) for p, c in zip(routing.probs.reshape(B, S, E), counts_BE, strict=True)]
        out |= gates(kept_TE, mask.combine_array.sum(-1).reshape(T, E), f"top-{k} ")
        out[f"top-{k} balance"] = difference(k * np.mean(balance_B), mask.auxiliary_loss)
        out[f"top-{k} z"] = difference(z_loss(routing.logits), mask.router_z_loss)
    return out


def noisy_top_k(tensor2tensor: Checkout) -> dict[str, float]:
    """Gates, smooth load, both losses and the gradient of all into both matrices, with the same noise."""
    values = {"kernel": jnp.asarray(KERNEL_DE), "noise_kernel": jnp.asarray(normal(4, D, E, scale=0.3))}
    key, names = jax.random.key(3), {"w_gate": "kernel", "w_noise": "noise_kernel"}
    current = dict(values)
    tf = tensorflow(
        get_variable=lambda name, *a: current[names[name]], random_normal=lambda shape: jax.random.normal(key, shape)
    )
    functions = ("_rowwise_unsorted_segment_sum", "_normal_distribution_cdf", "_prob_in_top_k", "cv_squared")
    stubs = dict(tf=tf, common_layers=Space(should_generate_summaries=lambda: False))
    file = "tensor2tensor/utils/expert_utils.py"
    there = tensor2tensor.run(file, *functions, "_my_top_k", "noisy_top_k_gating", **stubs)

    def theirs(values):
        current.update(values)
        gates_TE, load_E = there.noisy_top_k_gating(X_TD.view(Static), E, True, K)
        balance = jnp.stack([there.cv_squared(gates_TE.sum(0)), there.cv_squared(load_E)])
        return (gates_TE * MIX_TE).sum() + balance.sum(), (gates_TE, load_E, *balance)

    def ours(values):
        ctx = context(train=True, key=key)
        routing = router("noisy_top_k", values, num_experts_per_tok=K)(jnp.asarray(X_TD), ctx)
        gates_TE = routing.decision.dense().gates
        balance = [loss(VariationConfig())(routing, ctx) for loss in (Importance, ExpectedLoad)]
        return (gates_TE * MIX_TE).sum() + sum(balance), (gates_TE, routing.aux.terms["expected_load"], *balance)

    (_, mine), my_grads = jax.value_and_grad(ours, has_aux=True)(values)
    (_, yours), your_grads = jax.value_and_grad(theirs, has_aux=True)(values)
    out = gates(mine[0], yours[0])
    for label, a, b in zip(("load", "importance loss", "load loss"), mine[1:], yours[1:], strict=True):
        out[label] = difference(a, b)
    return out | {f"gradient of {name}": difference(my_grads[ours], your_grads[ours]) for name, ours in names.items()}


def gshard(mesh: Checkout) -> dict[str, float]:
    """GShard's and ST-MoE's second expert: gates of what finds a place, loss, gradient of both, with the same draws."""
    out, key, C = {}, jax.random.key(3), 2 * S // E
    row, token, width, experts = (Dimension(*d) for d in (("row", B), ("token", S), ("width", D), ("expert", E)))
    current = {"kernel": jnp.asarray(KERNEL_DE)}
    mtf = mesh_tensorflow(
        layers=Space(dense=lambda x, dim, **k: Named(x.value @ current["kernel"], (*x.dims[:-1], dim))),
        random_uniform=lambda _, shape: Named(jax.random.uniform(key, (T,)).reshape(B, S), shape.dims),
    )
    there = mesh.run("mesh_tensorflow/transformer/moe.py", "_top_2_gating", mtf=mtf, tf=Space(bool=jnp.bool_))
    for threshold, label in ((0.5, "GShard "), (0.2, "ST-MoE ")):
        settings = dict(use_second_place_loss=False, second_policy_train="random", second_threshold_train=threshold)
        settings = Space(**{f"moe_{name}": value for name, value in settings.items()})

        def theirs(kernel, settings=settings):
            current["kernel"] = kernel
            x, places = Named(jnp.asarray(X_TD).reshape(B, S, D), (row, token, width)), Dimension("place", C)
            _, combine, loss = there._top_2_gating(x, None, experts, places, settings, True, None)
            gates_TE = combine.value.sum(-1).reshape(T, E)
            return (gates_TE * MIX_TE).sum() + loss.value, (gates_TE, loss.value)

        def ours(kernel, threshold=threshold):
            ctx = context(train=True, key=key)
            routing = router("gshard", {"kernel": kernel}, second_threshold=threshold)(jnp.asarray(X_TD), ctx)
            plan = Capacity(CapacityConfig(1.0, group="sequence")).plan(routing.decision, ctx)
            gates_TK = jnp.where(plan.slot < plan.num_rows, routing.decision.gates, 0)
            gates_TE = dataclasses.replace(routing.decision, gates=gates_TK).dense().gates
            loss = LoadBalance(LoadBalanceConfig(over="sequence", choices="first"))(routing, ctx)
            return (gates_TE * MIX_TE).sum() + loss, (gates_TE, loss)

        (_, mine), my_gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(KERNEL_DE))
        (_, yours), your_gradient = jax.value_and_grad(theirs, has_aux=True)(jnp.asarray(KERNEL_DE))
        out |= gates(mine[0], yours[0], label)
        out |= {f"{label}loss": difference(mine[1], yours[1])}
        out |= {f"{label}gradient": difference(my_gradient, your_gradient)}
    return out


def sparse_ot(vmoe: Checkout) -> dict[str, float]:
    """The plan of each sequence after 20 steps, and the gates by it. Needs jaxopt, their solver."""
    jaxopt, projection = (importlib.import_module(name) for name in ("jaxopt", "jaxopt._src.projection"))
    file, names = "ksparse_projection_routing.py", ("_max_l2_top_k", "_get_sparsity_constrained_ot_algorithm")
    theirs = vmoe.run(f"vmoe/projects/sparsity_constrained_ot/{file}", *names, jaxopt=jaxopt, projection=projection)
    solver = lambda fun: jaxopt.OptaxSolver(fun, opt=optax.adam(1e-2), maxiter=20)
    k = 2 * S // E
    solve = theirs._get_sparsity_constrained_ot_algorithm(S, E, k, solver, row_sparse=False)
    kernel = 3 * KERNEL_DE  # far from uniform: some experts want fewer than k tokens
    probs_BSE = jax.nn.softmax(X_TD.reshape(B, S, D) @ kernel)
    plan_BSE = jax.vmap(solve)(probs_BSE)
    ours = lambda sim_SE: transport_plan(sim_SE.T, jnp.ones(S, bool), k, 20, 1e-2, 1.0).T
    decision = router("sparse_ot", {"kernel": kernel})(X_TD, context()).decision
    dense_BSE = jnp.einsum("bec,becs->bse", decision.gates, jax.nn.one_hot(decision.tokens, S))
    figures = gates(dense_BSE, jnp.where(plan_BSE > 0, probs_BSE, 0))
    return {"plan": difference(jax.vmap(ours)(probs_BSE), plan_BSE), **figures}
