"""Our adapters beside code in PyTorch. Each function gives the figures of authors.py for one adapter."""

from copy import deepcopy
from types import SimpleNamespace as Space

import jax.numpy as jnp
import numpy as np
from authors_inputs import X_TD, B, D, E, S, T, normal
from checkout import Checkout, difference, numpy, tensor, torch

from moe_zoo.adapters import ADAPTERS
from moe_zoo.adapters.mos import Pool
from moe_zoo.adapters.targets import Linear
from moe_zoo.core import param
from moe_zoo.core.context import RoutingContext
from moe_zoo.core.schema import build_choice

N, R, M, LAYERS = 24, 4, 48, 6
LINEAR = Linear("mixer.q", D, N, (None, None), tuple(range(LAYERS)), LAYERS)


def mos(checkout: Checkout) -> dict[str, float]:
    """A and B of every layer from the same shards. Which shards theirs draws as a layer's own, in how many places that
    is not as ours, and how many it takes twice.
    """
    names = "transform_chunks", "LoraLayer_reset_lora_parameters", "kaiming_uniform_"
    theirs = checkout.run("modules/Tied_LoRA.py", *names, print=lambda *text: None)
    e, p, r, per = 2, 1, 5, 4
    settings = {"name": "mos", "r": r, "rank_budget": e, "private_rank": p, "shards_per_vector": per}
    config = build_choice(ADAPTERS, settings, "adapters").config
    pool = param.materialize(Pool(config, LINEAR, LINEAR.layers, LAYERS), 0)
    shards = [normal(side, e * LAYERS * per, size // per) for side, size in enumerate((D, N))]
    index = np.asarray(pool.index[...])
    pool = param.replace(pool, {"index": index} | dict(zip(("shards_a", "shards_b"), map(jnp.asarray, shards))))
    put = lambda side: [theirs.transform_chunks(tensor(shards[side]), torch.tensor(row), per) for row in index[side]]
    out = {name: difference(pool.vectors()[side], torch.stack(put(side))) for side, name in enumerate("AB")}
    out |= {"own": 0, "twice": 0}
    there = {"valid_param_lora_r": e, "valid_param_private_r": p, "r": r, "num_chunk_per_vec": per}
    there |= {"init_lora_A_vec_std": None, "init_lora_A_vec_value": 1.0}
    for layer in range(LAYERS):
        masks = [torch.zeros(r * per, dtype=torch.long) for _ in "AB"]
        parts = dict(zip(("lora_A", "lora_B"), [Space(weight=tensor(shard)) for shard in shards]))
        parts |= dict(zip(("lora_pair_mask", "lora_pair_mask_B"), masks))
        parts |= {name: torch.zeros(r) for name in ("lora_A_vec", "lora_A_anti_vec")}
        at = Space(ft_mode="mos", layer_idx=layer, layer_num=LAYERS, **{n: {"x": part} for n, part in parts.items()})
        theirs.LoraLayer_reset_lora_parameters(at, "x", there)
        for mask, mine in zip(masks, index[:, layer]):
            out["own"] += int((numpy(mask)[-p * per :] != mine[-p * per :]).sum())
            out["twice"] += len(mask) - len(set(mask.tolist()))
    return out


def glider(checkout: Checkout) -> dict[str, float]:
    """A layer's output without the global term (PHATGOOSE), with kappa 3 and 100; theirs takes a sequence at a time."""
    folder = "src/peft/tuners/molora"
    layers = checkout.run(f"{folder}/layers.py", "AutoEncodersGate", "MoLoRALinearDense", "MoLoRALinearLayer")
    model = checkout.run(f"{folder}/model.py", "MoLoRAModel", BaseTuner=torch.nn.Module, deepcopy=deepcopy)
    sizes = dict(top_k=2, top_p=1.0, reweight_output=True, lora_dim=R, lora_alpha=1, lora_dropout=0.0)
    there = layers.MoLoRALinearLayer("x", D, N, moe_num_experts=E, same_init=False, bias=False, **sizes)
    a_ERD, b_ERN = normal(1, E, R, D, scale=0.2), normal(2, E, R, N, scale=0.5)
    v_DE, w_DN = normal(3, D, E), normal(4, D, N, scale=0.2)
    there.weight.data, there.lora_gate["x"].weight.data = tensor(w_DN.T), tensor(v_DE.T)
    for e, expert in enumerate(there.lora_experts["x"]):
        expert.lora_A.weight.data, expert.lora_B.weight.data = tensor(a_ERD[e]), tensor(b_ERN[e].T)
    there.apply_layer_norm_to_gate()
    known_EM, asked_BM, out = normal(5, E, M), normal(6, B, M), {}
    for kappa in (0, 3, 100):
        settings = dict(name="glider", num_experts=E, r=R, lora_alpha=1.0, embedding_size=M, kappa=float(kappa))
        choice = build_choice(ADAPTERS, settings, "adapters")
        values = {"a": a_ERD, "b": b_ERN, "router": v_DE, "scale": choice.config.scales(LINEAR)[0]}
        ours = param.replace(choice.cls(choice.config, LINEAR), {n: jnp.asarray(v) for n, v in values.items()})
        likeness = choice.cls.make_shared(choice.config, [LINEAR], num_layers=LAYERS, hidden_size=D)
        bias = param.replace(likeness, {"embeddings": jnp.asarray(known_EM)}).first(jnp.asarray(asked_BM))
        ctx = RoutingContext(batch=B, seq=S, shared={"adapters": bias})
        y_TN, _ = ours(jnp.asarray(X_TD), jnp.asarray(X_TD @ w_DN), jnp.asarray(w_DN), ctx)
        there.bias_routing_scale, rows = float(kappa), []
        for row in range(B):
            stand_in = Space(bias_router=tensor(known_EM), molora_linear_named_modules=lambda: [("", there)])
            model.MoLoRAModel.update_routing_bias(stand_in, tensor(asked_BM[row : row + 1]))
            with torch.no_grad():
                rows.append(numpy(there(tensor(X_TD.reshape(B, S, D)[row : row + 1]))))
        out[f"kappa {kappa}"] = difference(y_TN, np.concatenate(rows).reshape(T, N))
    return out
