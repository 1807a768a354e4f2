"""Pictures of one forward pass: how much each expert got, and where the tokens of a sentence went.

In the manner of `plots`: plain data and a path in, a PNG out. L routed layers, S tokens, K experts each, E experts.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import FixedLocator
from numpy.typing import ArrayLike

from moe_zoo.analysis import plots

_GATE = LinearSegmentedColormap.from_list("gate", ["#f6f5f1", "#93c1e2", "#2673b5", "#08306b"])


def plot_layer_load(counts_LE: ArrayLike, path: str | os.PathLike[str]) -> pathlib.Path:
    """The share of each expert of each layer, over an even share: white is even, orange busy, blue idle.

    Args:
        counts_LE: tokens (or shares) that each expert of each layer got, `[layers, experts]`.
        path: where to write the PNG.
    """
    counts_LE = np.asarray(counts_LE, np.float64)
    if counts_LE.ndim != 2:
        raise ValueError(f"expected counts [layers, experts], got shape {counts_LE.shape}")
    L, E = counts_LE.shape
    with np.errstate(invalid="ignore"):
        ratio_LE = counts_LE / counts_LE.mean(axis=1, keepdims=True)
    cell = min(0.62, max(0.06, 8.0 / E)), min(0.34, max(0.14, 7.0 / L))
    height = max(2.4, L * cell[1] + 1.5)
    figure, panels = plots._figure(max(5.0, E * cell[0] + 2.2), height)
    limit = plots._colour_limit([np.log2(np.maximum(ratio_LE, 1e-6))])
    image = plots._domain_panel(panels[0], ratio_LE, limit, cell)
    plots._expert_axis(panels[0], np.arange(E), cell[0], is_sorted=False)
    panels[0].yaxis.set_major_locator(FixedLocator(plots._ids(L, 24)))
    panels[0].set_xlabel("expert")
    panels[0].set_ylabel("routed layer")
    plots._colour_bar(figure, panels, image, limit, "load ÷ even share", figure_height=height)
    plots._heading(figure, "Expert load", f"{L} routed layers, {E} experts each")
    return plots._save(figure, path)


def plot_token_routing(
    tokens: Sequence[str], experts_LSK: ArrayLike, gates_LSK: ArrayLike, num_experts: int, path: str | os.PathLike[str]
) -> pathlib.Path:
    """Where each token of a sentence goes: a panel per layer, experts upwards, tokens to the right, colour is the gate.

    Args:
        tokens: S texts.
        experts_LSK, gates_LSK: what `aux.stats["router_experts"]` and `["router_gates"]` say, `[layers, S, K]`; an
            expert of `num_experts` or more means none.
        num_experts: E.
        path: where to write the PNG.
    """
    experts_LSK, gates_LSK = np.asarray(experts_LSK), np.asarray(gates_LSK, np.float64)
    L, S, _ = experts_LSK.shape
    if len(tokens) != S or experts_LSK.shape != gates_LSK.shape:
        raise ValueError(f"{len(tokens)} tokens, experts {experts_LSK.shape}, gates {gates_LSK.shape}: do not fit")
    image_LES = np.zeros((L, num_experts + 1, S))
    layer, token = np.arange(L)[:, None, None], np.arange(S)[None, :, None]
    np.add.at(image_LES, (layer, np.minimum(experts_LSK, num_experts), token), gates_LSK)
    columns = 1 if S > 12 else min(L, 2)
    rows = -(-L // columns)
    cell = min(0.3, 11.0 / S)
    height = rows * (min(4.0, max(1.0, 0.16 * num_experts)) + 0.7) + 0.8
    figure, panels = plots._figure(max(5.0, columns * (S * cell + 0.6) + 1.2), height, rows, columns)
    most = max(float(image_LES[:, :-1].max()), 1e-9)
    for index, axes in enumerate(panels[:L]):
        image = axes.imshow(
            image_LES[index, :-1], cmap=_GATE, vmin=0, vmax=most, aspect="auto", origin="lower", interpolation="nearest"
        )
        plots._title(axes, f"routed layer {index}", "", small=True)
        axes.set_xticks(
            range(S), [_shown(t) for t in tokens], fontsize=8, rotation=90 if max(map(len, tokens)) > 2 else 0
        )
        axes.yaxis.set_major_locator(FixedLocator(plots._ids(num_experts, 8)))
        axes.tick_params(length=0)
        axes.set_ylabel("expert" if index % columns == 0 else "")
    for axes in panels[L:]:
        axes.set_axis_off()
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02)
    bar.set_label("gate", size=9)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)
    plots._heading(figure, "Where the tokens go", f"{S} tokens")
    return plots._save(figure, path)


def _shown(token: str) -> str:
    """Spaces visible; nothing that matplotlib takes for mathematics."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("$", r"\$")
