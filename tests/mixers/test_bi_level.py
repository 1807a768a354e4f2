"""Bi-level routing attention: against a loop over tokens, the exact invariants, gradients, sizes that do not divide."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive import normal, softmax

from moe_zoo.core import param as P
from moe_zoo.core.registry import ConfigError
from moe_zoo.core.schema import build
from moe_zoo.layers.grid import GridView
from moe_zoo.mixers.bi_level import BiLevel, BiLevelConfig, FullGrid, Regions, attend_regions, route
from moe_zoo.models.biformer import BiFormer, BiFormerConfig
from moe_zoo.models.counting import count_parameters

B, D, N, H = 2, 8, 2, 4
call = jax.jit(lambda mixer, x, view: mixer(x, view)[0])
regions_of = lambda Y, X, windows: [
    [(y, x) for y in range(top, min(top + Y // windows, Y)) for x in range(left, min(left + X // windows, X))]
    for top in range(0, Y, Y // windows)
    for left in range(0, X, X // windows)
]


def made(cls=BiLevel, **settings):
    """A mixer whose biases are no zeros."""
    mixer = P.materialize(cls(BiLevelConfig(num_heads=N, **settings), hidden_size=D, out_scale=1.0), 0)
    biases = {n: jnp.asarray(normal(i, *a.shape)) for i, (n, a) in enumerate(P.arrays(mixer).items()) if "b_" in n}
    return P.replace(mixer, {**P.arrays(mixer), **biases})


def lce(values, weights, Y, X):
    """A depthwise 5 x 5 convolution of [Y, X, ...], pixel by pixel."""
    out = np.zeros_like(values) + weights["lce.bias"]
    for y, x in np.ndindex(Y, X):
        for i, j in np.ndindex(5, 5):
            if 0 <= y + i - 2 < Y and 0 <= x + j - 2 < X:
                out[y, x] += weights["lce.kernel"][i, j] * values[y + i - 2, x + j - 2]
    return out


def naive(mixer, images, windows, topk, scale, of_values=True):
    """(outputs [B, Y, X, D], the regions of each region) of [B, Y, X, D], one token and one head after the other."""
    w = {name: np.asarray(value, np.float64) for name, value in P.arrays(mixer).items()}
    outputs, chosen = [], []
    for image in np.asarray(images, np.float64):
        Y, X, _ = image.shape
        q, k, v = (np.einsum("yxd,dnh->yxnh", image, w[f"w_{c}"]) + w.get(f"b_{c}", 0) for c in "qkv")
        regions = regions_of(Y, X, windows)
        q_r, k_r = (np.stack([np.mean([a[at] for at in r], axis=0).ravel() for r in regions]) for a in (q, k))
        alike = q_r @ k_r.T
        chosen.append([sorted(np.argsort(-row, kind="stable")[:topk].tolist()) for row in alike])
        o = np.zeros_like(q)
        for region, others in zip(regions, chosen[-1]):
            keys = [at for r in others for at in regions[r]]
            for at in region:
                for n in range(N):
                    p = softmax(np.array([scale * q[at][n] @ k[key][n] for key in keys]))
                    o[at][n] = sum(share * v[key][n] for share, key in zip(p, keys))
        o += lce(v if of_values else image, w, Y, X).reshape(o.shape)
        outputs.append(np.einsum("yxnh,nhd->yxd", o, w["w_o"]) + w["b_o"])
    return np.stack(outputs), chosen


@pytest.mark.parametrize("Y, X, windows, topk", [(4, 6, 2, 2), (5, 7, 2, 3)], ids=["divides", "does not"])
def test_equals_a_loop_over_tokens(Y, X, windows, topk):
    """Also where regions at the end have fewer tokens: their means are of those, and no key is made up."""
    mixer, x, view = made(windows=windows, topk=topk), normal(1, B, Y, X, D), GridView(Y, X)
    expected, chosen = naive(mixer, x, windows, topk, D**-0.5)
    y = call(mixer, x.reshape(B, -1, D), view).reshape(x.shape)
    np.testing.assert_allclose(y, expected, atol=2e-5)
    regions = Regions.of(view, windows)
    q, k, _ = mixer.qkv(x.reshape(B, -1, D))
    mine = route(regions.cut(q), regions.cut(k), regions.live_RP(), topk)
    assert np.sort(mine, -1).tolist() == chosen
    # the scale of queries does not matter to who is chosen
    np.testing.assert_array_equal(mine, route(regions.cut(3 * q), regions.cut(k), regions.live_RP(), topk))


def test_all_regions_are_full_attention_and_the_last_stage_is_the_authors():
    x, view = normal(1, B, 4, 4, D), GridView(4, 4)
    flat = x.reshape(B, -1, D)
    every, one = made(windows=2, topk=4), made(windows=1, topk=1)
    np.testing.assert_allclose(call(every, flat, view), call(one, flat, view), atol=1e-5)
    more = made(windows=2, topk=99)  # than there are: all
    np.testing.assert_array_equal(call(more, flat, view), call(every, flat, view))
    last = made(FullGrid)
    assert {name for name in P.arrays(last) if name.startswith("b_")} == {"b_o"}
    expected, _ = naive(last, x, 1, 1, H**-0.5, of_values=False)
    np.testing.assert_allclose(call(last, flat, view).reshape(x.shape), expected, atol=2e-5)


def test_permuted_regions_permute_the_output_and_a_region_alone_is_a_window():
    q, k, v = normal(2, 3, B, 9, 4, N, H)
    live, order = jnp.ones((9, 4), bool), np.random.default_rng(0).permutation(9)
    run = jax.jit(lambda q, k, v: attend_regions(q, k, v, route(q, k, live, 3), live, 0.3))
    out = run(q, k, v)
    np.testing.assert_allclose(run(q[:, order], k[:, order], v[:, order]), out[:, order], atol=1e-6)
    itself = jnp.broadcast_to(jnp.arange(9)[None, :, None], (B, 9, 1))
    p = jax.nn.softmax(0.3 * jnp.einsum("brpnh,brqnh->brnpq", q, k), axis=-1)
    window = jnp.einsum("brnpq,brqnh->brpnh", p, v)
    np.testing.assert_allclose(attend_regions(q, k, v, itself, live, 0.3), window, atol=1e-6)
    # rows of weights sum to 1
    np.testing.assert_allclose(run(q, k, np.ones_like(v)), 1, atol=1e-6)


def test_gradients_reach_chosen_regions_only_and_routing_has_none():
    q, k, v = normal(2, 3, 1, 6, 4, N, H)
    live = jnp.ones((6, 4), bool)
    chosen = route(q, k, live, 2)
    loss = lambda q, k, v, chosen: jnp.sin(attend_regions(q, k, v, chosen, live, 0.3)[:, 0]).sum()
    through = jax.grad(lambda *qkv: loss(*qkv, route(*qkv[:2], live, 2)), argnums=(0, 1, 2))(q, k, v)
    held = jax.grad(loss, argnums=(0, 1, 2))(q, k, v, chosen)
    for one, other in zip(through, held):
        np.testing.assert_array_equal(one, other)
    for gradient in through[1:]:
        seen = np.abs(gradient[0]).sum((1, 2, 3)) > 0
        assert np.flatnonzero(seen).tolist() == sorted(np.asarray(chosen)[0, 0].tolist())


def test_controls_choose_without_looking():
    regions = Regions.of(GridView(6, 6), 3)
    nearest, random = regions.fixed("nearest", 3), regions.fixed("random", 3)
    assert nearest[4].tolist() == [4, 1, 3] and nearest[0].tolist() == [0, 1, 3]
    assert all(len(set(row)) == 3 for row in random.tolist()) and len(set(map(tuple, random.tolist()))) > 5
    mixer, x = made(windows=3, topk=3, select="nearest"), np.asarray(normal(1, B, 36, D))
    image = x.copy()
    image[:, -1] += 5.0  # the last region, which the first does not see; nor does its convolution reach it
    y, other = (call(mixer, a, GridView(6, 6)) for a in (x, image))
    np.testing.assert_array_equal(y[:, 0], other[:, 0])
    assert np.abs(y[:, -1] - other[:, -1]).max() > 0.1


@functools.cache
def paper() -> BiFormer:
    return BiFormer(BiFormerConfig(num_classes=1000))


def test_biformer_t_has_the_size_of_the_paper():
    """13.1M parameters and 2.2 GFLOPs, which there are multiply-adds."""
    assert count_parameters(paper())["total"] == pytest.approx(13.1e6, rel=0.01)
    assert paper().flops_per_example() / 2 == pytest.approx(2.2e9, rel=0.05)


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"topk": [1, 4]}, "expected one for each of the 4 stages"),
        ({"topk": [1, 4, 0, -2]}, "regions >= 1, or -2"),
        ({"windows": 60}, "at most its side"),
        ({"num_heads": [3, 4, 8, 8]}, "does not divide into 3 heads"),
        ({"lce_size": 4}, "expected an odd number"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_impossible_settings_are_named(settings, why):
    with pytest.raises(ConfigError, match=why):
        BiFormer(build(BiFormerConfig, settings, "model"))
