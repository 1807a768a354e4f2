"""Our image models beside code in PyTorch. Each function gives the figures of authors.py for one of them."""

import jax
import jax.numpy as jnp
import numpy as np
from authors_inputs import B, D, normal
from checkout import Checkout, difference, numpy, tensor, torch

from moe_zoo.core import param
from moe_zoo.layers.grid import GridView
from moe_zoo.mixers.bi_level import BiLevel, BiLevelConfig, FullGrid, Regions, route

N, SIDE = 4, 8


def biformer(checkout: Checkout) -> dict[str, float]:
    """The attention of both kinds of stages: which regions attend to which, outputs, gradients over their largest."""
    functions = checkout.run("ops/torch/rrsda.py", "_grid2seq", "_seq2grid", "regional_routing_attention_torch")
    names = {"regional_routing_attention_torch": functions.regional_routing_attention_torch}
    theirs = checkout.run("ops/bra_nchw.py", "nchwBRA", **names)
    last = checkout.run("models/_common.py", "AttentionLePE", rearrange=_rearranged)
    out, x, view = {"choices": 0}, normal(0, B, SIDE * SIDE, D), GridView(SIDE, SIDE)
    for topk in (1, 4, 16):
        there = theirs.nchwBRA(D, N, n_win=4, topk=topk, side_dwconv=5)
        settings = BiLevelConfig(num_heads=N, windows=4, topk=topk)
        ours = _with_their_weights(
            BiLevel(settings, hidden_size=D, out_scale=1.0), there, "qkv_linear", "output_linear"
        )
        images = tensor(x.reshape(B, SIDE, SIDE, D).transpose(0, 3, 1, 2), requires_grad=True)
        y = there(images)
        (y**3).sum().backward()
        tokens = lambda image: numpy(image).transpose(0, 2, 3, 1).reshape(B, -1, D)
        here = jax.grad(lambda x, ours=ours: (ours(x, view)[0] ** 3).sum())
        out[f"k={topk} output"] = difference(ours(x, view)[0], tokens(y))
        scale = float(np.abs(numpy(images.grad)).max())
        out[f"k={topk} gradient"] = difference(here(x), tokens(images.grad)) / scale
        q, k, _ = there.qkv_linear(images).chunk(3, dim=1)
        mean = lambda q: torch.nn.functional.avg_pool2d(q, 2).flatten(2)
        chosen = torch.topk(mean(q).transpose(1, 2) @ mean(k), topk, dim=-1)[1]
        regions = Regions.of(view, 4)
        cut = [regions.cut(part) for part in ours.qkv(x)[:2]]
        mine = route(*cut, regions.live_RP(), topk)
        out["choices"] += int((np.sort(mine, -1) != np.sort(numpy(chosen), -1)).sum())
    there = last.AttentionLePE(D, N, side_dwconv=5)
    ours = _with_their_weights(FullGrid(BiLevelConfig(num_heads=N), hidden_size=D, out_scale=1.0), there, "qkv", "proj")
    y = there(tensor(x.reshape(B, SIDE, SIDE, D)))
    return out | {"last stage": difference(ours(x, view)[0], numpy(y).reshape(x.shape))}


def _with_their_weights(ours, there, qkv: str, out: str):
    """Our module with the weights of theirs."""
    values, H = {}, D // N
    weights = {name: numpy(value) for name, value in there.named_parameters()}
    for kind, shape in (("weight", (D, N, H)), ("bias", (N, H))):
        if f"{qkv}.{kind}" in weights:
            parts = np.split(weights[f"{qkv}.{kind}"].reshape(3 * D, -1), 3)
            values |= {f"{kind[0]}_{name}": part.T.reshape(shape) for name, part in zip("qkv", parts)}
    values["w_o"], values["b_o"] = weights[f"{out}.weight"].reshape(D, D).T.reshape(N, H, D), weights[f"{out}.bias"]
    shape = param.arrays(ours)["lce.bias"].shape
    values["lce.kernel"] = weights["lepe.weight"][:, 0].transpose(1, 2, 0).reshape(5, 5, *shape)
    values["lce.bias"] = weights["lepe.bias"].reshape(shape)
    return param.replace(ours, {name: jnp.asarray(value) for name, value in values.items()})


def _rearranged(x, pattern: str, h: int | None = None, w: int | None = None):
    """The four patterns that the last stage asks einops for."""
    match pattern:
        case "n h w c -> n (h w) c":
            return x.flatten(1, 2)
        case "n (h w) c -> n c h w":
            return x.transpose(1, 2).unflatten(2, (h, w))
        case "n c h w -> n (h w) c":
            return x.flatten(2).transpose(1, 2)
        case "n (h w) c -> n h w c":
            return x.unflatten(1, (h, w))
